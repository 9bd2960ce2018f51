"""SIGTERM: what fits into the grace time is finished, the rest goes back unspent; twice: all at once."""

from __future__ import annotations

import dataclasses
import signal
import time
from collections import Counter

import orjson

from headrace.connection import connect
from headrace.ledger import Attempts, Ledger
from headrace.messages import Priority
from headrace.store import Store
from tests.chaos.bench import LANE, Bench
from tests.chaos.parts import EngineProcess, job, wait_for


def exits(engine: EngineProcess, seconds: float) -> None:
    assert engine.process is not None
    assert engine.process.wait(seconds) == 0, engine.said()


def running(bench: Bench, n: int) -> None:
    """Until the engine has all of them in its rows, past their first token."""
    wait_for(lambda: bench.server.client.xpending(f"hr:{{{LANE}}}:jobs:normal", "engines")["pending"] == n)
    time.sleep(0.3)


def attempts_spent(bench: Bench) -> dict[bytes, bytes]:
    """Entries with a delivery that counts against them; having been handed back does not."""
    kept = bench.server.client.hgetall(Ledger(LANE).keys.attempts)
    parsed = {entry: Attempts.parse(raw) for entry, raw in kept.items()}
    return {entry: kept[entry] for entry, a in parsed.items() if a.crashes or a.errors}


def test_a_drain_finishes_what_fits_and_spends_no_attempt(bench: Bench) -> None:
    engine = bench.engine("--step-ms", "10", "--drain-s", "3", "--rows", "64")
    bench.submit(10, steps=80)
    bench.submit(10, steps=1500, first=10)
    running(bench, 20)
    bench.submit(30, first=20)
    engine.signal(signal.SIGTERM)
    exits(engine, 60)
    done = {c.id for c in bench.completions()}
    assert {f"j{i}" for i in range(10)} <= done
    assert done.isdisjoint(f"j{i}" for i in range(10, 20))
    assert attempts_spent(bench) == {}
    store = Store(connect(bench.server.url))
    left = 50 - len(done)
    leased = store.run(Ledger(LANE).lease("next", 100))
    assert (len(leased), {one.failed for one in leased}) == (left, {0}), "at once, not when a lease runs out"
    store.close()


def test_a_second_sigterm_hands_back_at_once(bench: Bench) -> None:
    engine = bench.engine("--step-ms", "10", "--drain-s", "60")
    bench.submit(20, steps=1500)
    running(bench, 20)
    engine.signal(signal.SIGTERM)
    wait_for(lambda: "state=draining" in engine.said(), 10)
    engine.signal(signal.SIGTERM)
    exits(engine, 50)  # less than the drain time
    assert bench.progress().ended == 0
    assert attempts_spent(bench) == {}
    store = Store(connect(bench.server.url))
    assert len(store.run(Ledger(LANE).lease("next", 100))) == 20
    assert store.run(Ledger(LANE).engines()) == {}, "it took its name off the list"
    store.close()


def test_engines_replaced_one_after_the_other_answer_every_job_once(bench: Bench) -> None:
    engines = [bench.engine("--step-ms", "2", "--drain-s", "1") for _ in range(2)]
    bench.submit(400, steps=30)
    for old in engines:
        new = bench.engine("--step-ms", "2", "--drain-s", "1")
        old.signal(signal.SIGTERM)
        exits(old, 60)
        assert new.alive
    assert bench.wait_ended(400).ok == 400
    assert bench.counts() == Counter(f"j{i}" for i in range(400))
    assert {c.attempts for c in bench.completions()} == {1}


def test_a_job_of_the_next_version_waits_for_an_engine_that_reads_it(bench: Bench) -> None:
    """An engine of version N beside one of N + 1: the older one hands back what it cannot read, unspent."""
    old = bench.engine()
    next_version = job("new", LANE, steps=5).model_dump(mode="json", exclude_defaults=True) | {"v": 2}
    store, ledger = Store(connect(bench.server.url)), Ledger(LANE)
    bench.submit(5, steps=5)
    stream = ledger.keys.jobs(Priority.NORMAL)
    newer = _as_a_newer_client_submits(bench, orjson.dumps(next_version))
    bench.wait_ended(5)
    wait_for(lambda: bench.server.client.zcard(ledger.keys.later) == 1, 20, old.said)
    assert bench.progress().ended == 5, "not answered as an error, not a dead letter"
    assert bench.server.client.xlen(ledger.keys.dead) == 0
    assert [entry for entry, _ in bench.server.client.xrange(stream)] == [newer]
    (held,) = bench.server.client.zrange(ledger.keys.later, 0, -1)
    bench.server.client.zadd(ledger.keys.later, {held: 1})  # half a minute later
    old.kill()
    (leased,) = store.run(ledger.lease("version-2", 10))
    assert (leased.entry_id.encode(), leased.failed) == (newer, 0)
    store.close()


def _as_a_newer_client_submits(bench: Bench, raw: bytes) -> bytes:
    """The submit script of this version with the next version's payload: only the envelope differs."""
    store, ledger = Store(connect(bench.server.url)), Ledger(LANE)
    (call,) = [next(ledger.submit([job("new", LANE, steps=5)], 100))]
    store.run(dataclasses.replace(call, args=(*call.args[:-1], raw)))
    store.close()
    return bench.server.client.xrevrange(ledger.keys.jobs(Priority.NORMAL), count=1)[0][0]
