"""The C++ matrix product equals torch's, and a row's bits depend on nothing but the row and the weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine.cpu.gemm import Panels
from engine.cpu.kernels import kernel

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3}


@pytest.fixture(params=DTYPES, ids=["f32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if kernel("linear", request.param) is None:
        pytest.skip("this CPU or machine has no kernel for it")
    return request.param


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def panels(weight: torch.Tensor, bias: torch.Tensor | None = None, **settings: bool | int) -> Panels:
    made = Panels.of(weight, bias, **settings)
    assert made is not None
    return made


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 13, 64, 65])
@pytest.mark.parametrize(
    ("inputs", "outputs", "parts"), [(64, 64, 1), (40, 100, 4), (1024, 200, 2), (1032, 7, 4)]
)
def test_equals_the_exact_product(
    rows: int, inputs: int, outputs: int, parts: int, dtype: torch.dtype
) -> None:
    x, w, b = (
        draw(*s, seed=i).to(dtype) for i, s in enumerate([(rows, inputs), (outputs, inputs), (outputs,)])
    )
    for bias in (None, b):
        exact = x.double() @ w.double().T + (0 if bias is None else bias.double())
        made = panels(w, bias, parts=parts)
        assert error(made(x), exact) < TOLERANCE[dtype]
        assert error(made(x, wide=True), exact) < 1e-6


def test_a_row_gives_the_same_bits_alone_and_anywhere_in_a_batch(dtype: torch.dtype) -> None:
    x = draw(71, 192).to(dtype)
    for settings in ({}, {"parts": 4}, {"gated": True}):
        made = panels(draw(256, 192, seed=1).to(dtype), draw(256, seed=2).to(dtype), **settings)
        whole = made(x)
        assert all(torch.equal(made(x[i : i + 1])[0], whole[i]) for i in range(71))
        assert torch.equal(made(x[3:50]), whole[3:50])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads: int, dtype: torch.dtype) -> None:
    made, x = panels(draw(500, 64, seed=1).to(dtype)), draw(9, 64).to(dtype)
    before, one = torch.get_num_threads(), made(x)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(made(x), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("ranks", [2, 4])
def test_partial_sums_of_ranks_add_up_to_the_bits_of_one(ranks: int, dtype: torch.dtype) -> None:
    x, w = draw(11, 256).to(dtype), draw(96, 256, seed=1).to(dtype)
    whole = panels(w, parts=4)(x)
    sums = [
        panels(w_part.contiguous(), parts=4 // ranks)(x_part, wide=True)
        for x_part, w_part in zip(x.chunk(ranks, 1), w.chunk(ranks, 1), strict=True)
    ]
    while len(sums) > 1:
        sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]
    assert torch.equal(sums[0].to(dtype), whole)


def test_the_gate_is_rounded_as_torch_rounds_it(dtype: torch.dtype) -> None:
    x, w, b = draw(17, 64).to(dtype), draw(384, 64, seed=1).to(dtype) / 8, draw(384, seed=2).to(dtype)
    gate, up = panels(w, b)(x).chunk(2, dim=1)
    torch.testing.assert_close(panels(w, b, gated=True)(x), F.silu(gate) * up, rtol=1e-2, atol=1e-5)
    assert panels(w, b, gated=True)(x).shape == (17, 192)


def test_rows_come_back_out_of_the_panels(dtype: torch.dtype) -> None:
    w = draw(131, 48).to(dtype)
    ids = torch.tensor([0, 130, 64, 63, 64, 7])
    assert torch.equal(panels(w).rows(ids), w[ids])


def test_inputs_by_stride_and_numbers_that_are_not_finite_stay_in_their_row(dtype: torch.dtype) -> None:
    made, wide = panels(draw(64, 64, seed=1).to(dtype)), draw(4, 128).to(dtype)
    expected = made(wide[:, 64:].contiguous())
    assert torch.equal(made(wide[:, 64:]), expected)
    assert torch.equal(made(wide[:, ::2].contiguous()), made(wide[:, ::2]))
    wide[1, 70] = float("nan")
    bad = made(wide[:, 64:])
    assert bad[1].isnan().all()
    assert torch.equal(bad[[0, 2, 3]], expected[[0, 2, 3]])


def test_what_the_kernel_cannot_do_is_left_to_torch() -> None:
    assert Panels.of(torch.zeros(8, 8, dtype=torch.float16)) is None
    assert Panels.of(torch.zeros(8, 7, dtype=torch.bfloat16)) is None
    assert Panels.of(torch.zeros(96, 8, dtype=torch.bfloat16), gated=True) is None
