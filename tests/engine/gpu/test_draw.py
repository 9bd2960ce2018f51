"""The one-pass kernel draws the ids that the sampler draws without it, and reads bad rows as bad."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.engine.gpu.interpreter import DEVICE  # isort: skip
from engine.gpu import draw, ops
from engine.request import Sampling
from engine.sample import rng
from engine.sample.sampler import Sampler

ROWS, VOCAB = 7, 2500
TEMPERATURES = np.array([0.7, 0.0, 1.0, 1e-4, 30.0, 0.0, 1.3], np.float32)
SEEDS = np.array([1, 2, -5, 2**62 + 1, 0, 3, 7])
POSITIONS = torch.tensor([5, 0, 100_000, 3, 9, 4, 1], device=DEVICE)


def logits(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    x = 3 * torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(seed))
    return x.to(DEVICE, dtype)


@pytest.mark.parametrize("parts", [1, 512], ids=["whole rows", "rows in parts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_and_ids_are_those_of_the_formula(
    dtype: torch.dtype, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 has many equal logits: the lowest index wins among them."""
    monkeypatch.setattr(draw, "PROGRAMS", parts)
    for seed in range(8):
        x = logits(dtype, seed)
        greatest, score, index = draw.draw(x, SEEDS + seed, TEMPERATURES, POSITIONS, 100)
        wide = x.float()
        hashes = rng.id_hashes(100, VOCAB, DEVICE)
        keys = rng.row_keys(torch.from_numpy(SEEDS + seed).to(DEVICE), POSITIONS)
        temperature = torch.from_numpy(TEMPERATURES).to(DEVICE)[:, None]
        drawn = (wide / temperature).double() + rng.gumbel(rng.noise_bits(hashes, keys[:, None]))
        expected = torch.where(temperature > 0, drawn, wide.double())
        assert torch.equal(greatest, wide.amax(1))
        assert torch.equal(index, expected.max(1).indices)
        torch.testing.assert_close(score, expected.amax(1), rtol=1e-14, atol=1e-14)


def test_the_sampler_draws_the_same_ids_with_and_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy and free rows beside rows with limits, edits and log-probabilities."""
    settings = [
        Sampling(temperature=0.0),
        Sampling(temperature=0.9, seed=5),
        Sampling(temperature=1.0, seed=6, top_k=20),
        Sampling(temperature=1.0, seed=7, top_p=0.5, logprobs=2),
        Sampling(temperature=0.0, logit_bias={17: 100.0}),
        Sampling(temperature=1.5, seed=8, repetition_penalty=1.2, frequency_penalty=0.5),
        Sampling(temperature=1.0, seed=9, logprobs=0),
    ]
    found = []
    for kernel in (None, draw):
        monkeypatch.setattr(ops, "_kernels", lambda module, device, kernel=kernel: kernel)
        sampler = Sampler(None, VOCAB, 0, VOCAB, ROWS, DEVICE)
        for row, sampling in enumerate(settings):
            sampler.add_row(row, sampling, [1, 2, 3], 3)
        steps = [
            sampler.sample(logits(torch.float32, step), list(range(ROWS)), POSITIONS + step)
            for step in range(4)
        ]
        found.append([(s.token_ids.tolist(), s.logprobs, s.bad_rows) for s in steps])
    assert found[0] == found[1]
    assert found[1][0][0][4] == 17


def test_rows_without_finite_logits_are_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_kernels", lambda module, device: draw)
    sampler = Sampler(None, VOCAB, 0, VOCAB, ROWS, DEVICE)
    for row in range(ROWS):
        sampler.add_row(row, Sampling(temperature=float(row % 2), seed=row), [1], 1)
    x = logits(torch.float32)
    x[0, VOCAB - 1] = x[1, 3] = float("nan")
    x[2, 40] = x[3, 1900] = float("inf")
    x[4] = x[5] = float("-inf")
    out = sampler.sample(x, list(range(ROWS)), POSITIONS)
    assert [row for row, _ in out.bad_rows] == [0, 1, 2, 3, 4, 5]
    assert out.token_ids[:6].tolist() == [0] * 6
    assert out.token_ids[6] == x[6].argmax()
