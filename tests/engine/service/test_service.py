"""What an engine does with jobs whose time is up, that somebody cancelled, or that it cannot read."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import orjson
import pytest

from engine.service.clock import ServerClock
from engine.service.process import identity
from headrace.errors import StoreUnavailable
from headrace.messages import Completion, Priority, Status
from tests.engine.service.build import ids_job, serving, wait_for
from tests.headrace.servers import Lane

LONG = {"max_tokens": 3000}


def ended(lane: Lane, n: int = 1) -> dict[str, tuple[Status, str]]:
    """Waits for so many ends: id -> status and error code."""
    wait_for(lambda: lane.run(lane.ledger.progress("r")).ended >= n)
    return {c.id: (c.status, c.error.code if c.error else "") for c in lane.results()}


def all_results(lane: Lane) -> list[dict[bytes, bytes]]:
    return [fields for _, fields in lane.redis.xrange(lane.ledger.keys.results(None))]


def running(lane: Lane) -> bool:
    states = lane.run(lane.ledger.engines()).values()
    return any(engine["state"]["running"] for engine in states)


def test_a_deadline_ends_waiting_and_running_jobs_as_expired(lane: Lane, tmp_path: Path) -> None:
    now = time.time()
    late = ids_job("late", [1], deadline=now - 1)
    slow = ids_job("slow", [1], **LONG, deadline=now + 3)
    fine = ids_job("fine", [1], deadline=now + 600)
    lane.run(lane.ledger.submit([late, slow, fine], 10))
    with serving(lane, tmp_path, step_s=0.01):
        found = ended(lane, 3)
    assert found["late"] == found["slow"] == (Status.EXPIRED, "deadline_exceeded")
    assert found["fine"] == (Status.OK, "")
    assert lane.run(lane.ledger.progress("r")).expired == 2
    tokens = {Completion.parse(f[b"m"]).id: Completion.parse(f[b"m"]).usage for f in all_results(lane)}
    assert tokens["late"].prompt_tokens == 0, "it was never run"


def test_deadlines_are_judged_by_the_servers_clock(lane: Lane, tmp_path: Path) -> None:
    """An engine whose clock is an hour ahead neither expires a job early, nor one an hour behind late."""
    lane.run(lane.ledger.submit([ids_job("j", [1], deadline=time.time() + 60)], 10))
    with serving(lane, tmp_path) as engine:
        clock = engine.service.desk.clock
        clock.heard(time.time() + 3600)
        wait_for(lambda: abs(clock.now() - time.time()) < 5)
        lane.run(lane.ledger.submit([ids_job("k", [1], deadline=time.time() + 60)], 10))
        wait_for(lambda: lane.run(lane.ledger.progress("r")).ended == 2)
        assert {c.id: c.status for c in lane.results()}["k"] is Status.OK


def test_a_cancelled_job_is_stopped_while_it_runs(lane: Lane, tmp_path: Path) -> None:
    lane.run(lane.ledger.submit([ids_job("j", [1], **LONG)], 10))
    with serving(lane, tmp_path, step_s=0.01):
        wait_for(lambda: running(lane))
        assert lane.run(lane.ledger.cancel("r", ["j", "nobody"])) == ["cancelling", "unknown"]
        assert ended(lane) == {"j": (Status.CANCELLED, "cancelled")}
    assert lane.run(lane.ledger.cancel("r", ["j"])) == ["cancelled"]
    assert lane.run(lane.ledger.cancelled()) == frozenset()


def test_a_job_cancelled_while_it_waits_is_never_run(lane: Lane, tmp_path: Path) -> None:
    lane.run(lane.ledger.submit([ids_job("j", [1], **LONG), ids_job("k", [1])], 10))
    assert lane.run(lane.ledger.cancel_anywhere("j")) == "cancelling"
    with serving(lane, tmp_path):
        assert ended(lane, 2) == {"j": (Status.CANCELLED, "cancelled"), "k": (Status.OK, "")}
    assert lane.run(lane.ledger.progress("r")).completion_tokens == 4


def test_a_job_cancelled_at_its_last_moment_still_ends_as_cancelled(lane: Lane, tmp_path: Path) -> None:
    """The finish script has the last word, whatever the engine knows."""
    lane.run(lane.ledger.submit([ids_job("j", [1])], 10))
    with serving(lane, tmp_path) as engine:
        desk = engine.service.desk
        complete = desk.jobs.completion

        def cancelled_meanwhile(held):
            lane.run(lane.ledger.cancel("r", ["j"]))
            return complete(held)

        desk.jobs.completion = cancelled_meanwhile
        found = ended(lane)
    assert found["j"] == (Status.CANCELLED, "cancelled")


def test_a_cancelled_run_ends_whole(lane: Lane, tmp_path: Path) -> None:
    """What runs, what comes later, and what waits: that without a turn, though every row is another run's."""
    lane.run(lane.ledger.submit([ids_job("mine", [1], **LONG, priority="interactive")], 1000))
    others = [ids_job(f"s{i}", [1], **LONG, run="s", priority="interactive") for i in range(9)]
    lane.run(lane.ledger.submit(others, 1000))
    with serving(lane, tmp_path, rows=4, step_s=0.01) as engine:
        wait_for(lambda: running(lane) and len(engine.service.desk.held) == 6)
        lane.run(lane.ledger.submit([ids_job(f"j{i}", [1], **LONG) for i in range(300)], 1000))
        assert lane.run(lane.ledger.cancel_run("r")) == ["cancelling"]
        wait_for(lambda: lane.run(lane.ledger.progress("r")).cancelled == 301)
        assert lane.run(lane.ledger.progress("s")).ended == 0
        assert lane.run(lane.ledger.cancel_run("s")) == ["cancelling"]
        wait_for(lambda: lane.run(lane.ledger.progress("s")).cancelled == 9)
        lane.run(lane.ledger.submit([ids_job("after", [1])], 1000))
        wait_for(lambda: lane.run(lane.ledger.progress("r")).cancelled == 302)


def test_a_full_result_stream_holds_up_its_own_run_alone(lane: Lane, tmp_path: Path) -> None:
    lane.run(lane.ledger.ensure_sink("full", "s"))
    full = [ids_job(f"f{i}", [1], run="full", reply_to="full") for i in range(200)]
    lane.run(lane.ledger.submit(full, 1000))
    with serving(lane, tmp_path, rows=4, result_bound=5):
        wait_for(lambda: lane.run(lane.ledger.progress("full")).ok >= 5)
        free = [ids_job(f"g{i}", [1], run="free", reply_to="reply.app") for i in range(60)]
        lane.run(lane.ledger.submit(free, 1000))
        wait_for(lambda: lane.run(lane.ledger.progress("free")).ok == 60)
        assert lane.run(lane.ledger.progress("full")).ok <= 30, "the bound, and what was leased by then"
        for _ in range(100):
            taken = lane.run(lane.ledger.read_results("full", "s", "c", 100, 10))
            lane.run(lane.ledger.ack_results("full", "s", [d.entry_id for d in taken]))
            if lane.run(lane.ledger.progress("full")).ok == 200:
                break
            time.sleep(0.1)
        assert lane.run(lane.ledger.progress("full")).ok == 200


def test_a_job_of_a_later_version_is_kept_for_a_newer_engine(lane: Lane, tmp_path: Path) -> None:
    later = orjson.dumps({"v": 2, "id": "j", "run": "r", "lane": "test", "kind": "dance"})
    lane.redis.xadd(lane.ledger.keys.jobs(Priority.NORMAL), {"m": later})
    with serving(lane, tmp_path):
        wait_for(lambda: lane.redis.zcard(lane.ledger.keys.later) == 1)
    assert lane.results() == []
    assert lane.run(lane.ledger.dead_letters()) == []
    due = lane.redis.zrange(lane.ledger.keys.later, 0, -1)
    lane.redis.zadd(lane.ledger.keys.later, dict.fromkeys(due, 0))
    (leased,) = lane.lease("newer")
    assert (leased.raw, leased.attempts.errors, leased.attempts.crashes) == (later, 0, 0)


@pytest.mark.parametrize("dead", [True, False])
def test_a_dead_predecessors_jobs_are_taken_at_once_and_a_strangers_are_not(
    lane: Lane, tmp_path: Path, dead: bool
) -> None:
    lane.run(lane.ledger.submit([ids_job("j", [1])], 10))
    assert len(lane.lease("predecessor")) == 1
    process = identity() | ({"born": "1"} if dead else {"kernel": "of another machine"})
    lane.run(lane.ledger.heartbeat("predecessor", {"process": process}))
    with serving(lane, tmp_path, lease_s=600) as engine:
        wait_for(lambda: engine.service.desk.state == "ready")
        if dead:
            assert ended(lane)["j"] == (Status.OK, "")
        else:
            lane.run(lane.ledger.submit([ids_job("k", [1])], 10))
            assert set(ended(lane)) == {"k"}


def test_what_a_lost_reply_handed_over_is_run_by_the_same_engine(lane: Lane, tmp_path: Path) -> None:
    with serving(lane, tmp_path, lease_s=600) as engine:
        desk = engine.service.desk
        run, lost = desk.store.run, threading.Event()

        def losing(work):
            reply = run(work)
            if isinstance(reply, list) and reply and hasattr(reply[0], "raw") and not lost.is_set():
                lost.set()
                raise StoreUnavailable("the reply never came")
            return reply

        desk.store.run = losing
        lane.run(lane.ledger.submit([ids_job("j", [1])], 10))
        assert ended(lane)["j"] == (Status.OK, "")
        assert lost.is_set()


def test_a_fault_of_the_engine_is_tried_again_and_ends_with_a_letter(lane: Lane, tmp_path: Path) -> None:
    lane.run(lane.ledger.submit([ids_job("j", [1])], 10))
    with serving(lane, tmp_path, max_attempts=2) as engine:
        engine.service.desk.jobs.spec = None  # preparing fails by a fault that is not the job's
        found = ended(lane)
    assert found["j"] == (Status.ERROR, "internal_error")
    (letter,) = lane.run(lane.ledger.dead_letters())
    assert (letter.attempts.errors, letter.attempts.crashes) == (1, 0)


def test_an_urgent_job_goes_before_what_the_engine_has_leased_ahead(lane: Lane, tmp_path: Path) -> None:
    bulk = [ids_job(f"b{i}", [1], 50, priority="bulk") for i in range(30)]
    lane.run(lane.ledger.submit(bulk, 100))
    with serving(lane, tmp_path, rows=2, step_s=0.005, lookahead=10) as engine:
        wait_for(lambda: len(engine.service.desk.held) >= 10)
        lane.run(lane.ledger.submit([ids_job("urgent", [1], 50, priority="interactive")], 100))
        wait_for(lambda: lane.run(lane.ledger.progress("r")).ended == 31)
    assert [c.id for c in lane.results()].index("urgent") <= 6, (
        "not behind the ten that were leased before it"
    )


def test_tenants_do_not_share_cached_prefixes(lane: Lane, tmp_path: Path) -> None:
    prompt = list(range(20, 60))
    with serving(lane, tmp_path):
        for n, tenant in enumerate(("a", "b", "a"), start=1):
            lane.run(lane.ledger.submit([ids_job(f"j{n}", prompt, tenant=tenant)], 10))
            wait_for(lambda n=n: lane.run(lane.ledger.progress("r")).ended == n)
    cached = {c.id: c.usage.cached_tokens for c in lane.results()}
    assert (cached["j1"], cached["j2"]) == (0, 0)
    assert cached["j3"] > 0


@pytest.mark.parametrize(
    "params",
    [{"n": 100_000}, {"max_tokens": 1 << 40}, {"temperature": -1}, {"logprobs": 10_000}, {"seed": 1 << 70},
     {"stop": ["s"] * 1000}, {"logit_bias": {"-1": 1}}, {"top_p": "1"}],
    ids=lambda p: next(iter(p)),
)  # fmt: skip
def test_ceilings_hold_for_what_did_not_come_through_a_client(
    lane: Lane, tmp_path: Path, params: dict[str, object]
) -> None:
    raw = {"v": 1, "id": "j", "run": "r", "lane": "test", "kind": "completion", "prompt_token_ids": [1]}
    lane.redis.xadd(lane.ledger.keys.jobs(Priority.NORMAL), {"m": json.dumps(raw | {"params": params})})
    lane.run(lane.ledger.submit([ids_job("good", [1])], 10))
    with serving(lane, tmp_path):
        found = ended(lane, 2)
    assert found["good"] == (Status.OK, "")
    assert found["j"][0] is Status.ERROR
    assert found["j"][1] in ("invalid_job", "invalid_json")


def test_the_servers_time_replaces_the_machines() -> None:
    clock = ServerClock()
    assert abs(clock.now() - time.time()) < 60
    clock.heard(1000.0)
    assert 1000 <= clock.now() < 1060
