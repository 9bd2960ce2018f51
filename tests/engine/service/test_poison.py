"""A job that kills ranks is found, ended and kept with the evidence; its neighbours are answered."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.messages import Job, Priority, Status
from tests.engine.service.build import KILLER, ids_job, serving, wait_for
from tests.headrace.servers import Lane


@pytest.mark.parametrize("at", [0, 37, 63])
def test_one_poison_row_of_64_is_found_in_halves(lane: Lane, tmp_path: Path, at: int) -> None:
    jobs = [ids_job(f"j{i}", [1, 2, KILLER if i == at else 3]) for i in range(64)]
    assert lane.run(lane.ledger.submit(jobs, 100)) == ["new"] * 64
    with serving(lane, tmp_path) as engine:
        wait_for(lambda: lane.run(lane.ledger.progress("r")).ended == 64)
        assert 2 <= engine.deaths <= 7, "1 + log2(64)"
    progress = lane.run(lane.ledger.progress("r"))
    assert (progress.ok, progress.dead) == (63, 1)
    by_id = {c.id: c for c in lane.results()}
    assert len(by_id) == 64
    dead = by_id[f"j{at}"]
    assert dead.status is Status.DEAD
    assert dead.error
    assert dead.error.code == "crashes_engine"
    (letter,) = lane.run(lane.ledger.dead_letters())
    assert Job.parse(letter.raw) == jobs[at]
    assert letter.attempts.proven
    assert letter.attempts.crashes == engine.deaths
    assert letter.evidence["error"] == f"Traceback: token {KILLER} is poison"
    assert letter.evidence["rank"] == 0
    assert letter.info["id"] == f"j{at}"
    assert "headrace-" in letter.info["build"]
    assert lane.redis.exists(lane.ledger.keys.attempts) == 0


def test_several_poison_rows_are_all_found(lane: Lane, tmp_path: Path) -> None:
    bad = {5, 30, 31}
    jobs = [ids_job(f"j{i}", [1, 2, KILLER if i in bad else 3]) for i in range(48)]
    lane.run(lane.ledger.submit(jobs, 100))
    with serving(lane, tmp_path):
        wait_for(lambda: lane.run(lane.ledger.progress("r")).ended == 48)
    progress = lane.run(lane.ledger.progress("r"))
    assert (progress.ok, progress.dead) == (45, 3)
    assert {letter.info["id"] for letter in lane.run(lane.ledger.dead_letters())} == {f"j{i}" for i in bad}


def test_only_what_was_in_flight_at_the_first_death_is_run_again(lane: Lane, tmp_path: Path) -> None:
    """Suspects run alone: what waits behind them shares no step with the culprit."""
    jobs = [ids_job(f"j{i}", [1, 2, KILLER if i == 3 else 3], 40) for i in range(100)]
    lane.run(lane.ledger.submit(jobs, 1000))
    with serving(lane, tmp_path, rows=16, step_s=0.01, fuse=20):  # time enough to lease others beside it
        wait_for(lambda: lane.run(lane.ledger.progress("r")).ended == 100)
    done = {c.id: c for c in lane.results()}
    assert sum(c.status is Status.OK for c in done.values()) == 99
    again = {name for name, c in done.items() if c.attempts > 1}
    assert "j3" in again
    assert len(again) <= 21, "16 rows and 5 that were leased ahead"


def test_a_redriven_job_runs_again_with_a_fresh_budget(lane: Lane, tmp_path: Path) -> None:
    lane.run(lane.ledger.submit([ids_job("j", [KILLER])], 100))
    with serving(lane, tmp_path):
        wait_for(lambda: lane.run(lane.ledger.progress("r")).ended == 1)
        (letter,) = lane.run(lane.ledger.dead_letters())
        mended = ids_job("j", [1, 2])  # what a new engine, without the fault, makes of the same job
        assert lane.run(lane.ledger.redrive(letter, mended, 100)) == "new"
        assert lane.run(lane.ledger.dead_letters()) == []
        wait_for(lambda: lane.run(lane.ledger.progress("r")).ok == 1)
    progress = lane.run(lane.ledger.progress("r"))
    assert (progress.submitted, progress.ended, progress.dead) == (1, 1, 0)


def test_bytes_that_are_no_job_end_as_an_error_and_leave_a_letter(lane: Lane, tmp_path: Path) -> None:
    lane.submit("good", prompt_token_ids=[1], prompt=None)
    lane.redis.xadd(lane.ledger.keys.jobs(Priority.NORMAL), {"m": b'{"id": "x", "n": \xff'})
    with serving(lane, tmp_path):
        wait_for(lambda: len(lane.run(lane.ledger.dead_letters())) == 1)
        wait_for(lambda: lane.run(lane.ledger.progress("r")).ok == 1)
    (letter,) = lane.run(lane.ledger.dead_letters())
    assert letter.raw == b'{"id": "x", "n": \xff'
    assert letter.info["code"] == "invalid_json"
