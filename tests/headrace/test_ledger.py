"""The ledger's promises, on real servers: every job once in, once out, from whoever holds its lease."""

from __future__ import annotations

import pytest

from headrace.errors import InvalidJob
from headrace.ledger import BATCH, BATCH_BYTES
from headrace.messages import Completion, ErrorInfo, Priority, Status
from tests.headrace.servers import Lane, ids, job


def test_a_job_submitted_twice_is_queued_once(lane: Lane) -> None:
    assert lane.submit("a", "b") == ["new", "new"]
    assert lane.submit("b", "c") == ["queued", "new"]
    assert ids(lane.lease()) == ["a", "b", "c"]
    assert lane.run(lane.ledger.progress("r")).submitted == 3


def test_a_finished_job_answers_with_how_it_ended(lane: Lane) -> None:
    lane.submit("a", "b")
    a, b = lane.lease()
    lane.finish([a])
    lane.finish([b], status=Status.ERROR)
    assert lane.submit("a", "b") == ["ok", "error"]
    assert lane.lease() == []


def test_a_full_lane_refuses_and_takes_again_when_there_is_room(lane: Lane) -> None:
    assert lane.submit("a", "b", "c", bound=2) == ["new", "new", "full"]
    lane.finish(lane.lease(count=1))
    assert lane.submit("c", "d", bound=2) == ["new", "full"]


def test_a_bulk_load_does_not_shut_out_what_is_more_urgent(lane: Lane) -> None:
    assert lane.submit("a", "b", "c", bound=2, priority="bulk") == ["new", "new", "full"]
    assert lane.submit("d", bound=2) == ["new"]
    assert lane.submit("e", "f", bound=2, priority="interactive") == ["new", "new"]
    assert lane.submit("g", bound=2) == ["full"], "what is more urgent counts"
    assert lane.submit("h", bound=2, priority="interactive") == ["full"]


def test_a_job_of_another_lane_is_refused(lane: Lane) -> None:
    with pytest.raises(InvalidJob, match="is for lane other"):
        lane.run(lane.ledger.submit([job("a", lane="other")], 10))


def test_batches_over_the_script_limit_keep_their_order(lane: Lane) -> None:
    names = [f"j{i}" for i in range(BATCH * 2 + 17)]
    assert lane.submit(*names) == ["new"] * len(names)
    leased = lane.lease(count=len(names))
    assert ids(leased) == names
    assert lane.finish(leased) == ["done"] * len(names)
    assert [c.id for c in lane.results()] == names


def test_large_jobs_travel_in_batches_that_the_server_can_take(lane: Lane) -> None:
    lane.redis.config_resetstat()
    names = [f"j{i}" for i in range(12)]
    assert lane.submit(*names, prompt="x" * (BATCH_BYTES // 5)) == ["new"] * 12
    calls = lane.redis.info("commandstats")
    sent = sum(calls.get(f"cmdstat_{c}", {}).get("calls", 0) for c in ("eval", "evalsha"))
    assert sent >= 3, "5 of 12 jobs fit into one call"
    assert ids(lane.lease()) == names


def test_finishing_moves_everything_at_once_and_leaves_nothing_behind(lane: Lane) -> None:
    lane.submit("a", reply_to="mine")
    leased = lane.lease()
    lane.run(lane.ledger.crashed("a", leased, {}))
    leased = lane.lease()
    assert leased[0].failed == 1
    assert lane.finish(leased) == ["done"]
    assert [c.id for c in lane.results("mine")] == ["a"]
    progress = lane.run(lane.ledger.progress("r"))
    assert (progress.submitted, progress.ok, progress.prompt_tokens) == (1, 1, 3)
    assert (progress.cached_tokens, progress.completion_tokens, progress.ended) == (1, 2, 1)
    assert lane.run(lane.ledger.jobs_waiting()) == 0
    assert lane.redis.xpending(lane.ledger.keys.jobs(Priority.NORMAL), "engines")["pending"] == 0
    assert lane.redis.exists(lane.ledger.keys.attempts) == 0


def test_a_job_is_finished_once(lane: Lane) -> None:
    lane.submit("a")
    leased = lane.lease()
    assert lane.finish(leased + leased) == ["done", "duplicate"]
    assert lane.finish(leased) == ["duplicate"]
    assert len(lane.results()) == 1
    assert lane.run(lane.ledger.progress("r")).ok == 1


def test_two_entries_with_one_id_end_in_one_completion(lane: Lane) -> None:
    lane.submit("a")
    lane.redis.xadd(lane.ledger.keys.jobs(Priority.NORMAL), {"m": job("a").to_bytes()})
    assert lane.finish(lane.lease()) == ["done", "duplicate"]
    assert len(lane.results()) == 1
    assert lane.run(lane.ledger.jobs_waiting()) == 0


def test_a_row_that_is_no_job_ends_once_however_often_it_is_loaded(lane: Lane) -> None:
    bad = Completion(
        id="bad", run="r", lane="test", status=Status.ERROR, error=ErrorInfo(code="invalid_json", message="m")
    )
    assert lane.run(lane.ledger.reject([bad])) == ["done"]
    assert lane.run(lane.ledger.reject([bad])) == ["duplicate"]
    assert [c.error.code for c in lane.results() if c.error] == ["invalid_json"]
    progress = lane.run(lane.ledger.progress("r"))
    assert (progress.submitted, progress.error) == (1, 1)


def test_a_forgotten_run_can_be_submitted_again_and_its_old_jobs_leave_no_trace(lane: Lane) -> None:
    lane.submit("done", "queued")
    first, second = lane.lease()
    lane.finish([first])
    lane.run(lane.ledger.forget_run("r"))
    assert lane.run(lane.ledger.progress("r")).submitted == 0
    assert lane.finish([second]) == ["forgotten"]
    assert [c.id for c in lane.results()] == ["done"]
    assert lane.submit("done", "queued") == ["new", "new"]
    assert lane.finish(lane.lease()) == ["done", "done"]


def test_a_full_server_can_still_be_drained(lane: Lane) -> None:
    lane.submit("a", "b", prompt="x" * 1000)
    leased = lane.lease(count=1)
    lane.redis.config_set("maxmemory", 1)
    try:
        assert lane.submit("c") == ["full"]
        assert lane.finish(leased) == ["done"]
        assert len(lane.lease()) == 1
    finally:
        lane.redis.config_set("maxmemory", 0)


def test_marks_and_counters_expire_after_the_last_change(lane: Lane) -> None:
    lane.submit("a")
    for key in (lane.ledger.keys.marks("r"), lane.ledger.keys.run("r")):
        assert 0 < lane.redis.ttl(key) <= 7 * 86_400
        lane.redis.expire(key, 100)
    lane.redis.zadd(lane.ledger.keys.runs, {"ancient": 1})
    lane.finish(lane.lease())
    assert lane.redis.ttl(lane.ledger.keys.marks("r")) > 100
    lane.submit("b")
    assert lane.redis.zrange(lane.ledger.keys.runs, 0, -1) == [b"r"]


def test_a_job_that_outlived_its_marks_still_ends_and_the_run_adds_up(lane: Lane) -> None:
    lane.submit("a")
    lane.redis.delete(lane.ledger.keys.marks("r"), lane.ledger.keys.run("r"))
    assert lane.finish(lane.lease()) == ["done"]
    progress = lane.run(lane.ledger.progress("r"))
    assert (progress.submitted, progress.ok) == (1, 1)


def test_names_of_runs_cannot_reach_each_others_keys(lane: Lane) -> None:
    lane.submit("a", run="r")
    assert lane.submit("a", run="r:marks") == ["new"]
    assert lane.finish(lane.lease()) == ["done", "done"]


def test_bytes_that_are_no_job_are_handed_over_and_can_be_ended(lane: Lane) -> None:
    lane.redis.xadd(lane.ledger.keys.jobs(Priority.NORMAL), {"m": b"\xff\xfe"})
    lane.redis.xadd(lane.ledger.keys.jobs(Priority.NORMAL), {"other": b"x"})
    leased = lane.lease("x")
    assert [one.raw for one in leased] == [b"\xff\xfe", b""]
    done = Completion(id="unreadable", run="unreadable", lane="test", status=Status.ERROR)
    assert lane.run(lane.ledger.finish("x", [(leased[0], done)])) == ["done"]
