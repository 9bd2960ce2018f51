"""A rank without a model, for tests of placement and supervision: it adds numbers over a real gloo group.

And what such tests need around it: an executor of toy ranks, steps, and a look at processes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import psutil
import torch

from engine.config import EngineConfig, ModelSpec
from engine.errors import CheckpointError
from engine.exec.base import RankReport
from engine.exec.echo import echo_spec
from engine.exec.ray import RayExecutor
from engine.exec.wire import RowStep, StepPlan, StepResult
from engine.parallel.comm import Comm, connect

#: Plans with these step numbers make rank 1 misbehave.
RAISE, EXIT, HANG = 901, 902, 903
#: A plan that takes rank 1 half a second, and one that is answered with what `sees_test_flag` says.
SLOW, ENVIRONMENT = 904, 905
#: Rank 1 leaves the group, so that rank 0 fails at once; only later does it fail itself.
LATE = 906


class ToyWorker:
    def __init__(
        self, config: EngineConfig, spec: ModelSpec, rank: int, world: int, init_method: str | None
    ) -> None:
        self.config, self.rank, self.world, self.init_method = config, rank, world, init_method
        self.comm = Comm()

    def init_device(self) -> None:
        torch.set_num_threads(1)
        self.comm = connect(self.rank, self.world, self.init_method, torch.device("cpu"), 60.0)

    def load(self) -> RankReport:
        time.sleep(0.3)
        return RankReport(self.rank, "cpu", "here", 0.0, 0.3, 8 + self.rank, 0.0, "none", os.getpid())

    def allocate(self, num_blocks: int) -> None:
        self.blocks = num_blocks

    def run(self, plan: StepPlan) -> StepResult | None:
        if self.rank == 1 and plan.step == RAISE:
            raise ArithmeticError("rank one cannot add")
        if self.rank == 1 and plan.step == EXIT:
            print("rank one has had enough", file=sys.stderr, flush=True)
            os._exit(7)
        if self.rank == 1 and plan.step == HANG:
            _wait_for_ever()
        if self.rank == 1 and plan.step == SLOW:
            time.sleep(0.5)
        if self.rank == 1 and plan.step == LATE:
            self.comm.close()
            time.sleep(1)
            raise ArithmeticError("rank one gave up first")
        if plan.step == ENVIRONMENT:
            return StepResult(plan.step, [(0, int(sees_test_flag()))]) if self.rank == 0 else None
        total = self.comm.all_reduce(torch.tensor([float(plan.step + self.rank)]))
        answer = int(total.item()) * 1000 + self.blocks
        return StepResult(plan.step, [(0, answer)]) if self.rank == 0 else None

    def close(self) -> None:
        self.comm.close()


class BrokenWorker(ToyWorker):
    def load(self) -> RankReport:
        if self.rank == 1:
            raise CheckpointError("tensor model.norm.weight is missing")
        return super().load()


class UnreadyWorker(ToyWorker):
    """Rank 1 fails while rank 0 waits for it in the group's start."""

    def init_device(self) -> None:
        if self.rank == 1:
            raise OSError("no such device")
        super().init_device()


class DyingLoader(ToyWorker):
    """Rank 1 is killed while it loads."""

    def load(self) -> RankReport:
        if self.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load()


class StoppedLoader(ToyWorker):
    """Rank 1 is stopped while it loads."""

    def load(self) -> RankReport:
        if self.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().load()


def sees_test_flag() -> bool:
    """In a rank: the flag with an allowed name is there, the other is not; gloo is to stay on loopback."""
    own = os.environ
    allowed = own.get("HEADRACE_TEST_FLAG") == "on" and "UNRELATED_TEST_FLAG" not in own
    return allowed and own.get("GLOO_SOCKET_IFNAME") == "lo"


def _wait_for_ever() -> None:
    time.sleep(3600)


def executor(worker: str = "ToyWorker", **settings: Any) -> RayExecutor:
    fields: dict[str, Any] = {"tensor_parallel_size": 2} | settings
    config = EngineConfig(model="toy", executor="ray", device="cpu", **fields)
    return RayExecutor(config, echo_spec(), f"tests.engine.exec.toy:{worker}")


def plan(step: int) -> StepPlan:
    return StepPlan(step, [RowStep(0, 0, 1, True)])


def answer(ranks: RayExecutor, step: int) -> int:
    ranks.submit(plan(step))
    return ranks.result().sampled[0][1]


def expected(step: int) -> int:
    """What two toy ranks answer: the sum of their numbers, and the smaller pool."""
    return (2 * step + 1) * 1000 + 8


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def left_of(pids: set[int], seconds: float) -> set[int]:
    """Processes that still live after at most `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := {pid for pid in pids if alive(pid)}) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left
