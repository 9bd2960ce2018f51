"""Checks attention backends against gathered SDPA in float32, and times them. Knows nothing of models.

`bench/gpu_check.py` runs it; each check and timing is a dictionary that becomes one JSON line.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch

from engine.attn.base import AttentionBackend, AttnShape, AttnStep, choose
from engine.attn.cpu_paged import CpuPagedBackend
from engine.attn.sdpa import SdpaBackend

BLOCK = 16
#: (start, count) of each row: decodes, chunks of prompts, both in one step.
STEPS = {
    "decode": [(0, 1), (15, 1), (16, 1), (700, 1), (1023, 1)],
    "chunks": [(0, 37), (20, 3), (64, 165)],
    "mixed": [(9, 1), (0, 5), (100, 1), (31, 33), (127, 1)],
}
#: On a GPU only: rows in many splits, beside one that is not split.
LONG = [(5000, 1), (9000, 1), (1, 1), (20, 600)]
Maker = Callable[[AttnShape], AttentionBackend]
#: Largest error allowed against SDPA in float32, as a share of the oracle's largest value.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def checks(device: torch.device, seed: int) -> Iterator[dict[str, Any]]:
    """The chosen backend, and on a GPU its exact mode, against SDPA in float32: heads, windows, dtypes and
    mixes of rows."""
    on_gpu = device.type == "cuda"
    makers: list[Maker] = [chosen, *([exact] if on_gpu and importlib.util.find_spec("triton") else [])]
    steps = [*STEPS.values(), *([LONG] if on_gpu else [])]
    dtypes = (torch.float32, torch.bfloat16, *([torch.float16] if on_gpu else []))
    for make, dtype in product(makers, dtypes):
        for heads, window in product(((16, 8, 128), (40, 40, 128), (6, 2, 24), (7, 1, 64)), (None, 100)):
            worst, name = 0.0, ""
            for rows in steps:
                seed += 1
                error, name = largest_error(rows, heads, window, dtype, device, seed, make)
                worst = max(worst, error)
            yield {
                "check": "attention", "backend": name, "mode": make.__name__, "heads": heads,
                "window": window, "dtype": _name(dtype), "error": f"{worst:.1e}",
                "ok": worst <= TOLERANCE[dtype],
            }  # fmt: skip


def chosen(shape: AttnShape) -> AttentionBackend:
    """What the engine would take."""
    return choose(shape)[0]


def exact(shape: AttnShape) -> AttentionBackend:
    from engine.attn.triton_paged import TritonBackend

    return TritonBackend(shape, exact=True)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within, torch hands out new memory filled with NaN: what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialised memory by itself
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def largest_error(
    rows: list[tuple[int, int]], heads: tuple[int, int, int], window: int | None, dtype: torch.dtype,
    device: torch.device, seed: int, make: Maker = chosen,
) -> tuple[float, str]:  # fmt: skip
    """(largest difference from SDPA in float32 on the CPU, as a share of its largest value; backend)."""
    cpu = torch.device("cpu")
    backends = [
        SdpaBackend(AttnShape(*heads, BLOCK, (window,), torch.float32, cpu)),
        make(AttnShape(*heads, BLOCK, (window,), dtype, device)),
    ]
    with poisoned_memory():
        oracle, ours = (_attend(backend, rows, dtype, seed).float().cpu() for backend in backends)
    if not torch.isfinite(ours).all():
        return float("inf"), backends[1].name
    return float((ours - oracle).abs().max() / oracle.abs().max()), backends[1].name


def _attend(
    backend: AttentionBackend, rows: list[tuple[int, int]], dtype: torch.dtype, seed: int
) -> torch.Tensor:
    step, caches, *qkv = case(rows, backend.shape, dtype, seed)
    fill(backend, step, caches)
    return backend.attend(0, *qkv)


def fill(backend: AttentionBackend, step: AttnStep, caches: tuple[torch.Tensor, torch.Tensor]) -> None:
    backend.allocate(caches[0].shape[0])
    if isinstance(backend, CpuPagedBackend):  # its cache has a layout of its own
        backend.store(0, *(c.flatten(0, 1) for c in caches), torch.arange(caches[0].shape[0] * BLOCK))
    else:
        backend.cache.k[0].copy_(caches[0])
        backend.cache.v[0].copy_(caches[1])
    backend.begin(step)


def case(
    rows: list[tuple[int, int]], shape: AttnShape, dtype: torch.dtype, seed: int
) -> tuple[AttnStep, tuple[torch.Tensor, torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """A step over scattered blocks, the cache before it, and its q, k, v. Values are exact in `dtype`;
    slots that no row has written are NaN."""
    generator = torch.Generator().manual_seed(seed)
    starts, counts = (np.array(x, np.int64) for x in zip(*rows, strict=True))
    need = -(-(starts + counts) // BLOCK)
    blocks = int(need.sum()) + 1
    order = torch.randperm(blocks - 1, generator=generator) + 1
    tables = torch.zeros(len(rows), int(need.max()), dtype=torch.int32)
    written, slots = [], []
    for r, own in enumerate(order.split(need.tolist())):
        tables[r, : len(own)] = own
        at = (own[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
        written.append(at[: starts[r]])
        slots.append(at[starts[r] : starts[r] + counts[r]])

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    n, k, h = shape.num_heads, shape.num_kv_heads, shape.head_dim
    caches = []
    for _ in range(2):
        cache = torch.full((blocks * BLOCK, k, h), float("nan"), dtype=dtype)
        cache[torch.cat(written)] = draw(int(starts.sum()), k, h)
        caches.append(cache.view(blocks, BLOCK, k, h))
    total = int(counts.sum())
    q, key, value = (draw(total, x, h).to(shape.device, shape.dtype) for x in (n, k, k))
    step = AttnStep(
        starts, counts, np.concatenate([[0], np.cumsum(counts)]), tables.to(shape.device),
        torch.cat(slots).to(shape.device),
    )  # fmt: skip
    return step, (caches[0], caches[1]), q, key, value


def timings(device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """Decode over long caches and one long chunk, for the chosen backend and for gathered SDPA."""
    context = 128 if quick else 2048
    cases = {"decode": [(context - 1, 1)] * 64, "chunk": [(0, context)], "mixed": [(context - 1, 1)] * 32
             + [(0, context // 2)]}  # fmt: skip
    for name, rows in cases.items():
        shape = AttnShape(16, 8, 128, BLOCK, (None,), torch.bfloat16, device)
        step, caches, q, k, v = case(rows, shape, shape.dtype, 0)
        read = 2 * sum(s + c for s, c in rows) * shape.num_kv_heads * shape.head_dim * shape.dtype.itemsize
        for backend in (choose(shape)[0], SdpaBackend(shape)):
            fill(backend, step, caches)
            seconds = seconds_of(partial(backend.attend, 0, q, k, v), device, 3 if quick else 50)
            yield {
                "timing": "attention of one layer", "case": name, "backend": backend.name, "context": context,
                "microseconds": round(seconds * 1e6, 1), "gb_per_s": round(read / seconds / 1e9, 1),
            }  # fmt: skip


def seconds_of(call: Callable[[], object], device: torch.device, times: int) -> float:
    """The median of `times` calls, each waited for."""
    spent = []
    for i in range(times + 3):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i >= 3:
            spent.append(time.perf_counter() - began)
    return statistics.median(spent)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
