"""Compiles every Triton kernel of the engine for Hopper (sm_90), on a machine without a GPU.

The launchers are called with tensors of the CPU; each launch ends in the compiler (ptxas included) instead
of on a device. Prints one JSON line per compiled kernel: its name, its shared memory and its spilled
registers where the compiler says so. Exit status 1 if a kernel does not compile or would not fit.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from engine.attn.base import AttnShape, AttnStep, HeadWork
from engine.attn.triton_paged import TritonBackend
from engine.gpu import draw, elementwise

#: Bytes of shared memory that one block of a Hopper core may have.
SHARED = 232_448


class Hopper:
    """What the compiler asks of a driver."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


compiled: dict[tuple[str, str], Any] = {}


def compile_instead(kernel: JITFunction, grid: tuple[int, ...]) -> Any:
    def launch(*args: Any, **kwargs: Any) -> None:
        done = kernel.run(*args, grid=grid, warmup=True, **kwargs)
        if (kernel.__name__, done.hash) not in compiled:
            compiled[kernel.__name__, done.hash] = done
            line = {
                "kernel": kernel.__name__,
                "shared": done.metadata.shared,
                "warps": done.metadata.num_warps,
            }
            print(json.dumps(line | {"case": case}), flush=True)

    return launch


def attention(heads: tuple[int, int, int], dtype: torch.dtype, window: int | None) -> None:
    """Decoding rows, short and split, and chunks, through norm, rotation and log-n."""
    shape = AttnShape(*heads, 16, (window,), dtype, torch.device("cpu"))
    backend = TritonBackend(shape)
    backend.allocate(2)
    n, k, h = heads
    for rows in ([(0, 1), (3, 9)], [(2000, 1), (2000, 1)]):
        starts, counts = (np.array(x, np.int64) for x in zip(*rows, strict=True))
        cu = np.concatenate([[0], np.cumsum(counts)])
        tokens = int(cu[-1])
        tables = torch.zeros(len(rows), 128, dtype=torch.int32)
        backend.begin(AttnStep(starts, counts, cu, tables, torch.zeros(tokens, dtype=torch.int64)))
        angle, weight = torch.zeros(tokens, 1, h // 2), torch.zeros(h, dtype=dtype)
        logn = None if window else torch.zeros(tokens, 1, 1)
        work = HeadWork(angle, angle, logn, weight, weight, 1e-6)
        backend.attend_heads(0, torch.zeros(tokens, n + 2 * k, h, dtype=dtype), work)
    starts_R, rows_R1 = torch.zeros(2, dtype=torch.int64), torch.arange(3, dtype=torch.int32)
    backend.begin_decoding(starts_R, rows_R1, tables, starts_R)
    backend.attend(0, *(torch.zeros(2, x, h, dtype=dtype) for x in (n, k, k)))


def passes(width: int, dtype: torch.dtype) -> None:
    x = torch.zeros(2, width, dtype=dtype)
    elementwise.rms_norm(x, x[0], 1e-6)
    elementwise.add_rms_norm(x, x, x[0], 1e-6)
    elementwise.silu_mul(x, x)


def sampling(dtype: torch.dtype) -> None:
    for rows in (1, 64, 600):
        positions = torch.zeros(rows, dtype=torch.int64)
        logits = torch.zeros(rows, 151936, dtype=dtype)
        draw.draw(logits, np.zeros(rows, np.int64), np.zeros(rows, np.float32), positions, 75968)


if __name__ == "__main__":
    triton.runtime.driver.set_active(Hopper())
    JITFunction.__getitem__ = compile_instead  # type: ignore[method-assign,assignment]
    dtypes = [getattr(torch, name) for name in sys.argv[1:]] or [torch.float32, torch.bfloat16, torch.float16]
    for dtype in dtypes:
        for heads in ((16, 8, 128), (7, 1, 64), (8, 1, 256)):
            case = f"{heads} {dtype}"
            attention(heads, dtype, None if heads[0] % 16 else 4096)
        for width in (1024, 5120):
            case = f"{width} {dtype}"
            passes(width, dtype)
        case = f"draw {dtype}"
        sampling(dtype)
    too_large = sorted({name for (name, _), k in compiled.items() if k.metadata.shared > SHARED})
    if too_large:
        sys.exit(f"more than {SHARED} bytes of shared memory: {', '.join(too_large)}")
