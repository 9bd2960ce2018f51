"""What survives the death of a rank: every request, with the output that it has."""

from __future__ import annotations

import dataclasses

import pytest

from engine.errors import WorkerDied
from engine.exec.echo import EchoExecutor
from engine.exec.wire import StepPlan
from engine.request import FinishReason
from tests.engine.core.build import echo_engine, expected, outputs, prompt, request

BOTH = pytest.mark.parametrize("depth", [0, 1])


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
