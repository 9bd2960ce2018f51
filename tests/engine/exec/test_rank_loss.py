"""A dead, failing, stopped or hung rank fails the engine within seconds and is named with its own evidence.

All on one Ray session: every test but the first starts its ranks where others died.
"""

from __future__ import annotations

import os
import signal
import time

import pytest

from engine.errors import WorkerDied
from engine.exec.ray import RayExecutor
from tests.engine.exec import toy

#: The promise.
NOTICED_S = 10.0


def _death(ranks: RayExecutor) -> tuple[WorkerDied, float]:
    began = time.monotonic()
    with pytest.raises(WorkerDied) as death:
        ranks.result()
    return death.value, time.monotonic() - began


@pytest.mark.parametrize(
    ("how", "evidence"),
    [
        ("kill", "its process died"),
        ("stop", "its process is stopped"),
        ("raise", "rank one cannot add"),
        ("exit", "rank one has had enough"),
        ("late", "rank one gave up first"),
    ],
)
def test_a_lost_rank_is_named_and_nothing_of_its_group_stays(how: str, evidence: str) -> None:
    ranks = toy.executor()
    pids = [r.pid for r in ranks.start()]
    assert toy.answer(ranks, 1) == toy.expected(1)
    if how in ("kill", "stop"):
        ranks.submit(toy.plan(toy.SLOW))
        os.kill(pids[1], signal.SIGKILL if how == "kill" else signal.SIGSTOP)
    else:
        ranks.submit(toy.plan({"raise": toy.RAISE, "exit": toy.EXIT, "late": toy.LATE}[how]))
    death, seconds = _death(ranks)
    assert death.rank == 1, death
    assert evidence in death.evidence
    assert seconds < NOTICED_S
    with pytest.raises(WorkerDied):
        ranks.submit(toy.plan(2))
    ranks.stop()
    assert not toy.left_of(set(pids), 0)


def test_a_rank_that_dies_between_steps_is_named_by_the_next_and_a_new_group_goes_on() -> None:
    ranks = toy.executor()
    pid = ranks.start()[0].pid
    os.kill(pid, signal.SIGKILL)
    assert not toy.left_of({pid}, 5)  # so that the channel knows before Ray does

    def step_on() -> None:
        for step in range(1000):
            toy.answer(ranks, step)

    with pytest.raises(WorkerDied) as death:
        step_on()
    assert death.value.rank == 0, death.value
    ranks.stop()

    again = toy.executor()
    try:
        again.start()
        assert toy.answer(again, 5) == toy.expected(5)
    finally:
        again.stop()


def test_a_step_that_never_ends_is_blamed_on_the_rank_that_hangs() -> None:
    ranks = toy.executor(step_timeout_s=1.0)
    ranks.start()
    ranks.submit(toy.plan(toy.HANG))
    death, seconds = _death(ranks)
    ranks.stop()
    assert death.rank == 1, death
    assert "longer than 1 s" in death.evidence
    assert "_wait_for_ever" in death.evidence
    assert seconds < NOTICED_S


@pytest.mark.parametrize(
    ("worker", "evidence"),
    [("DyingLoader", "died"), ("StoppedLoader", "stopped"), ("UnreadyWorker", "OSError: no such device")],
)
def test_a_rank_lost_before_the_first_step_fails_the_start(worker: str, evidence: str) -> None:
    began = time.monotonic()
    with pytest.raises(WorkerDied, match=evidence) as death:
        toy.executor(worker).start()
    assert death.value.rank == 1
    assert time.monotonic() - began < 3 * NOTICED_S  # with the start of two processes
