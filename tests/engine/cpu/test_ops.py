"""RMSNorm, rotary embedding and SiLU in C++ round as torch does, and refuse what they cannot do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine.cpu import ops
from engine.cpu.build import library

pytestmark = pytest.mark.skipif(library()[0] is None, reason=f"no kernels: {library()[1]}")
DTYPES = [torch.float32, torch.bfloat16]


def close(got: torch.Tensor | None, want: torch.Tensor) -> None:
    """Equal to a few units in the last place; in bfloat16 nearly all elements are equal bit for bit."""
    assert got is not None
    assert got.dtype == want.dtype
    if want.dtype == torch.bfloat16:
        torch.testing.assert_close(got, want, rtol=1 / 64, atol=1e-5)
        assert (got != want).float().mean() < 0.01
    else:
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype):
    for x in (
        torch.randn(5, 256, dtype=dtype) * 7,
        torch.randn(70, 1024, dtype=dtype) * 1e-3,
        torch.randn(9, 12, 64, dtype=dtype)[:, 2:7],  # heads cut out of a fused projection
    ):
        weight = torch.rand(x.shape[-1]).to(dtype) + 0.5
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        close(ops.rms_norm(x, weight, 1e-6), weight * (wide * scale).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_adding_before_the_norm_changes_no_bit(dtype):
    for rows in (1, 70):
        x, delta = (torch.randn(rows, 1024, dtype=dtype) for _ in range(2))
        weight = torch.rand(1024).to(dtype)
        both = ops.add_rms_norm(x, delta, weight, 1e-6)
        assert both is not None
        assert torch.equal(both[0], x + delta)
        assert torch.equal(both[1], ops.rms_norm(x + delta, weight, 1e-6))
    assert ops.add_rms_norm(x[:, 1:], delta[:, 1:], weight[1:], 1e-6) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "half"), [(64, 32), (128, 64), (96, 16)])
def test_rotate(dtype, head_dim, half):
    x = torch.randn(11, 9, head_dim, dtype=dtype)[:, 1:6]
    angles = torch.rand(11, 1, half) * 6
    cos, sin = angles.cos(), angles.sin()
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    want = torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(dtype)
    close(ops.rotate(x, cos, sin), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(dtype):
    both = torch.randn(21, 512, dtype=dtype) * 10
    both[0, :6] = torch.tensor([-1e4, -100.0, -88.0, 88.0, 100.0, 1e4])
    gate, up = both[:, :256], both[:, 256:]
    close(ops.silu_mul(gate, up), F.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_row(dtype):
    x = torch.randn(4, 64, dtype=dtype)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    out = ops.rms_norm(x, torch.ones(64, dtype=dtype), 1e-6)
    assert out is not None
    assert out[1].isnan().all()
    assert out[[0, 3]].isfinite().all()
    silu = ops.silu_mul(x, torch.ones_like(x))
    assert silu is not None
    assert silu[1].isnan().sum() == 1


def test_a_row_s_bits_do_not_depend_on_other_rows():
    x = torch.randn(200, 512).bfloat16()  # enough for several threads
    weight = torch.rand(512).bfloat16()
    whole = (ops.rms_norm(x, weight, 1e-6), ops.silu_mul(x[:, :256], x[:, 256:]))
    for i in (0, 100, 199):
        one = x[i : i + 1]
        alone = (ops.rms_norm(one, weight, 1e-6), ops.silu_mul(one[:, :256], one[:, 256:]))
        assert all(torch.equal(w[i], a[0]) for w, a in zip(whole, alone, strict=True))


def test_what_the_kernels_cannot_do_is_left_to_torch():
    good = torch.randn(4, 64)
    assert ops.rms_norm(torch.randn(4, 60), torch.ones(60), 1e-6) is None
    assert ops.rms_norm(good, torch.ones(64).bfloat16(), 1e-6) is None
    assert ops.rms_norm(good.T.contiguous().T, torch.ones(64), 1e-6) is None
    assert ops.rms_norm(good.half(), torch.ones(64).half(), 1e-6) is None
    assert ops.rotate(torch.randn(3, 2, 24), torch.ones(3, 1, 12), torch.ones(3, 1, 12)) is None
    assert ops.silu_mul(good[:, :40], good[:, :40]) is None
    assert ops.silu_mul(good, good.T.contiguous().T) is None
