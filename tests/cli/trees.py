"""Starting `headrace run` with the echo engine as a user would, and ending its tree as an outage would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import orjson
import psutil

ROOT = Path(__file__).parents[2]
ECHO_RUN = str(Path(__file__).with_name("echo_run.py"))
ECHO_ENGINE = str(Path(__file__).with_name("echo_engine.py"))
ENV = os.environ | {"PYTHONPATH": str(ROOT)}


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@dataclass
class Job:
    """One input and one output in a folder, run as often as a test likes."""

    folder: Path

    @property
    def input(self) -> Path:
        return self.folder / "in.jsonl"

    @property
    def output(self) -> Path:
        return self.folder / "out.jsonl"

    @property
    def state(self) -> Path:
        return self.folder / "out.jsonl.headrace"

    def write(self, *rows: dict[str, object] | bytes) -> None:
        lines = (row if isinstance(row, bytes) else orjson.dumps(row) for row in rows)
        self.input.write_bytes(b"\n".join(lines) + b"\n")

    def write_many(self, n: int) -> None:
        self.write(*({"custom_id": f"q-{i}", "prompt": f"question {i}"} for i in range(n)))

    def start(
        self, *more: str, model: str = "m", engine: str = "", source: str | None = None
    ) -> subprocess.Popen[str]:
        where = [source or str(self.input), str(self.output)]
        command = [sys.executable, ECHO_RUN, *where, model, engine, *more]
        return subprocess.Popen(
            command,
            env=ENV,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.PIPE,
            process_group=0,
        )

    def run(self, *more: str, model: str = "m", engine: str = "") -> Result:
        return ended(self.start(*more, model=model, engine=engine))

    def rows(self, path: Path | None = None) -> list[dict]:
        return [orjson.loads(line) for line in (path or self.output).read_bytes().splitlines()]

    def ids(self) -> list[str]:
        """custom_ids of all whole lines; works while a run goes on."""
        if not self.output.exists():
            return []
        lines = self.output.read_bytes().split(b"\n")[:-1]
        return [orjson.loads(line)["custom_id"] for line in lines]


def ended(process: subprocess.Popen[str], stdin: str | None = None) -> Result:
    out, err = process.communicate(stdin, timeout=120)
    return Result(process.returncode, out, err)


def kill_tree(process: subprocess.Popen[str]) -> None:
    """kill -9 to everything at once, as a power cut or an out-of-memory killer would."""
    root = psutil.Process(process.pid)
    for p in [root, *root.children(recursive=True)]:
        try:
            os.kill(p.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.communicate()


def children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def wait_for(what: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)
