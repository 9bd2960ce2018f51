"""The order of things on the way to the disk, watched from outside: what the guards of the order rest on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.service.spool import Spool
from headrace.keys import GROUP
from headrace.ledger import Leased
from headrace.messages import Completion, Priority, Status
from sink.base import Consumer
from sink.jsonl import JsonlTarget
from tests.headrace.servers import LANE, SERVERS, Lane


@pytest.fixture
def lane() -> Lane:
    with SERVERS["valkey-9"]() as url:
        yield Lane(url)


class Syncs:
    """Every fsync of a file, with its length and what was pending on the server at that moment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pending: object = lambda: 0) -> None:
        self.seen: dict[str, list[tuple[int, int]]] = {}
        fsync = os.fsync

        def watched(fd: int) -> None:
            fsync(fd)
            path = os.readlink(f"/proc/self/fd/{fd}")
            self.seen.setdefault(path, []).append((os.fstat(fd).st_size, pending()))  # type: ignore[operator]

        monkeypatch.setattr(os, "fsync", watched)


def test_a_row_is_on_the_disk_before_it_is_acknowledged(
    lane: Lane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane.submit("a", "b", "c")
    lane.finish(lane.lease())
    out = tmp_path / "out.jsonl"
    target = JsonlTarget(out, tmp_path / "index")
    target.recover()
    results = lane.ledger.keys.results(None)
    syncs = Syncs(monkeypatch, lambda: lane.redis.xpending(results, "sink")["pending"])
    Consumer(lane.store, lane.ledger, None, "sink", target).step(1)
    assert syncs.seen.get(str(out)) == [(out.stat().st_size, 3)], (
        "all bytes synced while all three were pending"
    )
    assert lane.redis.xlen(results) == 0
    target.close()


def test_a_spooled_completion_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path, "boot", 10_000)
    syncs = Syncs(monkeypatch)
    assert spool.add([(Leased("s", "1-1", b""), Completion(id="a", run="r", lane=LANE, status=Status.OK))])
    assert syncs.seen.get(str(spool.path)) == [(spool.path.stat().st_size, 0)]
    spool.close()


def test_a_renewal_is_no_delivery(lane: Lane) -> None:
    """Other tools read the server's own delivery count; an hour of renewals must not look like poison."""
    lane.submit("a")
    leased = lane.lease()

    def delivered() -> int:
        return lane.redis.xpending_range(lane.ledger.keys.jobs(Priority.NORMAL), GROUP, "-", "+", 10)[0][
            "times_delivered"
        ]

    before = delivered()
    for _ in range(5):
        lane.run(lane.ledger.renew("a", leased))
    assert delivered() == before
