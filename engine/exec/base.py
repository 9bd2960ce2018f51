"""The executor protocol: where ranks live is the executor's business, what they compute is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from engine.exec.wire import StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class RankReport:
    """What a rank says once its shard is loaded."""

    rank: int
    device: str
    host: str
    weights_gib: float
    load_seconds: float
    kv_blocks: int  # blocks its memory has room for, null block included
    kv_gib: float
    attention: str  # the backend chosen, and why
    pid: int = 0


class Executor(Protocol):
    """Starts ranks, carries plans to them and results back. Steps are answered in order.

    Every method but `stop` raises WorkerDied as soon as a rank is known to be dead or hung.
    """

    def start(self) -> list[RankReport]:
        """Place, load and profile all ranks; allocate the KV pool (the smallest rank decides)."""
        ...

    def submit(self, plan: StepPlan) -> None:
        """Send a plan; returns without waiting for the result."""
        ...

    def result(self) -> StepResult:
        """Wait for the oldest outstanding plan's result."""
        ...

    @property
    def num_kv_blocks(self) -> int:
        """Blocks in the pool, null block included; valid after `start`."""
        ...

    @property
    def overlap_depth(self) -> int:
        """Plans that may be outstanding beside the one whose result is awaited: 0 on CPU, 1 on GPU."""
        ...

    def stop(self) -> None:
        """End all ranks; safe to call twice and after a death."""
        ...
