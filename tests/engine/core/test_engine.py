"""The engine's verbs: requests are added, cancelled, handed back and counted."""

from __future__ import annotations

import threading

import pytest

from engine.errors import EngineError, InvalidRequest
from engine.exec.echo import EchoExecutor
from engine.request import FinishReason, Request
from tests.engine.core.build import echo_engine, expected, outputs, prompt, request, run

BOTH = pytest.mark.parametrize("depth", [0, 1])


def test_an_impossible_request_is_refused_and_the_next_one_completes() -> None:
    engine = echo_engine(blocks=4)
    with pytest.raises(InvalidRequest, match="need 5 KV blocks of 4 tokens and the cache has 4"):
        engine.add(request(prompt(10), max_tokens=8))
    fits = request(prompt(10), max_tokens=7)
    run(engine, [fits])
    assert (fits.output, fits.finish) == expected(fits)


def test_an_id_that_runs_already_is_refused_and_is_free_again_afterwards() -> None:
    engine = echo_engine()
    engine.add(request([1], id="a"))
    with pytest.raises(InvalidRequest, match="request a is running already") as refusal:
        engine.add(request([1], id="a"))
    assert refusal.value.code == "duplicate_id"
    engine.drain()
    run(engine, [request([1], id="a")])


def test_an_engine_that_was_not_started_says_so() -> None:
    engine = echo_engine()
    fresh = type(engine)(engine.config, engine.spec, EchoExecutor(engine.config))
    with pytest.raises(EngineError, match=r"call start\(\) first"):
        fresh.add(request([1]))


@BOTH
@pytest.mark.parametrize("steps", range(6))
def test_a_request_can_be_cancelled_at_any_time(depth: int, steps: int) -> None:
    """Before it is taken in, waiting, in the middle of its prompt, decoding, with steps on their way."""
    engine = echo_engine(rows=1, budget=8, depth=depth)
    victim, other = request(prompt(20), max_tokens=30), request(prompt(3, 2))
    engine.add(victim)
    engine.add(other)
    for _ in range(steps):
        engine.step()
    assert engine.cancel(victim.id)
    assert engine.cancel(victim.id), "twice is once"
    ended = engine.drain()
    assert ended == [victim, other]
    assert victim.finish is FinishReason.CANCELLED
    assert victim.output == expected(victim)[0][: len(victim.output)]
    assert (other.output, other.finish) == expected(other)
    assert not engine.cancel(victim.id)
    engine.check_integrity()


def test_requests_may_be_added_and_cancelled_from_other_threads() -> None:
    engine = echo_engine(rows=8, blocks=200)
    requests = [request(prompt(5, i), id=f"t{i}", max_tokens=3) for i in range(400)]
    cancelled = {r.id for r in requests[::10]}

    def feed(part: list[Request]) -> None:
        for req in part:
            engine.add(req)
            if req.id in cancelled:
                engine.cancel(req.id)

    threads = [threading.Thread(target=feed, args=(requests[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    ended: list[Request] = []
    while any(t.is_alive() for t in threads) or engine.has_work:
        ended += engine.step()
    assert sorted(r.id for r in ended) == sorted(r.id for r in requests)
    for req in ended:
        if req.finish is not FinishReason.CANCELLED:
            assert (req.output, req.finish) == expected(req)
        else:
            assert req.id in cancelled


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_as_many_plans_are_under_way_as_the_executor_allows(depth: int) -> None:
    engine = echo_engine(depth=depth)
    run(engine, [request(prompt(5), max_tokens=9)])
    assert isinstance(engine.executor, EchoExecutor)
    assert engine.executor.most_under_way == depth + 1


@BOTH
def test_abort_ends_everything_at_once(depth: int) -> None:
    engine = echo_engine(rows=2, depth=depth)
    requests = [request(prompt(5, i)) for i in range(4)]
    for req in requests:
        engine.add(req)
    engine.step()
    assert sorted(r.id for r in engine.abort_all()) == sorted(r.id for r in requests)
    assert {r.finish for r in requests} == {FinishReason.CANCELLED}
    assert engine.drain() == []
    assert run(engine, [request([1])]) != []


@BOTH
def test_unfinished_requests_can_be_handed_back_with_their_output(depth: int) -> None:
    engine = echo_engine(rows=2, depth=depth)
    requests = [request(prompt(5, i), max_tokens=9) for i in range(3)]
    for req in requests:
        engine.add(req)
    for _ in range(3):
        engine.step()
    taken = engine.take_unfinished()
    assert taken == requests
    assert [len(r.output) for r in taken] == [3, 3, 0]
    engine.drain()
    other, again = echo_engine(rows=2, block_size=2), request(prompt(5, 0))
    run(other, taken)
    run(other, [again])
    assert outputs(requests) == [expected(r) for r in requests]
    assert again.cached == 4, "their prefixes are shared there as any others"


def test_an_idle_engine_steps_without_effect() -> None:
    engine = echo_engine()
    assert not engine.has_work
    assert engine.step() == []
    assert engine.step_count == 0


def test_progress_and_statistics_count_what_happened() -> None:
    engine = echo_engine(blocks=64, rows=4, budget=64)
    requests = [request(prompt(9, 1), max_tokens=4), request(prompt(9, 1), max_tokens=2)]
    for req in requests:
        engine.add(req)
    engine.step()
    stats = engine.stats
    assert (stats.running, stats.waiting, stats.kv_used, stats.kv_usage) == (1, 1, 3, 3 / 64)
    engine.drain()
    assert engine.step_count == stats.steps == 4
    assert (stats.prefill_tokens, stats.decode_tokens, stats.output_tokens) == (9 + 1, 3 + 1, 6)
    assert (stats.prefix_hit_tokens, stats.prefix_query_tokens, stats.finished) == (8, 18, 2)
    assert (stats.running, stats.waiting, stats.kv_used, stats.preemptions) == (0, 0, 0, 0)
    assert stats.to_dict()["prefix_hit_rate"] == 8 / 18
