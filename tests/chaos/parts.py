"""What chaos is made of: a server that can be killed and comes back on its port, engine processes, jobs."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import redis

from headrace.embedded import _binary
from headrace.messages import Job

ROOT = Path(__file__).parents[2]
#: Stands in every job of a chaos run, and must stand in no log.
CANARY = "hr-canary-4711"


def server_binary(name: str) -> str | None:
    """`valkey-9` (embedded), `redis-7.0` (Debian's), or the path of any other server."""
    if name == "valkey-9":
        return _binary()
    return shutil.which("redis-server") if name == "redis-7.0" else name


@dataclass
class Server:
    """A server on a port of its own that outlives its own death: `start` comes back with its file."""

    folder: Path
    port: int
    name: str = "valkey-9"
    appendfsync: str = "always"
    words: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, socket_timeout=30)

    def start(self) -> None:
        binary = server_binary(self.name)
        assert binary is not None, f"{self.name} is not installed"
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [
            binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder), "--save", "",
            "--appendonly", "yes", "--appendfsync", self.appendfsync, "--loglevel", "warning", *self.words,
        ]  # fmt: skip
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_for(self._answers, 30)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _answers(self) -> bool:
        with contextlib.suppress(redis.RedisError, OSError), self.client as client:
            return bool(client.ping())
        return False


@dataclass
class EngineProcess:
    """One echo engine. What it logs stays in `log`."""

    url: str
    lane: str
    folder: Path
    flags: tuple[str, ...] = ()
    name: str = "engine"
    process: subprocess.Popen[bytes] | None = None
    starts: int = field(default=0)

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable, "-m", "tests.chaos.engine", "--redis", self.url, "--lane", self.lane,
            "--spool", str(self.folder / "spool"), *self.flags,
        ]  # fmt: skip
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
        self.starts += 1

    def wait_ready(self) -> None:
        wait_for(lambda: "state=ready" in self.said() or not self.alive, 120)
        assert self.alive, self.said()

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def signal(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None


def job(job_id: str, lane: str, *, steps: int = 20, run: str = "r", **fields: object) -> Job:
    """A job of `steps` simulated decode steps."""
    prompt = fields.pop("prompt_token_ids", None) or [1 + sum(map(ord, job_id)) % 199] * 4
    params = {"max_tokens": steps, "ignore_eos": True, "temperature": 0}
    return Job.build(
        {"id": job_id, "run": run, "lane": lane, "kind": "completion", "prompt_token_ids": prompt,
         "params": params, "enqueued": time.time(), **fields}
    )  # fmt: skip


def wait_for(what: Callable[[], object], seconds: float = 60.0, why: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"not within {seconds} s {why()}"
        time.sleep(0.02)
