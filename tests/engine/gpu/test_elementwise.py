"""The fused RMSNorm, residual and SwiGLU kernels equal torch's passes, row by row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.engine.gpu.interpreter import DEVICE, TOLERANCE  # isort: skip
from bench.gpu_attention import poisoned_memory
from engine.gpu import elementwise
from engine.models.norm import RMSNorm

DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def draw(*size: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@DTYPES
@pytest.mark.parametrize("shape", [(5, 96), (3, 4, 24), (2, 1030)], ids=str)
def test_rms_norm_equals_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = 30 * draw(*shape, dtype=dtype), draw(shape[-1], dtype=dtype, seed=1)
    with poisoned_memory():
        close(elementwise.rms_norm(x, weight, 1e-5), RMSNorm(weight, 1e-5)(x))


@DTYPES
def test_the_residual_is_added_and_rounded_before_the_norm(dtype: torch.dtype) -> None:
    x, delta = draw(5, 200, dtype=dtype), draw(5, 300, dtype=dtype, seed=1)[:, :200]
    weight = draw(200, dtype=dtype, seed=2)
    with poisoned_memory():
        total, normed = elementwise.add_rms_norm(x, delta, weight, 1e-5)
    close(total, x + delta)
    close(normed, RMSNorm(weight, 1e-5)(x + delta))


@DTYPES
@pytest.mark.parametrize("width", [96, 1500])
def test_swiglu_equals_torch(width: int, dtype: torch.dtype) -> None:
    both = 4 * draw(3, 2 * width, dtype=dtype)
    gate, up = both[:, :width], both[:, width:]
    with poisoned_memory():
        close(elementwise.silu_mul(gate, up), F.silu(gate) * up)
