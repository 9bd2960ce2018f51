"""Log-probabilities are those of log_softmax over the whole vocabulary, ranks count larger logits."""

import math

import pytest
import torch

from engine.request import Sampling
from engine.sample.sampler import Sampler


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [11, 1003, 20_000])
def test_prompt_logprobs_equal_log_softmax(vocab, dtype):
    g = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(9, vocab, generator=g) * 4).to(dtype)
    ids = torch.randint(vocab, (9,), generator=g)
    ids[0] = logits[0].argmax()
    want = logits.double().log_softmax(1)
    for top_n in (0, 1, 8):
        got = Sampler(None, vocab, 0, vocab, 1, "cpu").logprobs_of(logits, ids, top_n)
        for p, entry in enumerate(got):
            assert entry.token_id == ids[p]
            assert entry.logprob == pytest.approx(want[p, ids[p]].item(), abs=2e-6)
            assert entry.rank == 1 + int((logits[p] > logits[p, ids[p]]).sum())
            order = sorted(range(vocab), key=lambda i: (-logits[p, i].item(), i))[:top_n]
            assert [i for i, _ in entry.top] == order
            assert [x for _, x in entry.top] == pytest.approx(want[p, order].tolist(), abs=2e-6)
        assert got[0].rank == 1


def test_a_vocabulary_smaller_than_the_wish_gives_what_there_is():
    (entry,) = Sampler(None, 3, 0, 3, 1, "cpu").logprobs_of(
        torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([1]), 5
    )
    assert [i for i, _ in entry.top] == [2, 1, 0]
    assert math.isclose(sum(math.exp(x) for _, x in entry.top), 1.0, abs_tol=1e-6)


def test_sampled_logprobs_are_of_the_raw_logits_and_only_for_rows_that_asked():
    logits = torch.randn(4, 2000)
    settings = [
        Sampling(temperature=0.0),
        Sampling(temperature=0.5, seed=1, top_k=3, logprobs=0),
        Sampling(temperature=0.0, logit_bias={17: 100.0}, logprobs=2),
        Sampling(temperature=0.0, logprobs=4),
    ]
    sampler = Sampler(None, 2000, 0, 2000, 4, "cpu")
    for row, s in enumerate(settings):
        sampler.add_row(row, s, [1], 1)
    out = sampler.sample(logits, [0, 1, 2, 3], torch.ones(4, dtype=torch.int64))
    raw = logits.double().log_softmax(1)
    assert [row for row, _ in out.logprobs] == [1, 2, 3]
    for row, entry in out.logprobs:
        assert entry.token_id == out.token_ids[row]
        assert entry.logprob == pytest.approx(raw[row, entry.token_id].item(), abs=2e-6)
        assert len(entry.top) == settings[row].logprobs
    assert out.logprobs[1][1].token_id == 17
    assert out.logprobs[1][1].rank > 1


def test_scores_do_not_depend_on_the_positions_beside_them():
    logits, ids = torch.randn(33, 9000), torch.randint(9000, (33,))
    sampler = Sampler(None, 9000, 0, 9000, 1, "cpu")
    together = sampler.logprobs_of(logits, ids, 3)
    assert [sampler.logprobs_of(logits[i : i + 1], ids[i : i + 1], 3)[0] for i in range(33)] == together


def test_a_position_that_is_not_finite_gets_nan_and_harms_no_other():
    logits, ids = torch.randn(3, 1500), torch.tensor([1, 2, 3])
    sampler = Sampler(None, 1500, 0, 1500, 1, "cpu")
    clean = sampler.logprobs_of(logits, ids, 2)
    for poison in (math.nan, math.inf):
        logits[1, 7] = poison
        got = sampler.logprobs_of(logits, ids, 2)
        assert math.isnan(got[1].logprob)
        assert got[0::2] == clean[0::2]
