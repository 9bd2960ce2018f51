"""The consumer loop on a real server: acknowledged means durable, whatever happens in between."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import orjson
import pytest

from headrace.connection import connect
from headrace.embedded import EmbeddedServer
from headrace.errors import StoreUnavailable
from headrace.keys import FIELD
from headrace.ledger import Ledger
from headrace.messages import Completion, Status
from headrace.results import Delivered
from headrace.store import Store, Work
from sink.base import Consumer, Tally
from sink.files import SinkError
from sink.jsonl import JsonlTarget

LEDGER = Ledger("lane")
T = TypeVar("T")


def completions(start: int, end: int) -> list[Completion]:
    return [
        Completion(id=f"{i:032x}", run="run", lane="lane", status=Status.ERROR, meta={"custom_id": str(i)})
        for i in range(start, end)
    ]


class Refusing:
    """A store whose disk is full until told otherwise."""

    def __init__(self) -> None:
        self.tally, self.full, self.rows = Tally(), True, list[str]()
        self._staged: list[str] = []

    def recover(self) -> None: ...

    def write(self, batch: list[Completion]) -> None:
        self._staged = [c.id for c in batch if c.id not in self.rows]

    def commit(self) -> None:
        if self.full:
            raise SinkError("no room")
        self.rows += self._staged

    def close(self) -> None: ...


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(tmp_path / "valkey", appendfsync="everysec") as running:
        yield running


@pytest.fixture
def store(server: EmbeddedServer) -> Iterator[Store]:
    store = Store(connect(server.url))
    yield store
    store.close()


def drain(consumer: Consumer) -> None:
    while consumer.step(block_ms=1):
        pass


def lines(path: Path) -> list[str]:
    return [orjson.loads(line)["custom_id"] for line in path.read_bytes().splitlines()]


def test_a_sink_writes_everything_and_leaves_the_stream_empty(store: Store, tmp_path: Path) -> None:
    store.run(LEDGER.reject(completions(0, 1200)))
    target = JsonlTarget(tmp_path / "out.jsonl", tmp_path / "index")
    target.recover()
    consumer = Consumer(store, LEDGER, None, "sink", target)
    drain(consumer)
    target.close()
    assert lines(tmp_path / "out.jsonl") == [str(i) for i in range(1200)]
    assert consumer.lag() == 0
    assert store.run(LEDGER.result_length(None)) == 0


def test_what_could_not_be_written_is_not_acknowledged_and_comes_again(store: Store) -> None:
    store.run(LEDGER.reject(completions(0, 20)))
    target = Refusing()
    with pytest.raises(SinkError):
        Consumer(store, LEDGER, None, "sink", target).step(block_ms=1)
    consumer = Consumer(store, LEDGER, None, "sink", target)  # the process starts again
    target.full = False
    drain(consumer)
    assert target.rows == [c.id for c in completions(0, 20)]
    assert consumer.lag() == 0


def test_rows_written_before_a_crash_but_not_acknowledged_are_not_doubled(
    store: Store, tmp_path: Path
) -> None:
    store.run(LEDGER.reject(completions(0, 30)))
    paths = tmp_path / "out.jsonl", tmp_path / "index"
    target = JsonlTarget(*paths)
    target.recover()
    store.run(LEDGER.ensure_sink(None, "sink"))
    read = store.run(LEDGER.read_results(None, "sink", "sink", 20, 1))
    target.write([Completion.parse(d.raw) for d in read])
    target.commit()
    target.close()  # as if killed here: durable, not acknowledged
    target = JsonlTarget(*paths)
    target.recover()
    consumer = Consumer(store, LEDGER, None, "sink", target)
    drain(consumer)
    target.close()
    assert lines(paths[0]) == [str(i) for i in range(30)]
    assert consumer.lag() == 0


def test_an_entry_that_nobody_can_read_becomes_a_row_and_blocks_nothing(store: Store, tmp_path: Path) -> None:
    stream = LEDGER.keys.results(None)
    store.run(LEDGER.reject(completions(0, 1)))
    store.connections.idempotent.xadd(stream, {FIELD: b"\xff not JSON"})
    store.connections.idempotent.xadd(stream, {"other": "field"})
    store.run(LEDGER.reject(completions(1, 2)))
    target = JsonlTarget(tmp_path / "out.jsonl", tmp_path / "index")
    target.recover()
    consumer = Consumer(store, LEDGER, None, "sink", target)
    drain(consumer)
    target.close()
    rows = [orjson.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()]
    assert [row["error"]["code"] for row in rows] == [
        "error",
        "unreadable_completion",
        "unreadable_completion",
        "error",
    ]
    assert consumer.lag() == 0


class LosesAReply(Store):
    """A store whose first read of new results is executed, but its reply is lost on the way."""

    lost = 0

    def run(self, work: Work[T]) -> T:
        reply = super().run(work)
        if self.lost == 0 and isinstance(reply, list) and reply and isinstance(reply[0], Delivered):
            self.lost = len(reply)
            raise StoreUnavailable("connection reset")
        return reply


def test_entries_of_a_reply_that_was_lost_are_found_again(server: EmbeddedServer, tmp_path: Path) -> None:
    store = LosesAReply(connect(server.url))
    store.run(LEDGER.reject(completions(0, 30)))
    target = JsonlTarget(tmp_path / "out.jsonl", tmp_path / "index")
    target.recover()
    consumer = Consumer(store, LEDGER, None, "sink", target)
    consumer.run(threading.Event(), until_idle_s=0.5)
    target.close()
    assert store.lost == 30
    assert lines(tmp_path / "out.jsonl") == [str(i) for i in range(30)]
    store.close()


def test_a_sink_outlives_lost_connections_and_a_server_that_lost_its_data(tmp_path: Path) -> None:
    folder, out = tmp_path / "valkey", tmp_path / "out.jsonl"
    server = EmbeddedServer(folder)
    url = server.url
    store = Store(connect(url))
    target = JsonlTarget(out, tmp_path / "index")
    target.recover()
    stop = threading.Event()
    thread = threading.Thread(target=Consumer(store, LEDGER, None, "sink", target).run, args=(stop,))
    thread.start()

    def offer(start: int, end: int) -> None:
        store.run(LEDGER.reject(completions(start, end)))
        for _ in range(600):
            if target.tally.total >= end:
                return
            stop.wait(0.05)
        raise AssertionError(target.tally)

    offer(0, 10)
    store.connections.idempotent.client_kill_filter(_type="normal")
    offer(10, 20)
    store.connections.idempotent.flushall()
    offer(20, 30)
    stop.set()
    thread.join(10)
    assert not thread.is_alive()
    store.close()
    server.stop()
    target.close()
    assert lines(out) == [str(i) for i in range(30)]
