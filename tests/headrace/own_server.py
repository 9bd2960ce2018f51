"""A server with settings of a test's own, on a TCP port: Debian's Redis or the embedded Valkey's binary."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from headrace.embedded import _binary

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy" / "redis"
USERS = ("producer", "engine", "sink", "admin")


def binaries() -> dict[str, str | None]:
    return {"valkey-9": _binary(), "redis-7.0": shutil.which("redis-server")}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def started(name: str, folder: Path, *words: str, probe: str | None = None) -> Iterator[int]:
    """The server `name` with more settings, until the block ends; yields its port. `probe`: its URL."""
    binary = binaries()[name]
    if binary is None:
        pytest.skip(f"{name} is not installed")
    folder.mkdir(exist_ok=True)
    port = free_port()
    words = tuple(word.replace("PORT", str(port)) for word in words)
    command = [binary, *words] if "--port" in words or (words[:1] and words[0].endswith(".conf")) else [
        binary, "--port", str(port), "--bind", "127.0.0.1", "--appendonly", "yes", "--save", "", *words,
    ]  # fmt: skip
    command += ["--dir", str(folder)]
    log = open(folder / "server.log", "wb")  # noqa: SIM115 - closed below
    server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        client = redis.Redis.from_url((probe or "redis://127.0.0.1:PORT").replace("PORT", str(port)))
        deadline = time.monotonic() + 20
        while True:
            try:
                client.ping()
                break
            except (redis.AuthenticationError, redis.ResponseError):
                break
            except (redis.RedisError, OSError):
                said = (folder / "server.log").read_text()
                assert server.poll() is None, said
                assert time.monotonic() < deadline, said
                time.sleep(0.02)
        yield port
    finally:
        server.terminate()
        server.wait()
        log.close()


def user_file(path: Path) -> Path:
    """`deploy/redis/users.acl` with the password "pw-USER" for each user."""
    text = (DEPLOY / "users.acl").read_text()
    for user in USERS:
        text = text.replace(
            f"#{user.upper()}_SHA256", "#" + hashlib.sha256(f"pw-{user}".encode()).hexdigest()
        )
    path.write_text(text)
    return path
