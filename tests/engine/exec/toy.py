"""A rank without a model, for tests of placement and supervision: it adds numbers over a real gloo group."""

from __future__ import annotations

import os
import time

import torch

from engine.config import EngineConfig, ModelSpec
from engine.errors import CheckpointError
from engine.exec.base import RankReport
from engine.exec.wire import StepPlan, StepResult
from engine.parallel.comm import Comm, connect

#: Plans with these step numbers make rank 1 misbehave.
RAISE, EXIT, HANG = 901, 902, 903


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
        time.sleep(0.4)
        return RankReport(self.rank, "cpu", "here", 0.0, 0.4, 8 + self.rank, 0.0, "none", os.getpid())

    def allocate(self, num_blocks: int) -> None:
        self.blocks = num_blocks

    def run(self, plan: StepPlan) -> StepResult | None:
        if self.rank == 1 and plan.step == RAISE:
            raise ArithmeticError("rank one cannot add")
        if self.rank == 1 and plan.step == EXIT:
            os._exit(7)
        if self.rank == 1 and plan.step == HANG:
            time.sleep(3600)
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


class EnvironmentWorker(ToyWorker):
    """Answers with whether it sees what the test set."""

    def run(self, plan: StepPlan) -> StepResult | None:
        seen = os.environ.get("HEADRACE_TEST_FLAG") == "on" and "UNRELATED_TEST_FLAG" not in os.environ
        return StepResult(plan.step, [(0, int(seen))]) if self.rank == 0 else None
