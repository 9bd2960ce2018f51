"""F5, on the real thing: two Ray ranks of the demo model, while ranks, engine, server and sink are killed.

    python -m tests.chaos.real [--rows 2000] [--every 1,3] [--seed 1] [--faults ...] [--out FILE]

Faults: `rank` (SIGKILL of one rank), `hang` (SIGSTOP of one rank), `engine`, `server`, `sink` (SIGKILL).
Prints one JSON line; exit status 0 only if `headrace audit` balances and copies of one question, asked at
temperature 0, have one answer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import psutil

from headrace.connection import connect
from headrace.errors import StoreError
from headrace.ledger import Ledger
from headrace.store import Store
from tests.chaos.parts import ROOT, Server
from tests.headrace.own_server import free_port

LANE, RUN = "real", "real"
FAULTS = ("rank", "hang", "engine", "server", "sink")


class Real:
    """The processes of one run. The engine and the sink are started again whenever they are dead."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.folder, self.rows = folder, rows
        self.output = folder / "out.jsonl"
        self.server = Server(folder / "server", free_port())
        self.server.start()
        self.queue = ["--redis", self.server.url, "--lane", LANE]
        self.made: Counter[str] = Counter()
        self.sink: subprocess.Popen[bytes] | None = None
        self.engine: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        source = self.folder / "in.jsonl"
        questions = [json.loads(q) for q in (ROOT / "examples/questions.jsonl").read_text().splitlines()]
        with open(source, "w") as f:
            for i in range(self.rows):
                question = questions[i % len(questions)]
                f.write(
                    json.dumps(question | {"custom_id": f"{question['custom_id']}.{i // len(questions)}"})
                    + "\n"
                )
        self.tend()
        submit = ["submit", str(source), *self.queue, "--run", RUN]
        subprocess.run([sys.executable, "-m", "headrace.cli.main", *submit], cwd=ROOT, check=True)

    def tend(self) -> None:
        if self.sink is None or self.sink.poll() is not None:
            self.sink = self._start("sink", ["sink", "jsonl", str(self.output), *self.queue])
        if self.engine is None or self.engine.poll() is not None:
            model = ["--model", "examples/demo_model", "--tensor-parallel-size", "2"]
            words = ["engine", *model, "--num-threads", "1", "--max-num-seqs", "16", *self.queue]
            self.engine = self._start("engine", words)

    @property
    def ready(self) -> bool:
        """Whether the engine serves: a fault while it starts only delays the start."""
        log = self.folder / "engine.log"
        said = log.read_text(errors="replace") if log.exists() else ""
        states = re.findall(r"engine=\S+-(\d+)-\w+ lane=\S+ state=(\w+)", said)
        return self.engine is not None and states[-1:] == [(str(self.engine.pid), "ready")]

    def ranks(self) -> list[psutil.Process]:
        """The two that were started last, by the engine's own log."""
        said = (self.folder / "engine.log").read_text(errors="replace")
        pids = [int(pid) for pid in re.findall(r"rank_ready rank=\d .*? pid=(\d+)", said)[-2:]]
        return [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]

    def break_something(self, fault: str, rng: random.Random) -> None:
        assert self.engine is not None
        assert self.sink is not None
        if fault in ("rank", "hang"):
            rng.choice(self.ranks()).send_signal(signal.SIGKILL if fault == "rank" else signal.SIGSTOP)
        elif fault == "engine":
            self.engine.kill()
            self.engine.wait()
        elif fault == "sink":
            self.sink.kill()
            self.sink.wait()
        else:
            self.server.kill()
            time.sleep(rng.uniform(0.1, 2))
            self.server.start()
        self.made[fault] += 1

    def ended(self) -> int:
        try:
            store = Store(connect(self.server.url))
        except StoreError:
            return 0
        try:
            return store.run(Ledger(LANE).progress(RUN)).ended
        finally:
            store.close()

    def audit(self) -> tuple[int, str]:
        words = ["audit", RUN, *self.queue, "--output", str(self.output)]
        done = subprocess.run(
            [sys.executable, "-m", "headrace.cli.main", *words], cwd=ROOT, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr

    def answers_differ(self) -> list[str]:
        """Questions whose copies were answered differently, whatever happened to them on the way."""
        said = defaultdict(set)
        for line in map(json.loads, self.output.read_text().splitlines()):
            body = line["response"]["body"] if line["response"] else line["error"]
            text = body["choices"][0]["message"]["content"] if line["response"] else str(body)
            said[line["custom_id"].rsplit(".", 1)[0]].add(text)
        return [question for question, texts in said.items() if len(texts) > 1]

    def close(self) -> None:
        for process in (self.engine, self.sink):
            if process is not None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
                process.kill()
        self.server.stop()

    def _start(self, name: str, words: list[str]) -> subprocess.Popen[bytes]:
        env = os.environ | {
            "OMP_NUM_THREADS": "1",
            "HEADRACE_LEASE_S": "10",
            "HEADRACE_SPOOL": str(self.folder),
        }
        with open(self.folder / f"{name}.log", "ab") as log:
            command = [sys.executable, "-m", "headrace.cli.main", *words]
            return subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=env)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--every", default="1,3", help="seconds of service before a fault, from,to")
    parser.add_argument("--faults", default=",".join(FAULTS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--most", type=int, default=6, help="faults at most; the rest of the run is the drain"
    )
    parser.add_argument("--limit", type=float, default=600, help="seconds")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended as well
    low, high = map(float, args.every.split(","))
    rng, faults = random.Random(args.seed), args.faults.split(",")
    real = Real(Path(tempfile.mkdtemp(prefix="hr-chaos-F5-")), args.rows)
    began = time.monotonic()
    try:
        real.start()
        turn, due = 0, float("inf")
        while real.ended() < args.rows and time.monotonic() - began < args.limit:
            real.tend()
            if not real.ready:
                due = float("inf")
            elif due == float("inf"):
                due = time.monotonic() + rng.uniform(low, high)
            if turn < args.most and time.monotonic() > due:
                real.break_something(faults[turn % len(faults)], rng)
                turn, due = turn + 1, float("inf")
            time.sleep(0.3)
        until = time.monotonic() + 30
        while (code := real.audit())[0] and time.monotonic() < until:
            real.tend()
            time.sleep(1)
        differ = real.answers_differ()
        figures = {
            "cell": "F5", "what": "real engine, two ranks", "rows": args.rows, "seed": args.seed,
            "valid": code[0] == 0 and not differ, "faults": dict(real.made),
            "audit": code[1].splitlines()[:2],
            "questions_answered_differently": len(differ), "seconds": round(time.monotonic() - began, 1),
            "rank_deaths_seen": (real.folder / "engine.log").read_text().count("rank_died"),
        }  # fmt: skip
        if not figures["valid"]:
            figures["folder"] = str(real.folder)
        line = json.dumps(figures)
        print(line, flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with open(args.out, "a") as f:
                f.write(line + "\n")
        return 0 if figures["valid"] else 1
    finally:
        real.close()


if __name__ == "__main__":
    sys.exit(main())
