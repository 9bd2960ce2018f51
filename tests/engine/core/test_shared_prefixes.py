"""Prompts that share a prefix: computed once, never mixed up, and correct where they are fully cached.

The echo executor raises when a row reads a block that holds other tokens than its own.
"""

from __future__ import annotations

import pytest

from engine.engine import Engine
from engine.request import FinishReason
from engine.sched.scheduler import Scheduler
from tests.engine.core.build import computed, echo_engine, expected, outputs, prompt, request, run

BOTH = pytest.mark.parametrize("depth", [0, 1])


@BOTH
@pytest.mark.parametrize("budget", [5, 64, 1000])
def test_a_batch_of_equal_prefixes_computes_the_prefix_once(depth: int, budget: int) -> None:
    shared = prompt(100)
    engine = echo_engine(blocks=400, rows=16, budget=budget, depth=depth)
    requests = [request([*shared, i, i], max_tokens=1) for i in range(16)]
    run(engine, requests)
    assert outputs(requests) == [expected(r) for r in requests]
    assert computed(engine) == 100 + 16 * 2
    assert engine.stats.prefix_hit_tokens == 15 * 100
    assert engine.stats.prefix_query_tokens == 16 * 102


@BOTH
def test_the_same_block_aligned_prompt_twice(depth: int) -> None:
    """All of it is cached, yet its last token must be computed."""
    first, second = request(prompt(8)), request(prompt(8))
    engine = echo_engine(depth=depth)
    run(engine, [first])
    run(engine, [second])
    assert second.cached == 4
    assert first.output == second.output == expected(first)[0]


@BOTH
def test_prompts_of_length_one(depth: int) -> None:
    requests = [request([9]) for _ in range(3)]
    engine = echo_engine(block_size=1, depth=depth)
    run(engine, requests)
    assert outputs(requests) == [expected(r) for r in requests]
    assert [r.cached for r in requests] == [0, 0, 0]


def test_a_prompt_goes_on_from_what_another_one_generated() -> None:
    """The next turn of a chat starts with the last one's prompt and output."""
    first = request(prompt(6), max_tokens=10)
    engine = echo_engine()
    run(engine, [first])
    second = request(first.prompt + first.output + [1, 2])
    run(engine, [second])
    assert second.cached == 12, "15 tokens were computed; the 16th was never fed"


def test_another_salt_computes_everything_itself() -> None:
    engine = echo_engine()
    requests = [request(prompt(9), salt=salt, max_tokens=1) for salt in (b"", b"a", b"b", b"a")]
    run(engine, requests)
    assert [r.cached for r in requests] == [0, 0, 0, 8]


def test_without_prefix_caching_everything_is_computed() -> None:
    engine = echo_engine(caching=False)
    requests = [request(prompt(9), max_tokens=1) for _ in range(3)]
    run(engine, requests)
    assert computed(engine) == 27
    assert (engine.stats.prefix_query_tokens, engine.stats.prefix_hit_rate) == (0, 0.0)


def test_a_prefix_lost_from_a_small_pool_is_computed_again() -> None:
    engine = echo_engine(blocks=6)
    first, other, again = (request(prompt(n, i), max_tokens=1) for n, i in ((20, 1), (12, 2), (20, 1)))
    for req in (first, other, again):
        run(engine, [req])
    assert 0 < again.cached < 16, "the tail of the prefix went first"
    assert again.output == expected(again)[0]


def test_a_resumed_row_still_reports_what_was_cached_when_it_first_ran() -> None:
    """Hits on its own blocks after a preemption are no saving of its user."""
    engine = echo_engine(blocks=8, rows=2)
    old, new = request(prompt(8, 1), max_tokens=17), request(prompt(8, 2), max_tokens=17)
    run(engine, [old, new])
    assert new.preemptions == 1
    assert (new.cached, engine.stats.prefix_hit_tokens, engine.stats.prefix_query_tokens) == (0, 0, 16)


def test_a_cleared_cache_answers_nothing() -> None:
    engine = echo_engine()
    run(engine, [request(prompt(9))])
    engine.reset_prefix_cache()
    second = request(prompt(9))
    run(engine, [second])
    assert second.cached == 0


def test_a_hash_that_always_collides_costs_hits_and_never_answers() -> None:
    engine = echo_engine(rows=8, budget=64)
    _collide(engine)
    requests = [request([*prompt(8, i % 3), i, i], max_tokens=12) for i in range(12)]
    run(engine, requests)
    assert outputs(requests) == [expected(r) for r in requests]


def _collide(engine: Engine) -> None:
    old = engine.scheduler
    engine._scheduler = Scheduler(old.limits, old.max_rows, old.budget, old.stats, hash_=lambda _: b"same")


@BOTH
def test_scored_positions_are_always_computed(depth: int) -> None:
    engine = echo_engine(depth=depth)
    context = prompt(16)
    requests = [request([*context, 1, 2, 3], score_from=len(context)) for _ in range(2)]
    run(engine, requests)
    assert [sorted(r.prompt_logprobs) for r in requests] == [[16, 17, 18]] * 2
    assert [r.cached for r in requests] == [0, 12], "position 15 gives the logits for token 16"
    assert [r.finish for r in requests] == [FinishReason.LENGTH] * 2
    assert [r.output for r in requests] == [[], []]


@BOTH
def test_prompt_logprobs_bypass_the_prefix_cache(depth: int) -> None:
    engine = echo_engine(depth=depth)
    plain, scored = request(prompt(9)), request(prompt(9), prompt_logprobs=0)
    run(engine, [plain])
    run(engine, [scored])
    assert scored.cached == 0
    assert sorted(scored.prompt_logprobs) == list(range(1, 9))
    assert scored.output == plain.output
