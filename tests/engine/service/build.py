"""An engine service on the echo executor and a real server, in threads of this process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.config import EngineConfig, ModelSpec
from engine.errors import WorkerDied
from engine.exec.echo import EchoExecutor, echo_spec
from engine.exec.wire import StepPlan
from engine.service.service import Service
from headrace.messages import Job
from headrace.settings import Settings
from tests.headrace.servers import LANE, Lane

#: A prompt with this token kills the rank that computes it.
KILLER = 13


class FrailExecutor(EchoExecutor):
    """An echo whose rank dies of one token, `fuse` steps after it came."""

    fuse = 0
    _left: int | None = None

    def submit(self, plan: StepPlan) -> None:
        if self._left is None and any(KILLER in new.tokens for new in plan.new):
            self._left = self.fuse
        if self._left == 0:
            raise WorkerDied(0, f"Traceback: token {KILLER} is poison")
        self._left = None if self._left is None else self._left - 1
        super().submit(plan)


class Engine:
    """A running service. `deaths`: how often its ranks were built again."""

    def __init__(
        self, lane: Lane, folder: Path, rows: int, step_s: float, lookahead: int, fuse: int, **settings: Any
    ) -> None:
        self.builds = 0
        config = EngineConfig(
            model=str(folder), max_num_seqs=rows, max_num_batched_tokens=1024, num_kv_blocks=4096,
            block_size=4, lookahead=lookahead,
        )  # fmt: skip

        def build(config: EngineConfig, spec: ModelSpec) -> FrailExecutor:
            self.builds += 1
            ranks = FrailExecutor(config, step_seconds=step_s)
            ranks.fuse = fuse
            return ranks

        own = Settings(redis=lane.url, lane=LANE, **settings)
        self.service = Service(config, echo_spec(256, 4096), own, build)
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.service.run()
        except BaseException as e:
            self.failure = e

    @property
    def deaths(self) -> int:
        return self.builds - 1

    def stop(self) -> None:
        self.service.drain()
        self.service.drain()
        self.thread.join(20)
        assert not self.thread.is_alive()
        if self.failure is not None:
            raise self.failure


@contextlib.contextmanager
def serving(
    lane: Lane,
    folder: Path,
    *,
    rows: int = 64,
    step_s: float = 0.0,
    lookahead: int = 0,
    fuse: int = 0,
    **settings: Any,
) -> Iterator[Engine]:
    engine = Engine(lane, folder, rows, step_s, lookahead, fuse, **settings)
    try:
        yield engine
    finally:
        engine.stop()


def ids_job(job_id: str, tokens: list[int], max_tokens: int = 4, **fields: Any) -> Job:
    return Job.build({
        "id": job_id, "run": "r", "lane": LANE, "kind": "completion", "prompt_token_ids": tokens,
        "params": {"max_tokens": max_tokens, "ignore_eos": True}, **fields,
    })  # fmt: skip


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)
    return found
