"""One cell's world: server, proxies, producers, engines and sinks as real processes, and what they leave.

The driver (`tests.chaos.run`) owns it; the nemesis (`tests.chaos.nemesis`) breaks it. Every cell ends with
`drain`: faults are over, everything is started again, and all that was accepted must end and reach each sink.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import orjson

from headrace.connection import connect
from headrace.errors import StoreError
from headrace.ledger import Ledger
from headrace.messages import Priority
from headrace.runs import RunProgress
from headrace.store import Store
from sink.jsonl import written_ids
from tests.chaos.checker import History
from tests.chaos.engine import DEADLY
from tests.chaos.parts import CANARY, ROOT, EngineProcess, Server, job
from tests.chaos.proxy import Proxy
from tests.chaos.sink import GROUP
from tests.headrace.own_server import free_port

LANE, RUN = "chaos", "r"
LINKS = ("producer", "engine", "sink")


class World:
    """`slots`: rows of an engine. Engines and sinks that die are started again by `tend`, until `close`."""

    def __init__(
        self, folder: Path, *, server: str = "valkey-9", engines: int = 2, slots: int = 64,
        lease_s: float = 5.0,
        step_ms: float = 5.0, network: bool = False, seed: int = 0, appendfsync: str = "always",
    ) -> None:  # fmt: skip
        self.folder, self.rng, self.lease_s = folder, random.Random(seed), lease_s
        self.server = Server(folder / "server", free_port(), server, appendfsync)
        self.server.start()
        self.proxies = (
            {link: Proxy(("127.0.0.1", self.server.port), seed) for link in LINKS} if network else {}
        )
        self.flags = ("--rows", str(slots), "--step-ms", str(step_ms), "--lease-s", str(lease_s))
        self.engines = [
            EngineProcess(self.url("engine"), LANE, folder, self.flags, f"engine{i}") for i in range(engines)
        ]
        self.ledger = Ledger(LANE)
        self.producers: list[subprocess.Popen[bytes]] = []
        self.sinks: dict[str, subprocess.Popen[bytes]] = {}
        self.sink_flags: list[str] = []
        self.sinks_stopped = threading.Event()
        self.recovery_s: list[float] = []
        self.kills = self.deaths = 0
        self.stopped = False
        self._tending = threading.Lock()  # the driver and the nemesis both do

    # -- life --------------------------------------------------------------------------------------

    def start(self, jobs: int, *, per_second: float, steps: int, poison_every: int = 0) -> None:
        self._start_sinks()
        client = self.server.client
        results = self.ledger.keys.results(None)
        while not (client.exists(results) and len(client.xinfo_groups(results)) == 2):
            time.sleep(0.05)
        for engine in self.engines:
            engine.start()
        for n in range(2):
            words = [
                "--redis", self.url("producer"), "--lane", LANE, "--name", f"p{n}", "--jobs", str(jobs // 2),
                "--history", str(self.folder / f"p{n}.history"), "--seed", str(self.rng.randrange(9999)),
                "--per-second", str(per_second / 2), "--steps", str(steps),
                "--poison-every", str(poison_every),
            ]  # fmt: skip
            self.producers.append(self._process("tests.chaos.producer", words, f"producer{n}"))

    def url(self, link: str) -> str:
        return self.proxies[link].url if self.proxies else self.server.url

    @property
    def producing(self) -> bool:
        return any(p.poll() is None for p in self.producers)

    def tend(self) -> None:
        """Start what is dead and should live."""
        with self._tending:
            self._tend()

    def _tend(self) -> None:
        for engine in self.engines:
            if engine.process is not None and not engine.alive:
                if engine.process.returncode not in (0, -signal.SIGKILL, -signal.SIGTERM):
                    self.deaths += 1
                self._follow(engine.process.pid)
                engine.start()
        if not self.sinks_stopped.is_set():
            self._start_sinks()

    def kill_engine(self, engine: EngineProcess) -> None:
        if engine.alive:
            self.kills += 1
            engine.kill()

    def drain(self, seconds: float, resubmit: bool = False) -> bool:
        """Until everything that was accepted has ended and each sink has it. False if that took too long."""
        deadline = time.monotonic() + seconds
        looked = 0.0
        while time.monotonic() < deadline:
            self.tend()
            with contextlib.suppress(StoreError):
                if resubmit and not self.producing and time.monotonic() - looked > 3:
                    looked = time.monotonic()
                    if missing := self._missing():
                        self._submit_again(missing)
                        continue
                if not self.producing and self._settled():
                    return True
            time.sleep(0.1)
        return False

    def close(self) -> None:
        self.stopped = True
        for process in [*self.producers, *self.sinks.values()]:
            process.terminate()
        for process in [*self.producers, *self.sinks.values()]:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
        for engine in self.engines:
            engine.signal(signal.SIGCONT)
            engine.kill()
        for proxy in self.proxies.values():
            proxy.close()
        self.server.stop()

    # -- evidence ----------------------------------------------------------------------------------

    def history(self) -> History:
        h = History(recovery_s=self.recovery_s)
        for path in self.folder.glob("*.history"):
            for line in path.read_bytes().splitlines():
                said = orjson.loads(line)
                h.attempted |= set(said.get("try", ()))
                h.acknowledged |= set(said.get("ok", ()))
        h.poison = {i for i in h.attempted if "poison" in i}
        h.sinks["jsonl"] = list(written_ids(self.folder / "out.jsonl"))
        rows = [orjson.loads(line) for line in (self.folder / "out.chaos").read_bytes().splitlines()]
        h.sinks["chaos"] = [row["id"] for row in rows]
        h.ends = {row["id"]: row["status"] for row in rows}
        h.runs_again = {row["id"]: row["attempts"] - 1 for row in rows}
        return h

    def left_over(self) -> dict[str, int]:
        """Entries and pending entries that stand after the drain, and logs that show what jobs said."""
        client = self.server.client
        out = {"xlen": 0, "pending": 0}
        for priority in Priority:
            stream = self.ledger.keys.jobs(priority)
            out["xlen"] += client.xlen(stream)
            with contextlib.suppress(Exception):
                out["pending"] += client.xpending(stream, "engines")["pending"]
        out["xlen"] += client.xlen(self.ledger.keys.results(None))
        out["logs_with_payload"] = sum(
            CANARY in p.read_text(errors="replace") for p in self.folder.glob("*.log")
        )
        return out

    def progress(self) -> RunProgress:
        return self._ask(lambda store: store.run(self.ledger.progress(RUN)))

    def count(self, word: str) -> int:
        """How often the engines' logs say a word."""
        return sum(e.said().count(word) for e in self.engines)

    # -- inside ------------------------------------------------------------------------------------

    def _settled(self) -> bool:
        def look(store: Store) -> bool:
            if store.run(self.ledger.jobs_waiting()):
                return False
            return not any(store.run(self.ledger.result_lag(None, g)) for g in ("jsonl", GROUP))

        return self._ask(look)

    def _missing(self) -> list[str]:
        h = self.history()
        return sorted(h.acknowledged - set.intersection(*(set(ids) for ids in h.sinks.values())))

    def _submit_again(self, ids: Sequence[str]) -> None:
        """What a producer does that finds its server wiped: its own list says what is missing."""

        def again(store: Store) -> None:
            store.run(self.ledger.forget_run(RUN))
            jobs = [job(i, LANE, prompt_token_ids=[DEADLY] if "poison" in i else None) for i in ids]
            store.run(self.ledger.submit(jobs, 100_000))

        self._ask(again)

    def _ask(self, what):  # type: ignore[no-untyped-def]
        store = Store(connect(self.server.url))
        try:
            return what(store)
        finally:
            store.close()

    def _start_sinks(self) -> None:
        url = self.url("sink")
        words = {
            "jsonl": [
                "headrace.cli.main",
                "sink",
                "jsonl",
                str(self.folder / "out.jsonl"),
                "--group",
                "jsonl",
            ],
            "chaos": ["tests.chaos.sink", str(self.folder / "out.chaos"), *self.sink_flags],
        }
        for name, (module, *more) in words.items():
            if name not in self.sinks or self.sinks[name].poll() is not None:
                self.sinks[name] = self._process(
                    module, [*more, "--redis", url, "--lane", LANE], f"sink-{name}"
                )
        self.sink_flags = []

    def _process(self, module: str, words: Sequence[str], name: str) -> subprocess.Popen[bytes]:
        with open(self.folder / f"{name}.log", "ab") as log:
            command = [sys.executable, "-m", module, *words]
            return subprocess.Popen(
                command, stdout=log, stderr=log, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )

    def _follow(self, pid: int) -> None:
        """Measure how long the dead process's name still holds jobs."""
        threading.Thread(
            target=self._until_free, args=(f"{socket.gethostname()}-{pid}-",), daemon=True
        ).start()

    def _until_free(self, prefix: str) -> None:
        began, held = time.monotonic(), False
        streams = [self.ledger.keys.jobs(p) for p in Priority]
        while not self.stopped and time.monotonic() - began < 120:
            try:
                client = self.server.client
                consumers = [
                    c for s in streams if client.exists(s) for c in client.xinfo_consumers(s, "engines")
                ]
            except Exception:  # the server is away as well: it counts
                time.sleep(0.1)
                continue
            if not any(c["name"].decode().startswith(prefix) and c["pending"] for c in consumers):
                if held:
                    self.recovery_s.append(time.monotonic() - began)
                return
            held = True
            time.sleep(0.05)
