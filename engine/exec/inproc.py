"""The executor for one rank in this process: no Ray, no sockets, no second process.

A plan runs when it is submitted. Whatever the worker raises in a step is reported as a dead rank, as with
ranks elsewhere, so that the service has one way to deal with it.
"""

from __future__ import annotations

import traceback
from collections import deque
from typing import TYPE_CHECKING

from engine.config import EngineConfig, ModelSpec
from engine.errors import EngineError, WorkerDied
from engine.exec.base import RankReport
from engine.exec.wire import StepPlan, StepResult

if TYPE_CHECKING:
    from engine.worker.worker import Worker


class InprocExecutor:
    """Implements `engine.exec.base.Executor`."""

    def __init__(self, config: EngineConfig, spec: ModelSpec) -> None:
        self.config = config
        self.spec = spec
        self._worker: Worker | None = None
        self._report: RankReport | None = None
        self._results: deque[StepResult] = deque()

    def start(self) -> list[RankReport]:
        from engine.worker.worker import Worker  # torch: not before a rank is really wanted

        worker = Worker(self.config, self.spec, 0, 1, None)
        worker.init_device()
        self._report = worker.load()
        worker.allocate(self._report.kv_blocks)
        self._worker = worker
        return [self._report]

    def submit(self, plan: StepPlan) -> None:
        if self._worker is None:
            raise WorkerDied(0, "it was stopped, or never started")
        try:
            result = self._worker.run(plan)
        except Exception as error:
            raise WorkerDied(0, traceback.format_exc()) from error
        assert result is not None  # rank 0 always answers
        self._results.append(result)

    def result(self) -> StepResult:
        return self._results.popleft()

    @property
    def num_kv_blocks(self) -> int:
        return self._started().kv_blocks

    @property
    def overlap_depth(self) -> int:
        if self.config.overlap_depth is not None:
            return self.config.overlap_depth
        return int(self._started().device.startswith("cuda"))

    def stop(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _started(self) -> RankReport:
        if self._report is None:
            raise EngineError("the rank has not been loaded yet: call start() first")
        return self._report
