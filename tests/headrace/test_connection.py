"""A server on which a queue would lose jobs is refused, in one line that says what to do; an outage is told
apart from a mistake; what a cancelled caller sent is not taken for somebody else's answer."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import pytest

from headrace.connection import check, connect, connect_async, redacted
from headrace.errors import StoreError, StoreUnavailable
from headrace.ledger import Ledger
from headrace.store import AsyncStore, Call, Store, script
from tests.headrace.servers import Lane, job

GOOD = {"redis_version": "7.0.15", "role": "master", "aof_enabled": 1, "maxmemory_policy": "noeviction"}


@pytest.mark.parametrize(
    ("info", "words"),
    [
        ({"redis_version": "6.2.14"}, "is Redis 6.2.14; headrace needs Redis >= 7.0"),
        ({"redis_version": "7.2.4", "valkey_version": "8.1.0"}, "Valkey 8.1.0; headrace needs Valkey >= 9.0"),
        ({"cluster_enabled": 1}, "cluster node"),
        ({"role": "slave"}, "give the URL of the primary"),
        ({"maxmemory": 1000, "maxmemory_policy": "allkeys-lru"}, "set maxmemory-policy noeviction"),
        ({"aof_enabled": 0}, "set appendonly yes, or pass --allow-volatile"),
    ],
)
def test_an_unsafe_server_is_refused(info: dict[str, Any], words: str) -> None:
    with pytest.raises(StoreError) as caught:
        check({**GOOD, **info}, "redis://host", allow_volatile=False)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_safe_server_is_taken_and_a_volatile_one_where_that_is_accepted() -> None:
    check(GOOD, "redis://host", allow_volatile=False)
    check({**GOOD, "redis_version": "7.2.4", "valkey_version": "9.1.2"}, "redis://host", allow_volatile=False)
    check({**GOOD, "aof_enabled": 0}, "redis://host", allow_volatile=True)


def test_a_real_server_that_evicts_or_forgets_is_refused(lane: Lane) -> None:
    lane.redis.config_set("maxmemory", 1 << 30)
    lane.redis.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(StoreError, match="evicts queued jobs"):
            connect(lane.url)
    finally:
        lane.redis.config_set("maxmemory", 0)
        lane.redis.config_set("maxmemory-policy", "noeviction")
    lane.redis.config_set("appendonly", "no")
    try:
        with pytest.raises(StoreError, match="allow-volatile"):
            asyncio.run(connect_async(lane.url))
        connect(lane.url, allow_volatile=True).close()
    finally:
        lane.redis.config_set("appendonly", "yes")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:secret@host:6379/0", "redis://user:***@host:6379/0"),
        ("rediss://:secret@host", "rediss://:***@host"),
        ("unix://:secret@/tmp/x.sock?db=1", "unix://:***@/tmp/x.sock?db=1"),
        ("unix:///tmp/x.sock?password=secret&db=1", "unix:///tmp/x.sock?password=***&db=1"),
        ("redis://:p@ss:word@host/0", "redis://:***@host/0"),
    ],
)
def test_no_message_shows_a_password(url: str, shown: str) -> None:
    assert redacted(url) == shown


def test_a_server_that_is_not_there_is_one_line(free_port: int) -> None:
    for url in (
        f"redis://:secret@127.0.0.1:{free_port}/0",
        "unix:///nowhere/x.sock",
        "redis://no.such.host.invalid",
    ):
        with pytest.raises(StoreError, match="cannot reach Redis at") as caught:
            connect(url)
        assert "secret" not in str(caught.value)
        assert "\n" not in str(caught.value)
    for url in ("localhost:6379", "http://localhost", "", "redis://host:port"):
        with pytest.raises(StoreError, match="is not a Redis URL"):
            connect(url)


def test_a_wrong_password_is_told_apart_from_an_outage(lane: Lane) -> None:
    lane.redis.config_set("requirepass", "right")
    try:
        with pytest.raises(StoreError, match="check the user and password"):
            connect(lane.url)
        with pytest.raises(StoreError, match="check the user and password"):
            connect(f"{lane.url}?password=wrong")
        connect(f"{lane.url}?password=right").close()
    finally:
        lane.redis.config_set("requirepass", "")


def test_a_reply_that_is_lost_is_asked_for_again_where_that_is_harmless(lane: Lane) -> None:
    """The proxy cuts the line after the server executed the first submit."""
    for name in ("submit", "lease"):  # or the first sending is a question for the script, and runs nothing
        lane.redis.script_load(script(name).source)
    with Proxy(lane.url.removeprefix("unix://")) as proxy:
        store = Store(connect(proxy.url))
        proxy.cut_after = b"job-1"
        assert store.run(lane.ledger.submit([job("job-1")], 10)) == ["queued"], "the second sending found it"
        assert lane.run(lane.ledger.jobs_waiting()) == 1
        proxy.cut_after = b"engines\r\n$1\r\na"
        with pytest.raises(StoreUnavailable):
            store.run(lane.ledger.lease("a", 5))
        assert [one.failed for one in store.run(lane.ledger.held_by("a"))] == [0], "handed over, not lost"
        store.close()


def test_a_cancelled_caller_leaves_the_connection_in_step(lane: Lane) -> None:
    async def main() -> None:
        store = AsyncStore(await connect_async(lane.url))
        ledger = Ledger("test")
        wait: Call[Any] = Call(lambda r: r, None, (), ("BLPOP", "nothing", 0.3), "once")
        task = asyncio.create_task(store.run(wait))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        answers = await asyncio.gather(*(store.run(ledger.kept(f"k{i}")) for i in range(20)))
        assert answers == [f"v{i}".encode() for i in range(20)]
        await store.close()

    for i in range(20):
        lane.redis.set(lane.ledger.keys.kept(f"k{i}"), f"v{i}")
    asyncio.run(main())


@pytest.fixture
def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Proxy:
    """Passes bytes between one TCP port and a unix socket. A request that holds `cut_after` still reaches the
    server; then the client's line is cut, once, before the reply."""

    def __init__(self, path: str) -> None:
        self.path, self.cut_after = path, b""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as server:
            server.connect(self.path)
            while data := client.recv(1 << 16):
                server.sendall(data)
                reply = server.recv(1 << 16)  # executed by now
                if self.cut_after and self.cut_after in data:
                    self.cut_after = b""
                    return
                client.sendall(reply)
