"""A row's token is what the plain reference says, whatever else is in the batch."""

import math
import random

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.request import Sampling
from engine.sample.sampler import Sampler
from tests.engine.sample.cases import Case, draw, make, with_seed
from tests.engine.sample.reference import choose


def alone(vocab: int, rows: int = 256) -> Sampler:
    return Sampler(None, vocab, 0, vocab, rows, "cpu")


@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [(1003, torch.float32), (8192, torch.float32), (5000, torch.bfloat16), (7, torch.float32)],
)
def test_every_setting_draws_the_token_of_the_plain_reference(vocab, dtype):
    cases = make(vocab, seed=vocab, dtype=dtype)
    got = draw(alone(vocab), cases)
    want = [choose(c.logits_V, c.sampling, c.tokens, c.prompt_len) for c in cases]
    wrong = [(c.sampling, g, w) for c, g, w in zip(cases, got, want, strict=True) if g != w]
    assert not wrong


def test_a_row_is_drawn_alike_alone_in_a_batch_and_permuted():
    cases = make(20_000, seed=1)
    sampler = alone(20_000)
    together = draw(sampler, cases)
    assert [draw(sampler, [c])[0] for c in cases] == together
    order = list(range(len(cases)))
    random.Random(2).shuffle(order)
    assert draw(sampler, [cases[i] for i in order], rows=order) == [together[i] for i in order]


def test_the_plain_greedy_path_takes_the_first_of_equal_logits_in_any_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randint(-3, 4, (9, 3001)).to(dtype)
        cases = [Case(Sampling(temperature=0.0), [1], 1, row) for row in logits]
        assert draw(alone(3001), cases) == [int((r == r.max()).nonzero()[0]) for r in logits]


def test_logits_that_are_a_view_with_padding_columns_are_read_in_place():
    padded = torch.randn(4, 2056)
    padded[:, 2048:] = 99.0
    sampler = alone(2048)
    for row in range(4):
        sampler.add_row(row, Sampling(temperature=float(row % 2), seed=row), [0], 1)
    before = padded.clone()
    got = sampler.sample(padded[:, :2048], [0, 1, 2, 3], torch.tensor([1, 1, 1, 1])).token_ids
    whole = draw(
        sampler,
        [Case(Sampling(temperature=float(r % 2), seed=r), [0], 1, padded[r, :2048]) for r in range(4)],
    )
    assert got.tolist() == whole
    assert torch.equal(padded, before)


@pytest.mark.parametrize(
    ("kw", "processors"),
    [
        ({"top_k": 12}, [TopKLogitsWarper(12)]),
        ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        ({"temperature": 0.5, "top_k": 30, "top_p": 0.6},
         [TemperatureLogitsWarper(0.5), TopKLogitsWarper(30), TopPLogitsWarper(0.6)]),
        ({"temperature": 1.5, "min_p": 0.05, "top_k": 9},
         [TemperatureLogitsWarper(1.5), MinPLogitsWarper(0.05), TopKLogitsWarper(9)]),
        ({"temperature": 0.9, "repetition_penalty": 1.8, "top_k": 5},
         [RepetitionPenaltyLogitsProcessor(1.8), TemperatureLogitsWarper(0.9), TopKLogitsWarper(5)]),
    ],
)  # fmt: skip
def test_draws_cover_exactly_the_tokens_that_transformers_processors_keep(kw, processors):
    logits = torch.randn(1, 400, generator=torch.Generator().manual_seed(5)) * 1.5
    tokens = [3, 99, 99, 200]
    scores = LogitsProcessorList(processors)(torch.LongTensor([tokens]), logits.clone())[0]
    allowed = set((scores > -math.inf).nonzero()[:, 0].tolist())
    probable = set((scores.softmax(0) > 2e-3).nonzero()[:, 0].tolist())

    case = Case(Sampling(**kw), tokens, 4, logits[0])
    drawn = set(draw(alone(400, 4096), [with_seed(case, i) for i in range(4096)]))
    assert drawn <= allowed
    assert drawn >= probable


def test_a_temperature_near_zero_is_the_argmax():
    logits = torch.randn(3000)
    for temperature in (1e-9, 1e-6, 1e-4):
        case = Case(Sampling(temperature=temperature, seed=4), [1], 1, logits)
        assert draw(alone(3000), [case]) == [int(logits.argmax())]
