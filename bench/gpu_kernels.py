"""Checks the small Triton kernels against torch in float32: norm, residual, SwiGLU, heads, sampling.

`bench/gpu_check.py` runs it; nothing is checked where Triton is missing, or on a CPU outside of Triton's
interpreter. Knows nothing of models.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bench.gpu_attention import poisoned_memory
from engine.attn.base import HeadWork
from engine.models.norm import RMSNorm
from engine.models.rope import rotate
from engine.sample.rng import gumbel, id_hashes, noise_bits, row_keys

#: Largest error allowed against float32, as a share of the oracle's largest value.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def checks(device: torch.device, seed: int) -> Iterator[dict[str, Any]]:
    """One line for each kernel and dtype."""
    if importlib.util.find_spec("triton") is None:
        return
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return
    generator = torch.Generator().manual_seed(seed)
    for dtype in TOLERANCE:
        for name, check in (("norms", _norms), ("swiglu", _swiglu), ("heads", _heads)):
            with poisoned_memory():
                error = max(_share(ours, oracle) for ours, oracle in check(device, dtype, generator))
            yield {
                "check": name, "dtype": str(dtype).removeprefix("torch."), "error": f"{error:.1e}",
                "ok": error <= TOLERANCE[dtype],
            }  # fmt: skip
    yield {"check": "one-pass sampling draws the formula's ids", "ok": _draws(device, generator)}


Pairs = Iterator[tuple[torch.Tensor, torch.Tensor]]


def _norms(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Pairs:
    from engine.gpu import elementwise

    for width in (64, 1024, 5120):
        x, delta, weight = (torch.randn(n, width, generator=generator).to(dtype) for n in (9, 9, 1))
        norm = RMSNorm(weight[0].float(), 1e-6)
        on_gpu = [t.to(device) for t in (x, delta, weight[0])]
        yield elementwise.rms_norm(on_gpu[0], on_gpu[2], 1e-6), norm(x.float())
        total, normed = elementwise.add_rms_norm(*on_gpu, 1e-6)
        yield total, x.float() + delta.float()
        yield normed, norm((x + delta).float())


def _swiglu(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Pairs:
    from engine.gpu import elementwise

    for width in (96, 3072):
        both = 3 * torch.randn(9, 2 * width, generator=generator).to(dtype)
        gate, up = both.to(device).chunk(2, dim=1)
        wide = both.float()
        yield elementwise.silu_mul(gate, up), F.silu(wide[:, :width]) * wide[:, width:]


def _heads(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Pairs:
    """Queries, and the caches with all that was not to be written still in them."""
    from engine.gpu.heads import prepare_heads

    for n, k, h in ((16, 8, 128), (6, 2, 24)):
        qkv = torch.randn(9, n + 2 * k, h, generator=generator).to(dtype)
        angle = 7 * torch.randn(9, 1, h // 2, generator=generator)
        weights = [torch.randn(h, generator=generator).to(dtype) for _ in range(2)]
        slots = torch.randperm(64, generator=generator)[:9]
        q, key, value = qkv.float().split([n, k, k], dim=1)
        q, key = (
            rotate(RMSNorm(w.float(), 1e-6)(x), angle.cos(), angle.sin())
            for w, x in zip(weights, (q, key), strict=True)
        )
        caches = [torch.full((4, 16, k, h), 3.0, dtype=dtype, device=device) for _ in range(2)]
        work = HeadWork(
            angle.cos().to(device), angle.sin().to(device), None, *(w.to(device) for w in weights), 1e-6
        )
        yield prepare_heads(qkv.to(device), n, k, work, *caches, slots.to(device)), q
        for cache, new in zip(caches, (key, value), strict=True):
            expected = torch.full((64, k, h), 3.0)
            expected[slots] = new
            yield cache.flatten(0, 1), expected


def _draws(device: torch.device, generator: torch.Generator) -> bool:
    """Greedy and drawn ids, and both kinds of scores, for few rows (cut into parts) and many."""
    from engine.gpu.draw import draw

    for rows, vocab in ((3, 151936), (70, 1003)):
        logits = (3 * torch.randn(rows, vocab, generator=generator)).to(torch.bfloat16)
        seeds = torch.randint(-(1 << 62), 1 << 62, (rows,), generator=generator)
        positions = torch.randint(0, 40000, (rows,), generator=generator)
        temperatures = torch.rand(rows, generator=generator) * 2
        temperatures[::3] = 0
        _, _, index = draw(logits.to(device), seeds.numpy(), temperatures.numpy(), positions.to(device), 5)
        keys = row_keys(seeds, positions)
        for row in range(rows):
            score = logits[row].double()
            if temperatures[row] > 0:
                noise = gumbel(noise_bits(id_hashes(5, vocab, torch.device("cpu")), keys[row]))
                score = (logits[row].float() / temperatures[row]).double() + noise
            if int(index[row]) != int(np.argmax(score.numpy())):
                return False
    return True


def _share(ours: torch.Tensor, oracle: torch.Tensor) -> float:
    ours = ours.float().cpu()
    if not torch.isfinite(ours).all():
        return float("inf")
    return float((ours - oracle).abs().max() / oracle.abs().max())
