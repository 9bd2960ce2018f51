"""The engine's verbs: how rows end, and what survives a cancellation, a drain or the death of a rank."""

from __future__ import annotations

import dataclasses
import threading

import pytest

from engine.errors import EngineError, InvalidRequest, WorkerDied
from engine.exec.echo import EchoExecutor
from engine.exec.wire import StepPlan
from engine.request import FinishReason, Request
from tests.engine.core.build import STOP, echo_engine, expected, outputs, prompt, request, run

BOTH = pytest.mark.parametrize("depth", [0, 1])


# -- how rows end ----------------------------------------------------------------------------------


@BOTH
def test_a_stop_token_ends_the_row_and_stays_in_its_output(depth: int) -> None:
    req = request([1, 2, 3], max_tokens=9, stop_token_ids=(STOP, 40))
    run(echo_engine(depth=depth), [req])
    assert (req.output, req.finish) == ([1, 2, 3, STOP], FinishReason.STOP)


@BOTH
def test_a_stop_token_before_min_tokens_does_not_end_the_row(depth: int) -> None:
    req = request([1, 2, 3], max_tokens=9, stop_token_ids=(STOP, 2), min_tokens=4)
    run(echo_engine(depth=depth), [req])
    assert (req.output, req.finish) == ([1, 2, 3, 1, STOP], FinishReason.STOP)


@BOTH
def test_max_tokens_ends_the_row(depth: int) -> None:
    req = request([1, 2, 3], max_tokens=5)
    run(echo_engine(depth=depth), [req])
    assert (req.output, req.finish) == ([1, 2, 3, 1, 2], FinishReason.LENGTH)


@BOTH
def test_a_full_context_ends_the_row(depth: int) -> None:
    req = request(prompt(12), max_tokens=4)
    run(echo_engine(depth=depth, context=16), [req])
    assert (len(req.output), req.finish) == (4, FinishReason.LENGTH)


class Until:
    """Ends a row at a token; remembers what it was shown."""

    def __init__(self, last: int | None, error: Exception | None = None) -> None:
        self.last, self.error, self.seen = last, error, []  # type: ignore[var-annotated]

    def push(self, token_id: int) -> bool:
        self.seen.append(token_id)
        if token_id == self.last and self.error:
            raise self.error
        return token_id == self.last


@BOTH
def test_a_monitor_ends_the_row(depth: int) -> None:
    monitor = Until(2)
    req = request([1, 2, 3], max_tokens=9, monitor=monitor)
    run(echo_engine(depth=depth), [req])
    assert (req.output, req.finish, monitor.seen) == ([1, 2], FinishReason.STOP, [1, 2])


def test_a_monitor_is_not_shown_the_stop_token_and_a_listener_is() -> None:
    monitor, heard = Until(None), []
    req = request(
        [1, 2], max_tokens=9, stop_token_ids=(STOP,), monitor=monitor,
        on_token=lambda r, token: heard.append((r.id, token)), id="a",
    )  # fmt: skip
    run(echo_engine(), [req])
    assert monitor.seen == [1, 2]
    assert heard == [("a", 1), ("a", 2), ("a", STOP)]


@BOTH
def test_a_monitor_that_raises_ends_its_own_row_only(depth: int) -> None:
    bad = request([1, 2, 3], monitor=Until(2, ValueError("no such character")))
    good = request([1, 2, 3])
    run(echo_engine(depth=depth), [bad, good])
    assert bad.finish is FinishReason.ERROR
    assert bad.error == ("monitor_failed", "the watcher of this row raised ValueError: no such character")
    assert (good.output, good.finish) == expected(good)


@BOTH
def test_logits_that_are_not_finite_end_their_own_row_only(depth: int) -> None:
    bad, good = request([1, 2, 44]), request([1, 2, 3])
    run(echo_engine(depth=depth, poison=44), [bad, good])
    assert bad.finish is FinishReason.ERROR
    assert bad.error == ("non_finite_logits", "the model's logits were not finite: token 44 is poison")
    assert (good.output, good.finish) == expected(good)


@BOTH
def test_every_output_token_has_its_logprobs(depth: int) -> None:
    req = request([1, 2, 3], max_tokens=9, logprobs=0, stop_token_ids=(STOP,))
    run(echo_engine(depth=depth), [req])
    assert [entry.token_id for entry in req.logprobs] == req.output == [1, 2, 3, STOP]


# -- requests come and go --------------------------------------------------------------------------


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


# -- a rank dies -----------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("step", [0, 1, 4])
def test_after_a_death_all_requests_go_on_from_their_output(depth: int, step: int) -> None:
    engine = echo_engine(rows=2, depth=depth, die_at_step=step)
    requests = [request(prompt(5, i), max_tokens=9) for i in range(4)]
    for req in requests:
        engine.add(req)
    with pytest.raises(WorkerDied, match="rank 0 died: told to die"):
        engine.drain()
    known = [list(r.output) for r in requests]
    progress, dead = engine.step_count, engine.executor
    engine.restart(EchoExecutor(engine.config))
    with pytest.raises(WorkerDied, match="it was stopped"):
        dead.submit(StepPlan(99, []))
    ended = engine.drain()
    assert sorted(r.id for r in ended) == sorted(r.id for r in requests)
    assert outputs(requests) == [expected(r) for r in requests]
    assert [r.output[: len(k)] for r, k in zip(requests, known, strict=True)] == known
    assert engine.step_count > progress
    engine.check_integrity()


def test_requests_that_ended_before_the_death_are_not_lost() -> None:
    engine = echo_engine(die_at_step=1, depth=0)
    short, long = request([1], max_tokens=1), request([2], max_tokens=5)
    cancelled = request([3], id="gone")
    engine.add(short)
    assert engine.step() == [short]
    engine.add(long)
    engine.add(cancelled)
    engine.cancel("gone")
    with pytest.raises(WorkerDied):
        engine.step()
    engine.restart(EchoExecutor(engine.config))
    assert engine.drain() == [cancelled, long]


def test_what_a_dead_engine_still_holds_can_be_aborted() -> None:
    engine = echo_engine(die_at_step=0)
    cancelled, running = request([1], id="gone"), request([2])
    engine.add(cancelled)
    engine.add(running)
    engine.cancel("gone")
    with pytest.raises(WorkerDied):
        engine.step()
    assert engine.abort_all() == [cancelled, running]


def test_ranks_that_fail_to_start_again_lose_nothing() -> None:
    class Broken(EchoExecutor):
        def start(self):
            raise WorkerDied(0, "no such device")

    engine = echo_engine(die_at_step=1)
    req = request(prompt(5), max_tokens=9)
    engine.add(req)
    with pytest.raises(WorkerDied):
        engine.drain()
    with pytest.raises(WorkerDied, match="no such device"):
        engine.restart(Broken(engine.config))
    engine.restart(EchoExecutor(engine.config))
    engine.drain()
    assert (req.output, req.finish) == expected(req)


def test_a_request_that_no_longer_fits_after_a_restart_ends_with_an_error() -> None:
    engine = echo_engine(blocks=16, die_at_step=1)
    large, small, late = (request(prompt(n), max_tokens=9) for n in (30, 5, 30))
    engine.add(large)
    engine.add(small)
    with pytest.raises(WorkerDied):
        engine.drain()
    engine.add(late)
    engine.restart(EchoExecutor(dataclasses.replace(engine.config, num_kv_blocks=5)))
    assert engine.drain() == [large, late, small]
    for req in (large, late):
        assert req.finish is FinishReason.ERROR
        assert req.error is not None
        assert req.error[0] == "does_not_fit_cache"
    assert (small.output, small.finish) == expected(small)


def test_what_is_unfinished_after_a_death_can_be_handed_back() -> None:
    engine = echo_engine(die_at_step=2)
    requests = [request(prompt(5, i)) for i in range(6)]
    for req in requests:
        engine.add(req)
    with pytest.raises(WorkerDied):
        engine.drain()
    assert engine.take_unfinished() == requests
    assert not engine.scheduler.running
    engine.stop()
    engine.stop()
