"""The noise behaves like chance, and depends on seed, position and token id only."""

import math

import torch

from engine.request import Sampling
from engine.sample.rng import gumbel, id_hashes, noise_bits, row_keys
from engine.sample.sampler import Sampler
from tests.engine.sample import reference


def bits(seeds: list[int], positions: list[int], start: int, count: int) -> torch.Tensor:
    keys = row_keys(torch.tensor(seeds), torch.tensor(positions))
    return noise_bits(id_hashes(start, count, torch.device("cpu")), keys[:, None])


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Distance from the mean in standard deviations of a chi-square with as many bins less one."""
    chi = float(((counts - expected) ** 2 / expected).sum())
    freedom = counts.numel() - 1
    return (chi - freedom) / math.sqrt(2 * freedom)


def test_the_hash_is_the_documented_one():
    seeds, positions = [0, 1, 2**62 + 12345, 2**63 - 1], [0, 1, 77, 131071]
    got = bits(seeds, positions, 151_900, 40)
    for r, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        assert got[r].tolist() == [reference.noise_bits(seed, position, 151_900 + i) for i in range(40)]


def test_bits_are_uniform_over_tokens_positions_and_seeds():
    n, bins = 1 << 18, 1024
    for x in (
        bits([42], [9], 0, n)[0],
        bits([42] * n, list(range(n)), 17, 1)[:, 0],
        bits(list(range(n)), [5] * n, 17, 1)[:, 0],
    ):
        for shift in (21, 10, 0):  # high, middle and low bits
            counts = ((x >> shift) & (bins - 1)).bincount(minlength=bins).double()
            assert abs(chi_square(counts, torch.full_like(counts, n / bins))) < 5


def test_neighbouring_tokens_positions_and_seeds_are_independent():
    n, bins = 1 << 18, 32
    base = bits([7], [100], 0, n)[0]
    others = {
        "next token": bits([7], [100], 1, n)[0],
        "next position": bits([7], [101], 0, n)[0],
        "next seed": bits([8], [100], 0, n)[0],
        "far position": bits([7], [100 + (1 << 16)], 0, n)[0],
        "high seed bit": bits([7 + (1 << 62)], [100], 0, n)[0],
        "token with a high bit": bits([7], [100], 1 << 17, n)[0],
    }
    for what, other in others.items():
        joint = ((base >> 26) * bins + (other >> 26)).bincount(minlength=bins * bins).double()
        assert abs(chi_square(joint, torch.full_like(joint, n / bins**2))) < 5, what


def test_the_two_tails_of_the_noise_are_as_heavy_as_gumbel_s():
    g = gumbel(bits(list(range(64)), [3] * 64, 0, 1 << 16)).flatten()
    n = g.numel()
    for x in (-2.0, -1.0, 0.0, 1.0, 3.0, 6.0, 9.0, 12.0):
        p = 1 - math.exp(-math.exp(-x))
        got = float((g > x).sum())
        assert abs(got - n * p) < 5 * math.sqrt(n * p * (1 - p)) + 1, x


def test_draws_follow_the_softmax():
    p = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.05, 0.03, 0.015, 0.005])
    n, at_once = 20_000, 2000
    sampler = Sampler(None, 8, 0, 8, at_once, "cpu")
    logits = p.log().expand(at_once, 8)
    by_seed, by_position = torch.zeros(8), torch.zeros(8)
    for first in range(0, n, at_once):
        for row in range(at_once):
            sampler.add_row(row, Sampling(seed=first + row), [0], 1)
        out = sampler.sample(logits, list(range(at_once)), torch.full((at_once,), 3))
        by_seed += out.token_ids.bincount(minlength=8)
    for row in range(at_once):
        sampler.add_row(row, Sampling(seed=99), [0], 1)
    for first in range(0, n, at_once):
        out = sampler.sample(logits, list(range(at_once)), torch.arange(first, first + at_once))
        by_position += out.token_ids.bincount(minlength=8)
    assert abs(chi_square(by_seed, n * p)) < 4
    assert abs(chi_square(by_position, n * p)) < 4


def test_draws_over_a_large_flat_vocabulary_are_spread_evenly():
    vocab, rows, bins = 16_384, 1024, 16
    sampler = Sampler(None, vocab, 0, vocab, rows, "cpu")
    for row in range(rows):
        sampler.add_row(row, Sampling(seed=1000 + row), [0], 1)
    out = sampler.sample(torch.zeros(rows, vocab), list(range(rows)), torch.ones(rows, dtype=torch.int64))
    counts = (out.token_ids * bins // vocab).bincount(minlength=bins)
    assert abs(chi_square(counts, torch.full((bins,), rows / bins))) < 4
