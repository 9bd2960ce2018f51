"""A sink process for chaos, of another kind than the JSONL sink: it keeps what completions say of themselves.

    python -m tests.chaos.sink OUT --redis URL --lane NAME [--die-at before-commit|after-commit]

One JSON line a job (id, status, attempts, leased, tokens), in a file that is synced before the
acknowledgement; ids it holds are read back at the start. With --die-at it kills itself at its fifth commit.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from pathlib import Path

import orjson

from headrace.cli.child import die_with_parent
from headrace.connection import connect
from headrace.errors import StoreError
from headrace.ledger import Ledger
from headrace.messages import Completion
from headrace.store import Store
from sink.base import Consumer, Tally

GROUP = "chaos"


class Rows:
    """Implements `sink.base.Target`."""

    def __init__(self, path: Path, die_at: str | None) -> None:
        self.tally, self.path, self.die_at = Tally(), path, die_at
        self.known: set[str] = set()
        self.staged: dict[str, bytes] = {}
        self.commits = 0

    def recover(self) -> None:
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        self.path.write_bytes(whole)
        self.known = {orjson.loads(line)["id"] for line in whole.splitlines()}

    def write(self, batch: list[Completion]) -> None:
        for c in batch:
            if c.id not in self.known and c.id not in self.staged:
                row = {
                    "id": c.id, "status": c.status.value, "attempts": c.attempts, "leased": c.timings.leased,
                    "tokens": c.usage.completion_tokens,
                }  # fmt: skip
                self.staged[c.id] = orjson.dumps(row) + b"\n"

    def commit(self) -> None:
        self.commits += 1
        self._die("before-commit")
        with open(self.path, "ab") as f:
            f.write(b"".join(self.staged.values()))
            f.flush()
            os.fsync(f.fileno())
        self.known |= self.staged.keys()
        self.staged = {}
        self._die("after-commit")

    def close(self) -> None:
        pass

    def _die(self, where: str) -> None:
        if self.die_at == where and self.commits == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--redis", required=True)
    parser.add_argument("--lane", required=True)
    parser.add_argument("--die-at")
    args = parser.parse_args()
    die_with_parent()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    rows = Rows(args.out, args.die_at)
    rows.recover()
    while not stop.is_set():
        try:
            store = Store(connect(args.redis))
            break
        except StoreError:
            time.sleep(0.2)
    else:
        return 0
    Consumer(store, Ledger(args.lane), None, GROUP, rows).run(stop)
    return 0


if __name__ == "__main__":
    sys.exit(main())
