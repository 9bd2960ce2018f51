"""The ledger's promises, on real servers: every job once in, once out, from whoever holds its lease."""

from __future__ import annotations

import pytest

from headrace.errors import InvalidJob
from headrace.keys import FREE, GROUP
from headrace.ledger import BATCH, BATCH_BYTES
from headrace.messages import Completion, ErrorInfo, Job, Priority, Status
from tests.headrace.servers import Lane, answer, ids, job


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


def test_urgent_jobs_are_leased_first(lane: Lane) -> None:
    lane.submit("slow", priority="bulk")
    lane.submit("usual")
    lane.submit("now", priority="interactive")
    assert ids(lane.lease()) == ["now", "usual", "slow"]


def test_two_consumers_never_hold_the_same_job(lane: Lane) -> None:
    lane.submit(*(f"j{i}" for i in range(10)))
    first, second = lane.lease("a", 6), lane.lease("b", 6)
    assert ids(first) + ids(second) == [f"j{i}" for i in range(10)]
    assert lane.lease("c") == []


def test_finishing_moves_everything_at_once_and_leaves_nothing_behind(lane: Lane) -> None:
    lane.submit("a", reply_to="mine")
    leased = lane.lease()
    lane.run(lane.ledger.release("a", leased, failed=True))
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


def test_a_consumer_that_lost_its_lease_is_fenced(lane: Lane) -> None:
    lane.submit("a")
    stale = lane.lease("a")
    page = lane.run(lane.ledger.reclaim("b", Priority.NORMAL, 0, "0-0", 10))
    assert ids(page.leased) == ["a"]
    assert page.leased[0].failed == 1
    assert lane.finish(stale, "a") == ["fenced"]
    assert lane.results() == []
    assert lane.finish(page.leased, "b") == ["done"]


def test_renewal_prolongs_and_names_what_is_lost(lane: Lane) -> None:
    lane.submit("a", "b")
    a, b = lane.lease("x")
    lane.run(lane.ledger.release("x", [b]))
    assert ids(lane.lease("y")) == ["b"]
    lane.age([a], "x")
    lane.age([b], "y")
    assert lane.run(lane.ledger.renew("x", [a, b])) == [b]
    assert ids(lane.sweep("z")) == ["b"], "a's lease is fresh; b's holder did not renew"


def test_released_jobs_are_leased_next_in_order_and_cost_no_attempt(lane: Lane) -> None:
    lane.submit("a", "b", "c", "d")
    held = lane.lease("x", 3)
    assert lane.run(lane.ledger.release("x", held)) == 3
    assert lane.run(lane.ledger.release("x", held)) == 0
    again = lane.lease("y", 10)
    assert ids(again) == ["a", "b", "c", "d"]
    assert [one.failed for one in again] == [0, 0, 0, 0]


def test_a_sweep_counts_only_deliveries_that_failed(lane: Lane) -> None:
    lane.submit("released", "mine", "dead")
    released, mine, dead = lane.lease("x")
    lane.run(lane.ledger.release("x", [released]))
    lane.age([released], FREE)
    lane.age([dead], "y")
    lane.age([mine], "x")
    found = {Job.parse(one.raw).id: one.failed for one in lane.sweep("x")}
    assert found == {"released": 0, "mine": 0, "dead": 1}


def test_one_dead_lease_behind_many_live_ones_is_found_by_the_cursor(lane: Lane) -> None:
    names = [f"j{i}" for i in range(300)]
    lane.submit(*names)
    live = lane.lease("live", 299)
    dead = lane.lease("dead", 1)
    lane.age(dead, "dead")
    assert lane.run(lane.ledger.renew("live", live)) == []
    cursor, found, pages = "0-0", [], 0
    while True:
        page = lane.run(lane.ledger.reclaim("b", Priority.NORMAL, 30_000, cursor, 5))
        found += page.leased
        cursor, pages = page.cursor, pages + 1
        if cursor == "0-0":
            break
    assert ids(found) == ids(dead)
    assert pages > 1, "one page must not have been enough, or the test shows nothing"


def test_an_entry_that_somebody_deleted_is_dropped_and_not_run(lane: Lane) -> None:
    lane.submit("a", "b")
    a, _ = lane.lease("x")
    lane.redis.xdel(a.stream, a.entry_id)
    page = lane.run(lane.ledger.reclaim("y", Priority.NORMAL, 0, "0-0", 10))
    assert ids(page.leased) == ["b"]
    assert page.ghosts == 1
    assert lane.finish(page.leased, "y") == ["done"]


@pytest.mark.parametrize("how", ["lease", "release_dead", "held_by", "renew", "reclaim"])
def test_a_deleted_entry_leaves_nothing_behind_whoever_finds_it(lane: Lane, how: str) -> None:
    lane.submit("a")
    held = lane.lease("x")
    lane.run(lane.ledger.release("x", held, failed=True))
    if how != "lease":
        assert [one.failed for one in lane.lease("x")] == [1]
    lane.redis.xdel(held[0].stream, held[0].entry_id)
    if how == "lease":
        assert lane.lease("x") == []
    elif how == "release_dead":
        assert lane.run(lane.ledger.release_dead("x")) == 0
    elif how == "held_by":
        assert lane.run(lane.ledger.held_by("x")) == []
    elif how == "reclaim":
        page = lane.run(lane.ledger.reclaim("y", Priority.NORMAL, 0, "0-0", 10))
        assert (page.leased, page.ghosts) == ([], 1)
    else:
        assert lane.run(lane.ledger.renew("x", held)) == held
    assert lane.redis.xpending(held[0].stream, GROUP)["pending"] == 0
    if how != "renew":  # which is asked for many entries many times, and leaves counts to the others
        assert lane.redis.exists(lane.ledger.keys.attempts) == 0


def test_what_a_lost_reply_handed_over_is_found(lane: Lane) -> None:
    lane.submit("a", "b")
    handed = lane.lease("x")  # as if this had never arrived
    assert lane.run(lane.ledger.held_by("x")) == handed
    assert lane.run(lane.ledger.held_by("y")) == []


def test_a_dead_engines_jobs_come_back_at_once(lane: Lane) -> None:
    lane.submit("a", "b")
    lane.lease("dead")
    lane.run(lane.ledger.heartbeat("dead", {"state": "ready"}))
    assert lane.run(lane.ledger.release_dead("dead")) == 2
    assert [one.failed for one in lane.lease("new")] == [1, 1]
    assert lane.run(lane.ledger.engines()) == {}


def test_an_engine_that_holds_jobs_is_not_removed(lane: Lane) -> None:
    lane.submit("a")
    held = lane.lease("x")
    lane.run(lane.ledger.leave("x"))
    assert lane.run(lane.ledger.held_by("x")) == held


def test_an_idle_engine_is_woken_by_a_submit_and_misses_none(lane: Lane) -> None:
    assert lane.lease("x") == []
    assert lane.run(lane.ledger.wait_for_jobs("x", 5, 20)) == []
    lane.submit("a")
    assert ids(lane.run(lane.ledger.wait_for_jobs("x", 5, 20))) == ["a"]


def test_scripts_and_groups_are_made_again_after_the_server_lost_everything(lane: Lane) -> None:
    lane.submit("a")
    lane.redis.script_flush()
    leased = lane.lease()
    lane.redis.flushall()
    assert lane.finish(leased) == ["fenced"]
    assert lane.run(lane.ledger.renew("a", leased)) == leased
    assert lane.lease() == []
    assert lane.submit("a") == ["new"]
    assert lane.finish(lane.lease()) == ["done"]


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


@pytest.mark.parametrize(("one", "two"), [("first", "last"), ("last", "first")])
def test_a_result_is_deleted_when_every_sink_has_taken_it(lane: Lane, one: str, two: str) -> None:
    for group in (one, two):
        lane.run(lane.ledger.ensure_sink(None, group))
    lane.submit("a", "b", "c")
    lane.finish(lane.lease())
    entries = lane.run(lane.ledger.read_results(None, one, "s", 10, 1))
    lane.run(lane.ledger.ack_results(None, one, [e.entry_id for e in entries]))
    assert lane.run(lane.ledger.result_length(None)) == 3, "sink two has read nothing"
    assert lane.run(lane.ledger.result_lag(None, two)) == 3
    entries = lane.run(lane.ledger.read_results(None, two, "s", 10, 1))
    lane.run(lane.ledger.ack_results(None, two, [entries[0].entry_id, entries[2].entry_id]))
    assert lane.run(lane.ledger.result_length(None)) == 2, "b is still pending for two"
    assert [e.raw for e in lane.run(lane.ledger.unacknowledged(None, two, "s"))] == [entries[1].raw]
    lane.run(lane.ledger.ack_results(None, two, [entries[1].entry_id]))
    assert lane.run(lane.ledger.result_length(None)) == 0
    assert lane.run(lane.ledger.result_lag(None, two)) == 0


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


def test_what_a_sink_has_before_it_is_never_told_too_low(lane: Lane) -> None:
    lane.run(lane.ledger.ensure_sink(None, "one"))
    lane.submit("a", "b", "c")
    lane.finish(lane.lease())
    entries = lane.run(lane.ledger.read_results(None, "one", "s", 2, 1))
    assert lane.run(lane.ledger.result_lag(None, "one")) == 3
    lane.run(lane.ledger.ack_results(None, "one", [e.entry_id for e in entries]))
    assert lane.run(lane.ledger.result_lag(None, "one")) == 1
    lane.run(lane.ledger.ensure_sink(None, "late"))
    assert lane.run(lane.ledger.result_lag(None, "late")) >= 1
    assert lane.run(lane.ledger.result_lag(None, "nobody")) == 1
    assert lane.run(lane.ledger.result_lag("nothing", "nobody")) == 0
    lane.submit("d", "e")
    lane.finish(lane.lease())
    hole = lane.redis.xrange(lane.ledger.keys.results(None))[1][0]
    lane.redis.xdel(lane.ledger.keys.results(None), hole)
    assert lane.run(lane.ledger.result_lag(None, "late")) >= 2, "with a hole the server does not count"


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


def test_an_answer_for_an_application_is_kept_by_job_id(lane: Lane) -> None:
    lane.submit("a", reply_to="reply.me")
    lane.submit("b", reply_to="elsewhere")
    leased = lane.lease()
    lane.finish(leased)
    kept = lane.run(lane.ledger.kept("a"))
    assert kept == answer(leased[0]).to_bytes()
    assert lane.run(lane.ledger.kept("b")) is None
    assert 0 < lane.redis.ttl(lane.ledger.keys.results("reply.me")) <= 3600
