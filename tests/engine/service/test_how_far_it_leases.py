"""The service holds what its core plans over, and leaves other engines of the lane their part."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.config import EngineConfig, ModelSpec
from engine.exec.echo import EchoExecutor, echo_spec
from engine.service import Service
from headrace.settings import Settings
from tests.headrace.servers import LANE, Lane, embedded

ROWS, AHEAD = 4, 20


@pytest.fixture
def lane() -> Iterator[Lane]:
    with embedded() as url:
        yield Lane(url)


@contextlib.contextmanager
def engine(
    lane: Lane, folder: Path, lookahead: int = AHEAD, die_at_step: int | None = None
) -> Iterator[Service]:
    """An engine whose rows do not end; its first rank may."""
    config = EngineConfig(
        model=str(folder), max_num_seqs=ROWS, lookahead=lookahead, num_kv_blocks=2000, max_model_len=4096
    )
    settings = Settings(redis=lane.url, lane=LANE, drain_s=0.1)
    deaths = [die_at_step, None]

    def build(config: EngineConfig, _: ModelSpec) -> EchoExecutor:
        return EchoExecutor(config, step_seconds=0.05, die_at_step=deaths.pop(0))

    service = Service(config, echo_spec(), settings, build)
    thread = threading.Thread(target=service.run)
    thread.start()
    try:
        yield service
    finally:
        service.drain()
        service.drain()
        thread.join()


def submit(lane: Lane, number: int) -> None:
    lane.submit(
        *(f"j{i}" for i in range(number)), prompt=None, prompt_token_ids=[1, 2, 3],
        params={"max_tokens": 4000, "ignore_eos": True},
    )  # fmt: skip


def settled(service: Service) -> int:
    """Jobs that it holds when it takes no more."""
    deadline, since, held = time.monotonic() + 30, time.monotonic(), -1
    while time.monotonic() - since < 0.7 or held <= 0:
        assert time.monotonic() < deadline
        if len(service.desk.held) != held:
            since, held = time.monotonic(), len(service.desk.held)
        time.sleep(0.02)
    return held


def test_an_engine_holds_its_rows_and_its_lookahead(lane: Lane, tmp_path: Path) -> None:
    submit(lane, 40)
    with engine(lane, tmp_path) as service:
        assert settled(service) == ROWS + AHEAD
        assert service.desk.engine.stats.waiting == AHEAD


def test_without_lookahead_a_few_jobs_are_ready_for_rows_that_end(lane: Lane, tmp_path: Path) -> None:
    submit(lane, 40)
    with engine(lane, tmp_path, lookahead=0) as service:
        assert settled(service) == ROWS + 2


def test_an_engine_takes_no_more_than_its_part_of_what_is_left(lane: Lane, tmp_path: Path) -> None:
    """An engine that was seen lately counts, one that is long gone does not."""
    submit(lane, 30)
    lane.run(lane.ledger.heartbeat("other", {}))
    lane.redis.hset(lane.ledger.keys.engines, "gone", b'{"at":1.0,"state":{}}')
    with engine(lane, tmp_path) as service:
        assert settled(service) == 15


def test_a_death_is_no_fault_of_jobs_that_only_waited(lane: Lane, tmp_path: Path) -> None:
    submit(lane, 40)
    with engine(lane, tmp_path, die_at_step=10) as service:
        while service.desk.engine.executor.die_at_step is not None:  # type: ignore[attr-defined]
            time.sleep(0.02)
        assert settled(service) == ROWS // 2, "those that ran are suspects, and run in halves"
        attempts = lane.redis.hgetall(lane.ledger.keys.attempts)
    deaths = [int(counts.split()[0]) for counts in attempts.values()]
    assert sorted(deaths) == [0] * AHEAD + [1] * ROWS


def test_what_is_handed_back_is_complete(lane: Lane, tmp_path: Path) -> None:
    submit(lane, 40)
    with engine(lane, tmp_path) as service:
        settled(service)
    assert len(lane.lease("next", 100)) == 40
