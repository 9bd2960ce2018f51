"""The executor for one rank in this process: no Ray, no sockets, no second process.

Without overlap a plan runs when it is submitted. With overlap it is launched on a thread of its own, and its
result is waited for when it is asked for: a GPU has the next plan before it has finished this one. Whatever
the worker raises in a step is reported as a dead rank, as with ranks elsewhere, so that the service has one
way to deal with it.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from engine.config import EngineConfig, ModelSpec
from engine.errors import EngineError, WorkerDied
from engine.exec.base import RankReport
from engine.exec.wire import StepPlan, StepResult

if TYPE_CHECKING:
    from engine.worker.pending import PendingStep
    from engine.worker.worker import Worker


class InprocExecutor:
    """Implements `engine.exec.base.Executor`."""

    def __init__(self, config: EngineConfig, spec: ModelSpec) -> None:
        self.config = config
        self.spec = spec
        self._worker: Worker | None = None
        self._report: RankReport | None = None
        self._thread: ThreadPoolExecutor | None = None  # where steps run, with overlap
        self._results: deque[StepResult | Future[PendingStep | None]] = deque()

    def start(self) -> list[RankReport]:
        from engine.worker.worker import Worker  # torch: not before a rank is really wanted

        worker = Worker(self.config, self.spec, 0, 1, None)
        worker.init_device()
        self._report = worker.load()
        worker.allocate(self._report.kv_blocks)
        self._worker = worker
        if self.overlap_depth:
            self._thread = ThreadPoolExecutor(1, "rank-0")
        return [self._report]

    def submit(self, plan: StepPlan) -> None:
        worker = self._worker
        if worker is None:
            raise WorkerDied(0, "it was stopped, or never started")
        if self._thread is None:
            self._results.append(_result(partial(worker.launch, plan)))
        else:
            self._results.append(self._thread.submit(worker.launch, plan))

    def result(self) -> StepResult:
        result = self._results.popleft()
        return result if isinstance(result, StepResult) else _result(result.result)

    @property
    def num_kv_blocks(self) -> int:
        return self._started().kv_blocks

    @property
    def overlap_depth(self) -> int:
        if self.config.overlap_depth is not None:
            return self.config.overlap_depth
        return int(self._started().device.startswith("cuda"))

    def stop(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _started(self) -> RankReport:
        if self._report is None:
            raise EngineError("the rank has not been loaded yet: call start() first")
        return self._report


def _result(launched: Callable[[], PendingStep | None]) -> StepResult:
    try:
        pending = launched()
        assert pending is not None  # rank 0 always answers
        return pending.result()
    except Exception as error:
        raise WorkerDied(0, traceback.format_exc()) from error
