"""W8A8 products: near the exact ones, the same bits for a row anywhere and on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.cpu.int8 import Int8Panels, quantize
from engine.cpu.kernels import kernel
from tests.engine.model import drive, tiny

pytestmark = pytest.mark.skipif(kernel("linear_i8", torch.float32) is None, reason="no AVX-512 VNNI kernel")
DTYPES = [torch.float32, torch.bfloat16]


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def panels(weight: torch.Tensor, bias: torch.Tensor | None = None, **settings: bool | int) -> Int8Panels:
    made = Int8Panels.of(weight, bias, **settings)
    assert made is not None
    return made


def reference(x: torch.Tensor, w: torch.Tensor, parts: int) -> torch.Tensor:
    """The same rounding in torch, in float64."""
    rounded, scales = quantize(w)
    total = torch.zeros(x.shape[0], w.shape[0], dtype=torch.float64)
    for xp, wp in zip(x.float().chunk(parts, 1), rounded.chunk(parts, 1), strict=True):
        scale = xp.abs().amax(1, keepdim=True) / 127
        total += (xp.double() * (1 / scale).double()).round() @ wp.double().T * scale * scales
    return total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 6, 64])
@pytest.mark.parametrize(("sizes", "parts"), [((64, 64), 1), ((128, 100), 4), ((1024, 200), 2)])
def test_equals_the_same_rounding_in_torch(
    rows: int, sizes: tuple[int, int], parts: int, dtype: torch.dtype
) -> None:
    x, w = draw(rows, sizes[0]).to(dtype), draw(sizes[1], sizes[0], seed=1).to(dtype)
    ours, exact = panels(w, parts=parts)(x, wide=True).double(), reference(x, w, parts)
    assert (ours - exact).abs().max() / exact.abs().max() < 1e-6
    whole = x.double() @ w.double().T
    assert (ours - whole).norm() / whole.norm() < 0.015


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_gives_the_same_bits_alone_and_anywhere_in_a_batch(dtype: torch.dtype) -> None:
    x = draw(37, 192).to(dtype)
    x[5] = 0
    for settings in ({}, {"parts": 4}, {"gated": True}):
        made = panels(draw(256, 192, seed=1).to(dtype), draw(256, seed=2).to(dtype), **settings)
        whole = made(x)
        assert torch.isfinite(whole).all()
        assert all(torch.equal(made(x[i : i + 1])[0], whole[i]) for i in range(37))


@pytest.mark.parametrize("ranks", [2, 4])
def test_partial_sums_of_ranks_add_up_to_the_bits_of_one(ranks: int) -> None:
    """Scales of weights are those of the rank's own slice, so all slices have the same largest one."""
    x, w = draw(11, 256).bfloat16(), draw(96, 256, seed=1).clamp(-3, 3).bfloat16()
    w[:, ::64] = 3
    whole = panels(w, parts=4)(x)
    sums = [
        panels(w_part.contiguous(), parts=4 // ranks)(x_part, wide=True)
        for x_part, w_part in zip(x.chunk(ranks, 1), w.chunk(ranks, 1), strict=True)
    ]
    while len(sums) > 1:
        sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]
    assert torch.equal(sums[0].bfloat16(), whole)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_stay_in_their_row(bad: float) -> None:
    x, made = draw(4, 64), panels(draw(64, 64, seed=1))
    expected = made(x)
    x[1, 7] = bad
    found = made(x)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2, 3]], expected[[0, 2, 3]])


def test_rows_come_back_as_they_are_multiplied() -> None:
    w, ids = draw(131, 48).bfloat16(), torch.tensor([0, 130, 64, 63])
    rounded, scales = quantize(w)
    assert torch.equal(panels(w).rows(ids), (rounded[ids] * scales[ids, None]).bfloat16())


def test_what_the_kernel_cannot_do_is_left_to_others() -> None:
    assert Int8Panels.of(torch.zeros(8, 40)) is None
    assert Int8Panels.of(torch.zeros(96, 64), gated=True) is None
    assert Int8Panels.of(torch.zeros(8, 64, dtype=torch.float16)) is None


def test_a_model_in_int8_answers_nearly_alike_and_alone_as_in_a_batch(tmp_path: Path) -> None:
    tiny.build(tmp_path, "qwen3", num_hidden_layers=3)
    exact, rounded = (drive.worker(tmp_path, quantization=q, num_threads=1) for q in (None, "int8"))
    prompts = [tiny.prompt(40, seed=s) for s in range(3)]
    alone = []
    for prompt in prompts:
        logits = []
        for worker in (exact, rounded):
            driver = drive.Driver(worker, 64)
            driver.enter(0, prompt)
            logits.append(worker.probe(driver.plan({0: 40})))
        difference = (logits[1] - logits[0]).norm() / logits[0].norm()
        assert 0 < difference < 0.1
        alone.append(logits[1])
    driver = drive.Driver(rounded, 64)
    for row, prompt in enumerate(prompts):
        driver.enter(row, prompt)
    together = rounded.probe(driver.plan({0: 40, 1: 40, 2: 40}))
    assert all(torch.equal(together[40 * row : 40 * row + 40], alone[row]) for row in range(3))
