"""What a row remembers between tokens: counts for penalties, min_tokens; and rows that went wrong."""

import math

import pytest
import torch

from engine.request import Sampling
from engine.sample.sampler import Sampler
from tests.engine.sample.cases import Case, draw
from tests.engine.sample.reference import choose

VOCAB = 600
PENALISED = [
    Sampling(temperature=0.0, repetition_penalty=1.2),
    Sampling(temperature=0.0, frequency_penalty=0.8, presence_penalty=0.4),
    Sampling(temperature=1.0, seed=5, frequency_penalty=1.5, repetition_penalty=0.7),
    Sampling(temperature=1.0, seed=6, top_p=0.9, presence_penalty=1.0, min_tokens=9, stop_token_ids=(1, 2)),
    Sampling(temperature=0.0, min_tokens=7, stop_token_ids=(3,), logit_bias={3: 50.0}),
    Sampling(temperature=1.0, seed=7),
]


def alone(rows: int = 64) -> Sampler:
    return Sampler(None, VOCAB, 0, VOCAB, rows, "cpu")


def logits_at(position: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(position)
    return torch.randn(len(PENALISED), VOCAB, generator=g)


def generate(
    sampler: Sampler, prompt: list[int], steps: int, preempt_after: int | None = None
) -> list[list[int]]:
    rows = list(range(len(PENALISED)))
    tokens = [list(prompt) for _ in rows]
    for row in rows:
        sampler.add_row(row, PENALISED[row], tokens[row], len(prompt))
    for step in range(steps):
        if step == preempt_after:
            for row in rows:
                sampler.drop_row(row)
            rows = [r + 10 for r in range(len(PENALISED))][::-1]
            for i, row in enumerate(rows):
                sampler.add_row(row, PENALISED[i], tokens[i], len(prompt))
        at = len(tokens[0])
        ids = sampler.sample(logits_at(at), rows, torch.full((len(rows),), at)).token_ids.tolist()
        for sequence, token in zip(tokens, ids, strict=True):
            sequence.append(token)
    return [sequence[len(prompt) :] for sequence in tokens]


def test_penalties_and_min_tokens_follow_every_sampled_token():
    prompt = [5, 5, 9, 3]
    want = []
    for i, s in enumerate(PENALISED):
        tokens = list(prompt)
        for _ in range(14):
            tokens.append(choose(logits_at(len(tokens))[i], s, tokens, len(prompt)))
        want.append(tokens[len(prompt) :])
    assert generate(alone(), prompt, 14) == want
    assert 3 not in want[4][:7]  # the biased stop id waits for min_tokens
    assert want[4][7:] == [3] * 7


@pytest.mark.parametrize("preempt_after", [1, 6, 8])
def test_a_preempted_row_goes_on_as_if_it_had_stayed(preempt_after):
    prompt = [5, 5, 9, 3]
    assert generate(alone(), prompt, 14, preempt_after) == generate(alone(), prompt, 14)


def test_a_row_that_is_taken_again_remembers_nothing_of_its_last_request():
    sampler = alone()
    sampler.add_row(0, Sampling(temperature=0.0, repetition_penalty=50.0, logit_bias={9: 100.0}), [7] * 4, 2)
    sampler.sample(torch.ones(1, VOCAB), [0], torch.tensor([4]))
    sampler.drop_row(0)
    logits = torch.zeros(VOCAB)
    logits[7] = 1.0
    for s in (Sampling(temperature=0.0), Sampling(temperature=0.0, repetition_penalty=1.1)):
        assert draw(sampler, [Case(s, [1], 1, logits)], rows=[0]) == [7]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_row_with_logits_that_are_not_finite_is_reported_and_harms_no_other(poison):
    kinds = [
        Sampling(temperature=0.0, logprobs=2),
        Sampling(temperature=1.0, seed=3, logprobs=2),
        Sampling(temperature=1.0, seed=3, top_k=5, top_p=0.9, logprobs=2),
        Sampling(temperature=1.0, seed=3, top_p=0.9, frequency_penalty=1.0, logprobs=2),
    ]
    logits = torch.randn(2 * len(kinds), 3000)
    sampler = Sampler(None, 3000, 0, 3000, 8, "cpu")
    rows = list(range(len(logits)))

    def sample(x: torch.Tensor):
        for row in rows:
            sampler.add_row(row, kinds[row // 2], [1, 2], 1)
        return sampler.sample(x, rows, torch.full((len(rows),), 2))

    clean = sample(logits)
    assert clean.bad_rows == []
    for at in (0, 2999):
        poisoned = logits.clone()
        poisoned[1::2, at] = poison
        out = sample(poisoned)
        assert [row for row, _ in out.bad_rows] == rows[1::2]
        assert all("not finite" in why for _, why in out.bad_rows)
        assert out.token_ids[0::2].tolist() == clean.token_ids[0::2].tolist()
        assert out.logprobs == clean.logprobs[0::2]


def test_a_row_whose_every_token_is_masked_is_reported():
    sampler = alone()
    sampler.add_row(0, Sampling(temperature=1.0, min_tokens=2, stop_token_ids=tuple(range(VOCAB))), [1], 1)
    sampler.add_row(1, Sampling(temperature=0.0, min_tokens=2, stop_token_ids=tuple(range(VOCAB))), [1], 1)
    sampler.add_row(2, Sampling(temperature=0.0), [1], 1)
    out = sampler.sample(torch.randn(3, VOCAB), [0, 1, 2], torch.tensor([1, 1, 1]))
    assert [row for row, _ in out.bad_rows] == [0, 1]
    assert "every token is masked" in out.bad_rows[0][1]


def test_masked_logits_of_the_model_itself_are_no_error():
    logits = torch.randn(2, VOCAB)
    logits[:, 50:] = -math.inf
    sampler = alone()
    sampler.add_row(0, Sampling(seed=1), [1], 1)
    sampler.add_row(1, Sampling(seed=2, top_k=200, top_p=0.99), [1], 1)
    out = sampler.sample(logits, [0, 1], torch.tensor([1, 1]))
    assert out.bad_rows == []
    assert out.token_ids.max() < 50
