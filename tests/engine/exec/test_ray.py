"""Ranks over a real Ray cluster and a real gloo group: dead, failing and silent ones are named in time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.errors import CheckpointError, WorkerDied
from engine.exec.echo import echo_spec
from engine.exec.ray import RayExecutor
from engine.exec.wire import RowStep, StepPlan
from tests.engine.exec import toy

#: The promise is ten seconds.
NOTICED_S = 10.0


def _executor(worker: str = "ToyWorker", **settings: Any) -> RayExecutor:
    config = EngineConfig(model="toy", executor="ray", tensor_parallel_size=2, device="cpu", **settings)
    return RayExecutor(config, echo_spec(), f"tests.engine.exec.toy:{worker}")


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    yield
    import ray

    ray.shutdown()


def _plan(step: int) -> StepPlan:
    return StepPlan(step, [RowStep(0, 0, 1, True)])


def _answer(executor: RayExecutor, step: int) -> int:
    executor.submit(_plan(step))
    return executor.result().sampled[0][1]


def _death(executor: RayExecutor) -> tuple[WorkerDied, float]:
    began = time.monotonic()
    with pytest.raises(WorkerDied) as death:
        executor.result()
    return death.value, time.monotonic() - began


def test_ranks_add_up_and_the_smallest_pool_decides() -> None:
    executor = _executor()
    try:
        reports = executor.start()
        assert [r.rank for r in reports] == [0, 1]
        assert executor.num_kv_blocks == 8
        for step in range(20):
            assert _answer(executor, step) == (2 * step + 1) * 1000 + 8
    finally:
        executor.stop()
        executor.stop()


@pytest.mark.parametrize("how", ["kill", "stop", "raise", "exit"])
def test_a_lost_rank_is_named_and_a_new_group_starts_on_the_same_session(how: str) -> None:
    executor = _executor()
    pid = executor.start()[1].pid
    assert _answer(executor, 1) == 3008
    if how in ("kill", "stop"):
        os.kill(pid, signal.SIGKILL if how == "kill" else signal.SIGSTOP)
        executor.submit(_plan(2))
    else:
        executor.submit(_plan(toy.RAISE if how == "raise" else toy.EXIT))
    death, seconds = _death(executor)
    if how == "stop":
        os.kill(pid, signal.SIGCONT)
    executor.stop()
    assert death.rank == 1, death
    assert seconds < NOTICED_S
    if how == "raise":
        assert "rank one cannot add" in death.evidence
    again = _executor()
    try:
        again.start()
        assert _answer(again, 5) == 11008
    finally:
        again.stop()


def test_a_step_that_never_ends_counts_as_a_death() -> None:
    executor = _executor(step_timeout_s=1.0)
    executor.start()
    executor.submit(_plan(toy.HANG))
    death, seconds = _death(executor)
    executor.stop()
    assert "longer than 1 s" in death.evidence
    assert seconds < NOTICED_S


@pytest.mark.parametrize(("limit", "together"), [(1, False), (None, True)])
def test_max_parallel_loading_workers_bounds_how_many_load_at_once(limit: int | None, together: bool) -> None:
    executor = _executor(max_parallel_loading_workers=limit)
    try:
        executor.start()
        (_, first_end), (second_begin, _) = sorted(executor.load_intervals)
        assert (second_begin < first_end) is together
    finally:
        executor.stop()


def test_a_ranks_user_error_arrives_as_itself() -> None:
    executor = _executor("BrokenWorker")
    with pytest.raises(CheckpointError, match=r"^tensor model\.norm\.weight is missing$"):
        executor.start()
    executor.stop()


def test_ranks_get_the_allowed_environment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_TEST_FLAG", "on")
    monkeypatch.setenv("UNRELATED_TEST_FLAG", "on")
    executor = _executor("EnvironmentWorker")
    try:
        executor.start()
        assert _answer(executor, 1) == 1
    finally:
        executor.stop()


def test_a_killed_driver_leaves_no_process() -> None:
    program = textwrap.dedent("""
        import time
        from tests.engine.exec.test_ray import _executor
        executor = _executor()
        print(*[r.pid for r in executor.start()], flush=True)
        time.sleep(600)
    """)
    driver = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    pids = [int(pid) for pid in driver.stdout.readline().split()]
    family = _descendants(driver.pid) | set(pids)
    assert len(family) >= 4  # two ranks, and Ray's own processes
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + 60
    while (left := {pid for pid in family if _alive(pid)}) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left


def _descendants(pid: int) -> set[int]:
    import psutil

    return {child.pid for child in psutil.Process(pid).children(recursive=True)}


def _alive(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
