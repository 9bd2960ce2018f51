"""Real servers for the ledger's tests: the embedded Valkey, and Debian's Redis 7.0 where it is installed."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from headrace.connection import connect
from headrace.embedded import EmbeddedServer
from headrace.keys import GROUP
from headrace.ledger import Ledger
from headrace.messages import Completion, Job, Status, Usage
from headrace.store import Store

LANE = "test"


@contextlib.contextmanager
def debian_redis() -> Iterator[str]:
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not installed (make test installs it where it may)")
    with tempfile.TemporaryDirectory(prefix="hr-") as folder:
        socket = Path(folder) / "redis.sock"
        words = [
            "--port",
            "0",
            "--unixsocket",
            str(socket),
            "--dir",
            folder,
            "--save",
            "",
            "--appendonly",
            "yes",
        ]
        server = subprocess.Popen([binary, *words], stdout=subprocess.DEVNULL)
        try:
            url = f"unix://{socket}"
            deadline = time.monotonic() + 20
            while True:
                with contextlib.suppress(redis.RedisError, OSError):
                    if redis.Redis.from_url(url).ping():
                        break
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield url
        finally:
            server.terminate()
            server.wait()


@contextlib.contextmanager
def embedded() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="hr-") as folder, EmbeddedServer(folder) as server:
        yield server.url


SERVERS = {"valkey-9": embedded, "redis-7.0": debian_redis}


class Lane:
    """A ledger on a server, with the few things that tests do over and over."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.store = Store(connect(url))
        self.ledger = Ledger(LANE)
        self.redis = self.store.connections.idempotent

    def run(self, work):
        return self.store.run(work)

    def submit(self, *ids: str, bound: int = 10_000, **fields: object) -> list[str]:
        return self.run(self.ledger.submit([job(i, **fields) for i in ids], bound))

    def lease(self, consumer: str = "a", count: int = 100) -> list:
        return self.run(self.ledger.lease(consumer, count))

    def finish(self, leased: list, consumer: str = "a", status: Status = Status.OK) -> list[str]:
        return self.run(self.ledger.finish(consumer, [(one, answer(one, status)) for one in leased]))

    def age(self, leased: list, consumer: str) -> None:
        """Make leases look as if they had not been renewed for a minute."""
        for one in leased:
            aged = self.redis.xclaim(one.stream, GROUP, consumer, 0, [one.entry_id], idle=60_000, justid=True)
            assert aged, "it is not there to be aged"

    def sweep(self) -> int:
        """Every lease that was not renewed for half a minute becomes suspect; returns how many."""
        return self.run(self.ledger.reclaim(30_000))

    def results(self, name: str | None = None, group: str = "sink") -> list[Completion]:
        self.run(self.ledger.ensure_sink(name, group))
        return [
            Completion.parse(one.raw) for one in self.run(self.ledger.read_results(name, group, "s", 1000, 1))
        ]


def job(job_id: str, **fields: object) -> Job:
    return Job.build(
        {"id": job_id, "run": "r", "lane": LANE, "kind": "completion", "prompt": job_id, **fields}
    )


def answer(leased, status: Status = Status.OK) -> Completion:
    asked = Job.parse(leased.raw)
    return Completion(
        id=asked.id, run=asked.run, lane=asked.lane, status=status, reply_to=asked.reply_to,
        usage=Usage(prompt_tokens=3, cached_tokens=1, completion_tokens=2),
    )  # fmt: skip


def ids(leased: list) -> list[str]:
    return [Job.parse(one.raw).id for one in leased]
