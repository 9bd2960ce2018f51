"""What can never run is refused with a stable code and a text that names value, limit and fix."""

from __future__ import annotations

import pytest

from engine.errors import InvalidRequest
from engine.request import Request, Sampling
from engine.sched.admission import Limits

LIMITS = Limits(vocab_size=100, context=8192, block_size=16, kv_blocks=100)
ROOMY = Limits(vocab_size=100, context=8192, block_size=16, kv_blocks=512)


@pytest.mark.parametrize(
    ("prompt", "sampling", "code", "text"),
    [
        ([], Sampling(), "empty_prompt", "the prompt has no tokens: send at least one"),
        ([1, 100], Sampling(), "token_out_of_range", "token id 100 .* of 100: send ids from 0 to 99"),
        ([1, -1], Sampling(), "token_out_of_range", "token id -1 "),
        ([1] * 8192, Sampling(max_tokens=1), "prompt_too_long",
         "prompt of 8192 tokens leaves no room for output in the model's context of 8192"),
        ([1] * 120, Sampling(max_tokens=9000), "max_tokens_too_large",
         r"^max_tokens 9000 \+ prompt 120 exceeds the model's context of 8192: "
         "lower max_tokens or shorten the prompt$"),
        ([1], Sampling(max_tokens=0), "max_tokens_too_small", "max_tokens 0 must be at least 1"),
        ([1] * 1000, Sampling(max_tokens=602), "does_not_fit_cache",
         "1601 tokens need 101 KV blocks of 16 tokens and the cache has 100: shorten the prompt"),
        ([1] * 8193, Sampling(score_from=1), "prompt_too_long", "8193 tokens to score exceed .* 8192"),
        ([1] * 4, Sampling(score_from=0), "score_from_out_of_range", "score_from 0 with 4 .* 1 to 3"),
        ([1] * 4, Sampling(score_from=4), "score_from_out_of_range", "score_from 4 with 4 tokens"),
        ([1], Sampling(score_from=1), "score_from_out_of_range", "with 1 tokens"),
        ([1] * 1601, Sampling(score_from=1), "does_not_fit_cache", "1601 tokens need 101 KV blocks"),
    ],
)  # fmt: skip
def test_impossible_requests_are_refused(prompt: list[int], sampling: Sampling, code: str, text: str) -> None:
    with pytest.raises(InvalidRequest, match=text) as refusal:
        LIMITS.check(Request("r", prompt, sampling))
    assert refusal.value.code == code


@pytest.mark.parametrize(
    ("limits", "length", "sampling"),
    [
        (ROOMY, 8191, Sampling(max_tokens=1)),
        (ROOMY, 1, Sampling(max_tokens=8191)),
        (ROOMY, 8192, Sampling(score_from=8191)),
        (LIMITS, 1000, Sampling(max_tokens=601)),  # 1600 tokens are fed: exactly 100 blocks
        (LIMITS, 1600, Sampling(score_from=1)),
    ],
)
def test_the_largest_possible_requests_are_accepted(limits: Limits, length: int, sampling: Sampling) -> None:
    limits.check(Request("r", [99] * length, sampling))
