"""`submit(ack=...)` on real servers: it returns once the level is reached, and says so where it cannot be."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import redis

from headrace import durable
from headrace.errors import NotDurable, StoreError
from headrace.keys import Keys
from headrace.sync import SyncClient
from tests.headrace.own_server import started


def client_of(port: int) -> SyncClient:
    return SyncClient(f"redis://127.0.0.1:{port}", "l")


JOB = {"id": "a", "run": "r", "kind": "completion", "prompt": "p"}


def test_fsync_waits_for_the_disk(tmp_path: Path) -> None:
    with started("valkey-9", tmp_path, "--appendfsync", "everysec") as port:
        url = f"redis://127.0.0.1:{port}"
        with SyncClient(url, "l") as client:
            assert client.submit(JOB, ack="fsync") == "a"
            assert client.submit_many([JOB | {"id": str(i)} for i in range(450)], "fsync") == {"new": 450}
            assert client.progress("r").submitted == 451
        server = redis.Redis(port=port)
        pid = server.info()["process_id"]
        os.kill(pid, signal.SIGKILL)
    with started("valkey-9", tmp_path) as port:
        assert redis.Redis(port=port).hlen(Keys("l").marks("r")) == 451


def test_a_disk_that_is_too_slow_is_said_and_may_be_waited_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "WAIT_MS", 100)
    with started("valkey-9", tmp_path, "--appendfsync", "no") as port, client_of(port) as client:
        with pytest.raises(NotDurable, match="submit it again"):
            client.submit(JOB, ack="fsync")
        redis.Redis(port=port).config_set("appendfsync", "always")
        client.submit(JOB, ack="fsync")
        assert client.progress("r").submitted == 1


def test_replica_waits_for_a_second_server(tmp_path: Path) -> None:
    with started("valkey-9", tmp_path / "a") as port, client_of(port) as client:
        with pytest.raises(StoreError, match="has no replica"):
            client.submit(JOB, ack="replica")
        replica_of = ("--replicaof", f"127.0.0.1 {port}")
        with started("valkey-9", tmp_path / "b", *replica_of) as second:
            deadline = time.monotonic() + 20
            while redis.Redis(port=second).info()["master_link_status"] != "up":
                assert time.monotonic() < deadline
                time.sleep(0.05)
            client.submit(JOB | {"id": "b"}, ack="replica")
            assert redis.Redis(port=second).hexists(Keys("l").marks("r"), "b")


def test_a_server_that_cannot_is_one_clear_line(tmp_path: Path) -> None:
    with (
        started("redis-7.0", tmp_path / "old") as port,
        client_of(port) as client,
    ):
        with pytest.raises(StoreError, match="has no WAITAOF: use"):
            client.submit(JOB, ack="fsync")
        with pytest.raises(ValueError, match="ack 'disk' is none of memory"):
            client.submit(JOB, ack="disk")  # type: ignore[arg-type]
        assert client.progress("r").submitted == 1, "it was accepted all the same"


def test_a_server_without_a_file_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_ALLOW_VOLATILE", "1")
    with (
        started("valkey-9", tmp_path, "--appendonly", "no") as port,
        client_of(port) as client,
        pytest.raises(StoreError, match="has no append-only file"),
    ):
        client.submit(JOB, ack="fsync")
