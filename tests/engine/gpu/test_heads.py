"""Norm, rotation, log-n and storing in one kernel equal torch's; only the step's own slots are written."""

from __future__ import annotations

import pytest
import torch

from tests.engine.gpu.interpreter import DEVICE, TOLERANCE  # isort: skip
from bench.gpu_attention import poisoned_memory
from engine.attn.base import HeadWork
from engine.gpu.heads import prepare_heads
from engine.models.norm import RMSNorm
from engine.models.rope import rotate

TOKENS, BLOCKS, BLOCK = 5, 4, 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parts", ["", "norm", "rope", "norm rope", "norm partial rope logn"])
@pytest.mark.parametrize("heads", [(4, 2, 32), (6, 1, 24)], ids=str)
def test_equals_torch(heads: tuple[int, int, int], parts: str, dtype: torch.dtype) -> None:
    n, k, h = heads
    generator = torch.Generator().manual_seed(11)

    def draw(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(DEVICE, dtype)

    qkv = draw(TOKENS + 2, n + 2 * k, h)
    half = 0 if "rope" not in parts else h // 4 if "partial" in parts else h // 2
    angle = draw(TOKENS + 2, 1, half, dtype=torch.float32)
    work = HeadWork(
        angle.cos() if half else None,
        angle.sin() if half else None,
        draw(TOKENS + 2, 1, 1, dtype=torch.float32) if "logn" in parts else None,
        draw(h) if "norm" in parts else None,
        draw(h) if "norm" in parts else None,
        1e-6,
    )
    q, key, value = qkv.split([n, k, k], dim=1)
    if work.q_weight is not None and work.k_weight is not None:
        q, key = RMSNorm(work.q_weight, work.eps)(q), RMSNorm(work.k_weight, work.eps)(key)
    if half:
        q, key = (rotate(x, work.cos, work.sin) for x in (q, key))
    if work.logn is not None:
        q = (q * work.logn).to(dtype)

    slots = torch.tensor([17, 3, 63, 48, 31], device=DEVICE)
    caches = [torch.full((BLOCKS, BLOCK, k, h), float("nan"), dtype=dtype, device=DEVICE) for _ in range(2)]
    expected = [cache.clone() for cache in caches]
    for cache, new in zip(expected, (key, value), strict=True):
        cache.flatten(0, 1)[slots] = new[:TOKENS]
    with poisoned_memory():
        found = prepare_heads(qkv, n, k, work, *caches, slots)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found[:TOKENS], q[:TOKENS], rtol=tolerance, atol=tolerance)
    assert found[TOKENS:].isnan().all(), "padding tokens are left alone"
    for cache, want in zip(caches, expected, strict=True):
        torch.testing.assert_close(cache, want, rtol=tolerance, atol=tolerance, equal_nan=True)
    torch.testing.assert_close(caches[1], expected[1], rtol=0, atol=0, equal_nan=True)
