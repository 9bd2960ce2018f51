"""Who is served next, on real servers: by priority, tenant, run and order, counted in estimated tokens."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from headrace.ledger import INLINE_BYTES, estimated_tokens
from headrace.messages import Job
from tests.headrace.servers import Lane, ids, job


def load(lane: Lane, run: str, n: int, tokens: int = 100, **fields: object) -> None:
    jobs = [job(f"{run}-{i}", run=run, params={"max_tokens": tokens}, **fields) for i in range(n)]
    assert lane.run(lane.ledger.submit(jobs, 100_000)) == ["new"] * n


def served(lane: Lane, n: int, at_once: int = 8) -> list[Job]:
    """The next jobs, in order, as an engine leases them whose rows end one after another."""
    out: list[Job] = []
    while len(out) < n:
        leased = lane.lease("e", at_once)
        assert leased
        out += [Job.parse(one.raw) for one in leased]
        lane.finish(leased, "e")
    return out[:n]


def tokens_of(jobs: list[Job], key: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for one in jobs:
        total[str(getattr(one, key))] += estimated_tokens(one, len(one.to_bytes()))
    return total


def within(share: float, of: float, tolerance: float = 0.1) -> bool:
    return abs(share - of) <= tolerance * of


def test_priorities_share_tokens_by_weight_and_none_starves(lane: Lane) -> None:
    for priority in ("interactive", "normal", "bulk"):
        load(lane, priority, 900, priority=priority)
    got = tokens_of(served(lane, 840), "priority")
    assert within(got["interactive"] / got["bulk"], 16), got
    assert within(got["normal"] / got["bulk"], 4), got


def test_an_urgent_job_overtakes_a_backlog(lane: Lane) -> None:
    load(lane, "night", 500, priority="bulk")
    served(lane, 200)
    load(lane, "ask", 1, priority="interactive")
    assert served(lane, 8)[0].run == "ask"


def test_a_priority_that_had_nothing_to_do_has_no_claim_to_the_past(lane: Lane) -> None:
    load(lane, "day", 2000, priority="normal")
    served(lane, 1000)
    load(lane, "night", 500, priority="bulk")
    got = tokens_of(served(lane, 500), "priority")
    assert within(got["normal"] / got["bulk"], 4), got


def test_a_noisy_run_leaves_a_quiet_one_its_share(lane: Lane) -> None:
    load(lane, "noisy", 2000)
    load(lane, "quiet", 20)
    assert Counter(one.run for one in served(lane, 40))["quiet"] in range(18, 21)


def test_a_run_that_comes_late_has_no_claim_to_what_others_had(lane: Lane) -> None:
    load(lane, "early", 500)
    served(lane, 200)
    load(lane, "late", 200)
    assert Counter(one.run for one in served(lane, 80))["late"] in range(36, 45)


def test_runs_share_tokens_and_not_jobs(lane: Lane) -> None:
    load(lane, "long", 200, tokens=1000)
    load(lane, "short", 1000, tokens=50)
    got = tokens_of(served(lane, 500), "run")
    assert within(got["long"] / got["short"], 1), got


def test_tenants_share_evenly_however_many_runs_they_have(lane: Lane) -> None:
    for i in range(5):
        load(lane, f"many-{i}", 200, tenant="many")
    load(lane, "only", 200, tenant="one")
    load(lane, "nobodys", 200)
    jobs = served(lane, 300)
    got = tokens_of(jobs, "tenant")
    assert within(got["many"] / got["one"], 1), got
    assert within(got["None"] / got["one"], 1), got
    runs = tokens_of([one for one in jobs if one.tenant == "many"], "run")
    assert len(runs) == 5
    assert max(runs.values()) <= 1.3 * min(runs.values()), "and their runs share what is theirs"


def test_within_a_run_submit_order_stays_whatever_comes_back(lane: Lane) -> None:
    load(lane, "r", 30)
    first = lane.lease("x", 10)
    second = lane.lease("y", 10)
    lane.run(lane.ledger.release("x", first))
    again = lane.lease("w", 1)
    assert ids(again) == ["r-0"], "the others of its ten are back in line now"
    lane.run(lane.ledger.release("y", second[5:]))
    lane.run(lane.ledger.release("w", again))
    lane.run(lane.ledger.release("y", second[:5]))
    assert ids(lane.lease("z", 30)) == [f"r-{i}" for i in range(30)]


def test_neighbours_stay_together_where_runs_take_turns(lane: Lane) -> None:
    """Prompts that begin alike are submitted one after another; an engine should see them so."""
    for run in ("a", "b"):
        load(lane, run, 100)
    runs = [Job.parse(one.raw).run for one in lane.lease("e", 64)]
    turns = 1 + sum(one != other for one, other in pairwise(runs))
    assert turns <= 8


def test_jobs_of_blocked_runs_stay_where_they_are(lane: Lane) -> None:
    load(lane, "full", 50)
    load(lane, "other", 3, tenant="t")
    assert {Job.parse(one.raw).run for one in lane.run(lane.ledger.lease("e", 40, {"full"}))} == {"other"}
    assert lane.run(lane.ledger.wait_for_jobs("e", 40, 20, {"full"})) == []
    assert len(lane.lease("e", 40)) == 40


def test_what_is_written_by_hand_is_served_as_well(lane: Lane) -> None:
    lane.submit("a", "b")
    stream = lane.ledger.keys.jobs(job("x").priority)
    lane.redis.xadd(stream, {"m": job("hand").to_bytes()})
    assert lane.submit("c") == ["new"]
    assert sorted(ids(lane.lease("e", 10))) == ["a", "b", "c", "hand"]
    lane.redis.xadd(stream, {"m": job("more").to_bytes()})
    assert ids(lane.lease("e", 10)) == ["more"]


@pytest.mark.parametrize("how", ["finish", "release", "crash"])
def test_a_large_job_is_kept_beside_its_entry_until_it_ends(lane: Lane, how: str) -> None:
    large = "x" * (INLINE_BYTES + 1)
    lane.submit("large", prompt=large)
    lane.submit("small")
    (entry, fields) = lane.redis.xrange(lane.ledger.keys.jobs(job("x").priority))[0]
    assert b"m" not in fields
    beside = f"{lane.ledger.keys.jobs(job('x').priority)}#{entry.decode()}"
    assert lane.redis.strlen(beside) > INLINE_BYTES
    leased = lane.lease("e", 1)
    assert Job.parse(leased[0].raw).prompt == large
    assert lane.run(lane.ledger.held_by("e")) == leased
    if how == "release":
        lane.run(lane.ledger.release("e", leased))
        leased = lane.lease("e", 1)
    elif how == "crash":
        lane.run(lane.ledger.release_dead("e"))
        leased = lane.lease("e", 1)
    assert Job.parse(leased[0].raw).prompt == large
    lane.finish(leased, "e")
    assert lane.redis.keys("*#*") == []
    assert ids(lane.lease("e")) == ["small"]
