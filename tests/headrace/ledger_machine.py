"""Any order of submits, leases, losses, crashes, cancels and ends, against a model in memory that is
five lines of rules: a job is accepted once, one consumer holds it, only the holder ends it, it ends once, and
what was in flight at a crash is handed out in halves, alone."""

from __future__ import annotations

from collections import Counter

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from headrace.keys import GROUP
from headrace.leases import PROOF
from headrace.messages import Completion, Job, Priority, Status
from tests.headrace.machine_jobs import (
    ENDS,
    ENGINES,
    JOBS,
    LATER,
    PRIORITIES,
    SUSPECT,
    UNREAD,
    WAITING,
    flow_of,
    job_of,
    priority_of,
)  # fmt: skip
from tests.headrace.servers import Lane, answer


class LedgerMachine(RuleBasedStateMachine):
    """`owner`: who holds a job. `seen`: what an engine believes to hold. `groups`: suspects, in order."""

    lane: Lane

    def __init__(self) -> None:
        super().__init__()
        self.lane.redis.flushall()
        self.owner: dict[str, str] = {}
        self.ended: dict[str, Status] = {}
        self.crashes: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.proven: set[str] = set()
        self.cancelled: set[str] = set()
        self.cancelled_runs: set[str] = set()
        self.groups: list[list[str]] = []
        self.groupless: set[Priority] = set()
        self.order: list[str] = []
        self.seen: dict[str, dict[str, object]] = {"e0": {}, "e1": {}, "e2": {}}

    def took(self, engine: str, leased: list) -> list[str]:
        jobs = [Job.parse(one.raw) for one in leased]
        names = [job.id for job in jobs]
        for job, one in zip(jobs, leased, strict=True):
            assert job == job_of(job.id, self.lane)
            self.owner[job.id] = engine
            self.seen[engine][job.id] = one
            tries = one.attempts
            assert (tries.crashes, tries.errors) == (self.crashes[job.id], self.errors[job.id])
            assert tries.proven == (job.id in self.proven)
            assert one.cancelled == self.is_cancelled(job.id)
        return names

    def is_cancelled(self, name: str) -> bool:
        return name in self.cancelled or flow_of(name)[0] in self.cancelled_runs

    def held(self, engine: str) -> list[str]:
        return [n for n, o in self.owner.items() if o == engine]

    def crash(self, engine: str, names: list[str], alone: bool) -> None:
        for name in names:
            self.crashes[name] += 1
            if alone and self.crashes[name] >= PROOF:
                self.proven.add(name)
            self.owner[name] = LATER if name in self.proven else SUSPECT
        half = (len(names) + 1) // 2
        halves = [[n for n in part if n not in self.proven] for part in (names[:half], names[half:])]
        self.groups += [part for part in halves if part]

    def behind(self, priority: Priority) -> bool:
        unread = any(o == UNREAD and priority_of(n) is priority for n, o in self.owner.items())
        return unread or priority in self.groupless

    @initialize(n=st.integers(0, 12))
    def some_jobs(self, n: int) -> None:
        self.submit([f"j{i}" for i in range(n)], 100)

    @rule(names=st.lists(JOBS, max_size=4), bound=st.sampled_from([3, 100]))
    def submit(self, names: list[str], bound: int) -> None:
        expected = []
        for name in names:
            urgent = PRIORITIES[: PRIORITIES.index(priority_of(name)) + 1]
            if name in self.ended:
                expected.append(self.ended[name].value)
            elif name in self.owner:
                expected.append("queued")
            elif sum(priority_of(other) in urgent for other in self.owner) >= bound:
                expected.append("full")
            else:
                self.owner[name] = UNREAD if self.behind(priority_of(name)) else WAITING
                self.order.append(name)
                expected.append("new")
        jobs = [job_of(name, self.lane) for name in names]
        assert self.lane.run(self.lane.ledger.submit(jobs, bound)) == expected

    @rule(engine=ENGINES, count=st.integers(1, 5), lost=st.booleans())
    def lease(self, engine: str, count: int, lost: bool) -> None:
        idle = not self.held(engine)
        unread = [
            n for p in PRIORITIES for n in self.order if self.owner.get(n) == UNREAD and priority_of(n) is p
        ]
        names = self.took(engine, self.lane.lease(engine, count))
        left = count
        for priority in PRIORITIES:
            if left > 0:
                self.groupless.discard(priority)
            left -= sum(priority_of(n) is priority for n in unread)
        assert names[: len(unread)] == unread[:count]
        if idle and self.groups and not unread:
            group, rest = self.groups[0][:count], self.groups[0][count:]
            assert names == group, "suspects come first, and alone"
            self.groups = [rest, *self.groups[1:]] if rest else self.groups[1:]
        else:
            ready = {n for n, o in self.owner.items() if o in (WAITING, LATER)} | set(names)
            ready |= {n for n in unread if n not in names}
            assert len(names) == min(count, len(ready))
            for flow in {(flow_of(n), priority_of(n)) for n in names}:
                of_flow = [n for n in self.order if n in ready and (flow_of(n), priority_of(n)) == flow]
                mine = [n for n in names if (flow_of(n), priority_of(n)) == flow]
                assert mine == of_flow[: len(mine)], "within a flow, submit order"
            for name, owner in self.owner.items():  # what is due
                self.owner[name] = WAITING if owner == LATER else owner
        if lost:  # the reply never came: the engine asks what it was handed
            held = self.lane.run(self.lane.ledger.held_by(engine))
            assert sorted(self.took(engine, held)) == sorted(self.held(engine))

    @rule(engine=ENGINES, status=ENDS, data=st.data())
    def finish(self, engine: str, status: Status, data: st.DataObject) -> None:
        if not self.seen[engine]:
            return
        names = data.draw(st.lists(st.sampled_from(sorted(self.seen[engine])), max_size=4))
        expected = []
        items = [(self.seen[engine][n], answer(self.seen[engine][n], status)) for n in names]
        for name in names:
            if name in self.ended:
                expected.append("duplicate")
            elif self.owner[name] != engine:
                expected.append("fenced")
            elif self.is_cancelled(name):
                expected.append("cancelled")
            else:
                self.end(name, status)
                expected.append("done")
        assert self.lane.run(self.lane.ledger.finish(engine, items)) == expected
        for name in set(names):
            if self.owner.get(name) == engine:  # it is to be finished as what it is
                one = self.seen[engine][name]
                done = answer(one, Status.CANCELLED)
                self.end(name, Status.CANCELLED)
                assert self.lane.run(self.lane.ledger.finish(engine, [(one, done)])) == ["done"]

    def end(self, name: str, status: Status) -> None:
        self.ended[name] = status
        del self.owner[name]

    @rule(engine=ENGINES)
    def release(self, engine: str) -> None:
        mine = self.held(engine)
        believed = self.seen[engine]
        assert self.lane.run(self.lane.ledger.release(engine, list(believed.values()))) == len(mine)
        together = [n for n in believed if n in mine and self.crashes[n] and n not in self.proven]
        self.groups = ([together] if together else []) + self.groups
        for name in mine:
            self.owner[name] = SUSPECT if name in together else LATER

    @rule(engine=ENGINES, data=st.data())
    def retry(self, engine: str, data: st.DataObject) -> None:
        """A wait of a millisecond: it is due at once, and the job in its old place."""
        if not self.held(engine):
            return
        name = data.draw(st.sampled_from(sorted(self.held(engine))))
        one = self.seen[engine][name]
        assert self.lane.run(self.lane.ledger.retry(engine, one, within_s=0)) == 1
        assert self.lane.run(self.lane.ledger.retry(engine, one, within_s=0)) == 0
        self.lane.redis.zadd(self.lane.ledger.keys.later, self.due_now())
        self.errors[name] += 1
        self.owner[name] = LATER

    def due_now(self) -> dict[bytes, int]:
        return dict.fromkeys(self.lane.redis.zrange(self.lane.ledger.keys.later, 0, -1), 0)

    @rule(engine=ENGINES)
    def renew(self, engine: str) -> None:
        believed = self.seen[engine]
        lost = self.lane.run(self.lane.ledger.renew(engine, list(believed.values())))
        assert lost == [one for name, one in believed.items() if self.owner.get(name) != engine]

    @rule(engine=ENGINES, data=st.data())
    def leases_run_out(self, engine: str, data: st.DataObject) -> None:
        """Some of an engine's leases were not renewed for a minute."""
        mine = self.held(engine)
        late = [n for n in mine if data.draw(st.booleans())]
        for name in late:
            self.lane.age([self.seen[engine][name]], engine)
        assert self.lane.sweep() == len(late)
        self.crash(engine, self.in_stream_order(late), alone=len(mine) == 1)

    @rule(engine=ENGINES)
    def die(self, engine: str) -> None:
        mine = self.held(engine)
        assert self.lane.run(self.lane.ledger.release_dead(engine)) == len(mine)
        self.crash(engine, self.in_stream_order(mine), alone=len(mine) == 1)

    def in_stream_order(self, names: list[str]) -> list[str]:
        return sorted(names, key=lambda n: (PRIORITIES.index(priority_of(n)), self.order.index(n)))

    @rule(name=JOBS)
    def cancel(self, name: str) -> None:
        (word,) = self.lane.run(self.lane.ledger.cancel(flow_of(name)[0], [name]))
        if name in self.ended:
            assert word == self.ended[name].value
        elif name in self.owner:
            assert word == "cancelling"
            self.cancelled.add(name)
        else:
            assert word == "unknown"

    @rule(run=st.sampled_from(["r0", "r1"]))
    def cancel_run(self, run: str) -> None:
        waiting = [n for n, o in self.owner.items() if o in (WAITING, LATER) and flow_of(n)[0] == run]
        assert self.lane.run(self.lane.ledger.cancel_run(run)) == ["cancelling"]
        assert self.lane.run(self.lane.ledger.end_waiting(run)) == len(waiting)
        self.cancelled_runs.add(run)
        for name in waiting:
            self.end(name, Status.CANCELLED)

    @rule()
    def scripts_are_lost(self) -> None:
        self.lane.redis.script_flush()

    @rule(data=st.data())
    def a_list_is_lost(self, data: st.DataObject) -> None:
        """By hand, say. The next look finds what nothing would hand out."""
        lists = sorted(k for k in self.lane.redis.keys("hr:*:jobs:*/*") if not k.endswith(b"/"))
        lists = [k for k in lists if not self.behind(Priority(k.decode().split(":")[3].split("/")[0]))]
        if lists:
            self.lane.redis.delete(data.draw(st.sampled_from(lists)))
            waiting = sum(owner == WAITING for owner in self.owner.values())
            assert 0 < self.lane.run(self.lane.ledger.heal()) <= waiting
        assert self.lane.run(self.lane.ledger.heal()) == 0

    @rule(priority=st.sampled_from(PRIORITIES))
    def a_group_is_lost(self, priority: Priority) -> None:
        """XGROUP DESTROY: leases and lists of the stream are void; its entries are read from the first."""
        stream = self.lane.ledger.keys.jobs(priority)
        if self.lane.redis.exists(stream):
            self.lane.redis.xgroup_destroy(stream, GROUP)
            for name in self.owner:
                if priority_of(name) is priority:
                    self.owner[name] = UNREAD
            self.groupless.add(priority)
            self.groups = [
                left for g in self.groups if (left := [n for n in g if priority_of(n) is not priority])
            ]

    @invariant()
    def each_end_came_out_once(self) -> None:
        raw = self.lane.redis.xrange(self.lane.ledger.keys.results(None))
        out = [Completion.parse(fields[b"m"]) for _, fields in raw]
        assert Counter((c.id, c.status) for c in out) == Counter(self.ended.items())

    @invariant()
    def counters_and_streams_agree(self) -> None:
        runs = [self.lane.run(self.lane.ledger.progress(run)) for run in ("r0", "r1")]
        assert sum(p.submitted for p in runs) == len(self.owner) + len(self.ended)
        ends = Counter(status.value for status in self.ended.values())
        for status in ("ok", "error", "dead", "cancelled"):
            assert sum(getattr(p, status) for p in runs) == ends[status]
        assert self.lane.run(self.lane.ledger.jobs_waiting()) == len(self.owner)

    def teardown(self) -> None:
        """Whatever happened, what is left can be run to its end, and nothing stays behind."""
        redis, keys = self.lane.redis, self.lane.ledger.keys
        for engine in self.seen:
            self.lane.run(self.lane.ledger.release_dead(engine))
        while leased := self.lane.lease("last", 3):
            cancelled = [one for one in leased if one.cancelled]
            others = [one for one in leased if not one.cancelled]
            assert set(self.lane.finish(cancelled, "last", Status.CANCELLED)) <= {"done"}
            assert set(self.lane.finish(others, "last")) <= {"done"}
        out = [Completion.parse(f[b"m"]).id for _, f in redis.xrange(keys.results(None))]
        assert sorted(out) == sorted([*self.ended, *self.owner])
        assert self.lane.lease("last") == []
        left = {k.decode().removeprefix("hr:{test}:") for k in redis.keys("*")}
        left = {k for k in left if not k.startswith(("marks:", "run:"))}
        streams = {f"jobs:{p.value}" for p in Priority}
        assert left <= {"runs", "results:default", "crashes", "cancels", "jobs:shares", *streams}
        for priority in Priority:
            if redis.exists(keys.jobs(priority)):
                assert redis.xpending(keys.jobs(priority), GROUP)["pending"] == 0
