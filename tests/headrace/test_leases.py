"""Leases on real servers: a job is with one engine at a time, and comes back from one that is gone."""

from __future__ import annotations

import pytest

from headrace.keys import GROUP
from tests.headrace.servers import Lane, ids


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


def test_a_consumer_that_lost_its_lease_is_fenced(lane: Lane) -> None:
    lane.submit("a")
    stale = lane.lease("a")
    assert lane.run(lane.ledger.reclaim(0)) == 1
    again = lane.lease("b")
    assert ids(again) == ["a"]
    assert again[0].failed == 1
    assert lane.finish(stale, "a") == ["fenced"]
    assert lane.results() == []
    assert lane.finish(again, "b") == ["done"]


def test_renewal_prolongs_and_names_what_is_lost(lane: Lane) -> None:
    lane.submit("a", "b")
    a, b = lane.lease("x")
    lane.run(lane.ledger.release("x", [b]))
    assert ids(lane.lease("y")) == ["b"]
    lane.age([a], "x")
    lane.age([b], "y")
    assert lane.run(lane.ledger.renew("x", [a, b])) == [b]
    assert lane.sweep() == 1
    assert ids(lane.lease("z")) == ["b"], "a's lease is fresh; b's holder did not renew"


def test_released_jobs_are_leased_next_in_order_and_cost_no_attempt(lane: Lane) -> None:
    lane.submit("a", "b", "c", "d")
    held = lane.lease("x", 3)
    assert lane.run(lane.ledger.release("x", held)) == 3
    assert lane.run(lane.ledger.release("x", held)) == 0
    again = lane.lease("y", 10)
    assert ids(again) == ["a", "b", "c", "d"]
    assert [one.failed for one in again] == [0, 0, 0, 0]


def test_only_leases_that_ran_out_are_taken_and_counted(lane: Lane) -> None:
    lane.submit("released", "fresh", "dead")
    released, fresh, dead = lane.lease("x")
    lane.run(lane.ledger.release("x", [released]))
    lane.age([dead], "x")
    assert lane.sweep() == 1
    (again,) = lane.lease("y", 10)
    assert (ids([again]), again.failed, again.suspect) == (["dead"], 1, True)
    (other,) = lane.lease("y", 10)
    assert (ids([other]), other.failed, other.suspect) == (["released"], 0, False)
    assert lane.run(lane.ledger.renew("x", [fresh])) == []


def test_one_dead_lease_behind_many_live_ones_is_found(lane: Lane) -> None:
    """XAUTOCLAIM looks at 10 x COUNT entries of the pending list; one sweep must look at all."""
    names = [f"j{i}" for i in range(300)]
    lane.submit(*names)
    live = lane.lease("live", 299)
    dead = lane.lease("dead", 1)
    lane.age(dead, "dead")
    assert lane.run(lane.ledger.renew("live", live)) == []
    assert lane.sweep() == 1
    assert ids(lane.lease("b")) == ids(dead)


def test_an_entry_that_somebody_deleted_is_dropped_and_not_run(lane: Lane) -> None:
    lane.submit("a", "b")
    a, _ = lane.lease("x")
    lane.redis.xdel(a.stream, a.entry_id)
    assert lane.run(lane.ledger.reclaim(0)) == 1
    left = lane.lease("y")
    assert ids(left) == ["b"]
    assert lane.finish(left, "y") == ["done"]
    assert lane.redis.xpending(a.stream, GROUP)["pending"] == 0


@pytest.mark.parametrize("how", ["lease", "release_dead", "held_by", "renew", "reclaim"])
def test_a_deleted_entry_leaves_nothing_behind_whoever_finds_it(lane: Lane, how: str) -> None:
    lane.submit("a")
    held = lane.lease("x")
    lane.run(lane.ledger.crashed("x", held, {}))
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
        assert lane.run(lane.ledger.reclaim(0)) == 0
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
    first, second = lane.lease("new"), lane.lease("newer")
    assert [(ids([one]), one.failed) for one in first + second] == [(["a"], 1), (["b"], 1)]
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


def test_a_retry_waits_as_long_as_the_server_says(lane: Lane) -> None:
    lane.submit("a", "b")
    a, _ = lane.lease("x")
    assert lane.run(lane.ledger.retry("x", a, within_s=600)) == 1
    assert lane.run(lane.ledger.retry("x", a)) == 0, "it is not ours any more"
    assert lane.lease("y") == []
    (member,) = lane.redis.zrange(lane.ledger.keys.later, 0, -1)
    due = lane.redis.zscore(lane.ledger.keys.later, member) / 1000
    seconds, micros = lane.redis.time()
    assert due - (seconds + micros / 1e6) <= 1, "the first limit is a second, full jitter"
    lane.redis.zadd(lane.ledger.keys.later, {member: 1})
    (again,) = lane.lease("y")
    assert (ids([again]), again.attempts.errors, again.failed, again.suspect) == (["a"], 1, 1, False)


def test_a_lone_job_is_proven_a_cause_by_its_second_crash(lane: Lane) -> None:
    lane.submit("a")
    for crash in (1, 2):
        (one,) = lane.lease("e")
        assert (one.attempts.crashes, one.attempts.proven) == (crash - 1, False)
        assert lane.run(lane.ledger.crashed("e", [one], {"n": crash})) == 1
    (one,) = lane.lease("e")
    assert (one.attempts.crashes, one.attempts.proven, one.suspect) == (2, True, False)


def test_suspects_are_given_to_idle_engines_alone_and_stay_a_group(lane: Lane) -> None:
    lane.submit("a", "b", "c", "d", "e")
    busy = lane.lease("busy", 1)
    lane.run(lane.ledger.crashed("dead", lane.lease("dead", 4), {}))
    assert lane.run(lane.ledger.suspect_groups()) == 2
    lane.submit("fresh", "waits")
    assert ids(lane.lease("busy", 1)) == ["fresh"], "it holds something"
    half = lane.lease("idle")
    assert ids(half) == ["b", "c"], "and nothing else"
    assert all(one.suspect for one in half)
    lane.run(lane.ledger.release("idle", half))
    assert ids(lane.lease("idle")) == ["b", "c"]
    assert lane.run(lane.ledger.renew("busy", busy)) == []


def test_nobody_is_called_by_the_name_that_held_released_jobs(lane: Lane) -> None:
    lane.submit("a")
    lane.run(lane.ledger.release("x", lane.lease("x")))
    assert lane.run(lane.ledger.release_dead("_free")) == 0
    assert ids(lane.lease("y")) == ["a"]


def test_a_lease_renewed_while_the_sweep_looked_is_not_taken(lane: Lane) -> None:
    lane.submit("a")
    (held,) = lane.lease("x")
    stale = lane.ledger._crash("x", [(2, held.entry_id)], 30_000, {})  # as `reclaim` sends it
    assert lane.run(stale) == 0
    assert lane.run(lane.ledger.renew("x", [held])) == []
