"""What an engine does while its server is away: it goes on with what it holds, keeps what it finishes on the
disk, says little, and commits everything once the server is back; also when it died in between."""

from __future__ import annotations

import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from engine.service.spool import Spool, left_behind, spool_folder
from headrace.ledger import Leased
from headrace.messages import Completion, Status
from tests.chaos.bench import LANE, Bench
from tests.chaos.parts import wait_for


def once_each(n: int) -> Counter[str]:
    return Counter(f"j{i}" for i in range(n))


def spooled(bench: Bench) -> int:
    return sum(f.read_bytes().count(b"\n") for f in bench.folder.glob("spool/*/*.spool"))


def test_completions_made_while_the_server_is_away_are_committed_when_it_is_back(bench: Bench) -> None:
    engine = bench.engine("--step-ms", "20")
    bench.submit(40, steps=40)
    wait_for(lambda: bench.server.client.xpending(_stream(), "engines")["pending"] == 40)
    bench.server.kill()
    wait_for(lambda: spooled(bench) == 40, 20, engine.said)
    assert bench.log_lines_in(engine, 2) <= 3, "no hot loop"
    bench.server.start()
    assert bench.wait_ended(40).ok == 40
    assert bench.counts() == once_each(40)
    assert {c.attempts for c in bench.completions()} == {1}, "nothing was run again"
    wait_for(lambda: spooled(bench) == 0, 5)
    bench.submit(10, first=40)
    bench.wait_ended(50)


def test_an_engine_killed_in_an_outage_leaves_its_completions_to_the_next(bench: Bench) -> None:
    engine = bench.engine("--step-ms", "5")
    bench.submit(20, steps=40)
    wait_for(lambda: bench.server.client.xpending(_stream(), "engines")["pending"] == 20)
    bench.server.kill()
    wait_for(lambda: spooled(bench) == 20, 20, engine.said)
    engine.kill()
    bench.server.start()
    next_engine = bench.engine()
    assert "done=20 fenced=0" in next_engine.said()
    assert bench.wait_ended(20).ok == 20
    assert bench.counts() == once_each(20)
    assert {c.attempts for c in bench.completions()} == {1}


def test_a_spool_that_comes_too_late_is_fenced(bench: Bench) -> None:
    """Another engine took the leases over while the first one's completions lay on its disk."""
    bench.engine("--step-ms", "5", "--lease-s", "1")
    bench.submit(10, steps=40)
    wait_for(lambda: bench.server.client.xpending(_stream(), "engines")["pending"] == 10)
    bench.server.kill()
    wait_for(lambda: spooled(bench) == 10, 20)
    bench.engines[0].kill()
    bench.server.start()
    mine, other = bench.folder / "spool", bench.folder / "elsewhere"
    mine.rename(other)
    bench.engine("--lease-s", "1")
    bench.wait_ended(10)
    other_name = next(other.glob("*"))
    for file in other_name.glob("*.spool"):
        file.rename(next(mine.glob("*")) / file.name)
    assert "done=0 fenced=10" in bench.engine().said()
    assert bench.counts() == once_each(10)


@pytest.mark.parametrize("fault", ["restart", "kill_clients", "pause", "flush_scripts"])
def test_an_engine_goes_on_after(bench: Bench, fault: str) -> None:
    engine = bench.engine("--step-ms", "2")
    bench.submit(100)
    client = bench.server.client
    if fault == "restart":
        bench.server.kill()
        time.sleep(1)
        bench.server.start()
    elif fault == "kill_clients":
        for _ in range(3):
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            time.sleep(0.3)
    elif fault == "pause":
        client.execute_command("CLIENT", "PAUSE", "3000", "ALL")
        time.sleep(3)
    else:
        client.script_flush()
    bench.submit(50, first=100)
    bench.wait_ended(150)
    assert bench.counts() == once_each(150)
    assert engine.alive
    assert "Traceback" not in engine.said()


def test_a_wiped_server_is_said_once_and_jobs_given_again_run_once(bench: Bench) -> None:
    engine = bench.engine("--step-ms", "20", "--lease-s", "2")
    bench.submit(60, steps=100)
    wait_for(lambda: bench.server.client.xpending(_stream(), "engines")["pending"] == 60)
    bench.server.client.flushall()
    assert bench.log_lines_in(engine, 3) <= 10
    bench.submit(60, steps=10)
    assert bench.wait_ended(60).ok == 60
    assert bench.counts() == once_each(60)
    assert "queue_groups_made" in engine.said()


def test_a_full_server_is_drained_and_takes_jobs_again(bench: Bench) -> None:
    client = bench.server.client
    bench.submit(50)
    client.config_set("maxmemory", client.info("memory")["used_memory"])
    assert bench.submit(50, first=50) == ["full"] * 50
    bench.engine("--step-ms", "1")
    assert bench.wait_ended(50).ok == 50, "finishing works on a full server"
    client.config_set("maxmemory", 0)
    bench.submit(50, first=50)
    bench.wait_ended(100)
    assert bench.counts() == once_each(100)


def test_an_engine_that_drains_in_an_outage_leaves_its_spool(bench: Bench) -> None:
    engine = bench.engine("--step-ms", "5")
    bench.submit(10, steps=40)
    wait_for(lambda: bench.server.client.xpending(_stream(), "engines")["pending"] == 10)
    bench.server.kill()
    wait_for(lambda: spooled(bench) == 10, 20)
    engine.signal(signal.SIGTERM)
    assert engine.process is not None
    assert engine.process.wait(30) == 0
    assert "left_in_spool" in engine.said()
    assert spooled(bench) == 10


def test_a_spool_is_bounded_and_survives_a_torn_end(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "boot", limit=2000)
    ids = [(f"1-{i}", f"c{i}") for i in range(5)]
    items = [
        (Leased("s", entry, b""), Completion(id=c, run="r", lane=LANE, status=Status.OK)) for entry, c in ids
    ]
    assert spool.add(items)
    assert list(left_behind(tmp_path)) == [], "its engine lives"
    assert not spool.add(items * 10), "over its limit"
    spool.close()
    with open(spool.path, "ab") as f:
        f.write(b'{"stream": "s", "ent')
    ((engine, read),) = left_behind(tmp_path)
    assert (engine, [(one.entry_id, c.id) for one, c in read]) == ("boot", ids)
    assert not spool.path.exists()
    spool = Spool(tmp_path, "next", 2000)
    spool.add(items)
    spool.clear()
    spool.close()
    assert list(tmp_path.iterdir()) == [], "an empty spool leaves no file"


def test_servers_and_lanes_have_spools_of_their_own() -> None:
    folders = {spool_folder("/x", url, lane) for url in ("redis://a", "redis://b") for lane in ("l", "m")}
    assert len(folders) == 4


def _stream() -> str:
    return f"hr:{{{LANE}}}:jobs:normal"
