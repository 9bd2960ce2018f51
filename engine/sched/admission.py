"""Which requests can ever run: decided before a request waits, so that none waits for ever.

A pure function of the request and the engine's fixed sizes. Text of every refusal: value, limit, fix.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import InvalidRequest
from engine.request import Request


@dataclass(frozen=True, slots=True)
class Limits:
    """The fixed sizes of one engine."""

    vocab_size: int
    context: int  # tokens that prompt and output may have together
    block_size: int
    kv_blocks: int  # that one row could hold if it ran alone

    def check(self, request: Request) -> None:
        """Raises InvalidRequest with one of empty_prompt, token_out_of_range, prompt_too_long,
        max_tokens_too_small, max_tokens_too_large, score_from_out_of_range, does_not_fit_cache."""
        prompt, sampling = request.prompt, request.sampling
        length = len(prompt)
        if not length:
            raise InvalidRequest("empty_prompt", "the prompt has no tokens: send at least one")
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= self.vocab_size:
            raise InvalidRequest(
                "token_out_of_range",
                f"token id {low if low < 0 else high} in the prompt is not in the model's vocabulary of "
                f"{self.vocab_size}: send ids from 0 to {self.vocab_size - 1}",
            )
        if sampling.score_from is not None:
            self._check_score(length, sampling.score_from)
        else:
            self._check_output(length, sampling.max_tokens)
        # The last token of a row is never fed back, so it needs no place.
        needed = blocks_for(request.limit - 1, self.block_size)
        if needed > self.kv_blocks:
            raise InvalidRequest(
                "does_not_fit_cache",
                f"{request.limit - 1} tokens need {needed} KV blocks of {self.block_size} tokens and the "
                f"cache has {self.kv_blocks}: shorten the prompt, lower max_tokens or raise "
                "--kv-cache-memory (--gpu-memory-utilization on GPUs)",
            )

    def _check_score(self, length: int, score_from: int) -> None:
        if length > self.context:
            raise InvalidRequest(
                "prompt_too_long",
                f"{length} tokens to score exceed the model's context of {self.context}: shorten the "
                "context or the continuation",
            )
        if not 1 <= score_from < length:
            raise InvalidRequest(
                "score_from_out_of_range",
                f"score_from {score_from} with {length} tokens: it must be from 1 to {length - 1}, so that a "
                "token stands before the first scored one",
            )

    def _check_output(self, length: int, max_tokens: int) -> None:
        if length >= self.context:
            raise InvalidRequest(
                "prompt_too_long",
                f"a prompt of {length} tokens leaves no room for output in the model's context of "
                f"{self.context}: shorten the prompt to at most {self.context - 1} tokens",
            )
        if max_tokens < 1:
            raise InvalidRequest("max_tokens_too_small", f"max_tokens {max_tokens} must be at least 1")
        if length + max_tokens > self.context:
            raise InvalidRequest(
                "max_tokens_too_large",
                f"max_tokens {max_tokens} + prompt {length} exceeds the model's context of {self.context}: "
                "lower max_tokens or shorten the prompt",
            )


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // block_size)
