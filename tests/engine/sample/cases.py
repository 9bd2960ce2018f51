"""Rows with every kind of setting, and logits of several shapes, from one seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch

from engine.request import Sampling


@dataclass
class Case:
    """A row: its settings, its known tokens, and what its logits look like."""

    sampling: Sampling
    tokens: list[int]
    prompt_len: int
    logits_V: torch.Tensor


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"temperature": 0.0, "logit_bias": {3: 4.0, 700: -100.0, 11: 2.5}},
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1e-6},
    {"temperature": 1.7, "frequency_penalty": 0.9},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 0.8, "top_k": 20},
    {"temperature": 1.0, "top_k": 700},
    {"temperature": 1.0, "top_k": 10_000_000},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 0.999},
    {"temperature": 1.0, "top_p": 1e-4},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.2, "min_p": 0.02, "top_k": 50, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.3, "top_p": 0.5},
    {"temperature": 1.0, "min_tokens": 8, "stop_token_ids": (0, 5, 900)},
    {"temperature": 1.0, "top_k": 300, "top_p": 0.7, "repetition_penalty": 0.8, "logit_bias": {5: 7.0}},
]


def make(vocab: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Case]:
    """One case per setting and logits shape."""
    rng = random.Random(seed)
    g = torch.Generator().manual_seed(seed)
    cases = []
    for spread in (0.5, 3.0, 0.0, -1.0):  # flat, peaked, many equal logits, and all the best ones on rank 0
        for kw in SETTINGS:
            kw = dict(kw.items())
            if "logit_bias" in kw:
                kw["logit_bias"] = {t % vocab: b for t, b in kw["logit_bias"].items()}
            if "stop_token_ids" in kw:
                kw["stop_token_ids"] = tuple(t % vocab for t in kw["stop_token_ids"])
            logits = torch.randn(vocab, generator=g) * spread
            if spread < 0:
                logits = logits.abs().sort(descending=True).values
            elif not spread:
                logits = torch.randint(-2, 3, (vocab,), generator=g).float()
            prompt_len = rng.randint(1, 30)
            tokens = [rng.randrange(vocab) for _ in range(prompt_len + rng.randint(0, 12))]
            cases.append(Case(Sampling(seed=rng.getrandbits(63), **kw), tokens, prompt_len, logits.to(dtype)))
    return cases


def with_seed(case: Case, seed: int) -> Case:
    return replace(case, sampling=replace(case.sampling, seed=seed))


def draw(sampler, cases: list[Case], rows: list[int] | None = None) -> list[int]:
    """Add the cases as rows (0.. unless given), draw one token for each, and drop them again."""
    rows = rows or list(range(len(cases)))
    for row, case in zip(rows, cases, strict=True):
        sampler.add_row(row, case.sampling, case.tokens, case.prompt_len)
    start, end = sampler.shard.start, sampler.shard.start + sampler.shard.size
    logits = torch.stack([c.logits_V[start:end] for c in cases])
    out = sampler.sample(logits, rows, torch.tensor([len(c.tokens) for c in cases]))
    for row in rows:
        sampler.drop_row(row)
    assert out.bad_rows == []
    return out.token_ids.tolist()
