"""An engine whose ranks hang goes on answering pings, and must lose its jobs all the same."""

from __future__ import annotations

from collections import Counter

from tests.chaos.bench import LANE, Bench
from tests.chaos.parts import wait_for


def test_an_engine_that_hangs_loses_its_leases(bench: Bench) -> None:
    stuck = bench.engine("--lease-s", "2", "--hang-at", "5")
    bench.submit(20, steps=40)
    wait_for(lambda: bench.server.client.xpending(f"hr:{{{LANE}}}:jobs:normal", "engines")["pending"] == 20)
    bench.engine("--lease-s", "2", "--step-ms", "1")
    assert bench.wait_ended(20, 30).ok == 20
    assert stuck.alive, "it hangs, and its heartbeat goes on"
    assert bench.counts() == Counter(f"j{i}" for i in range(20))
