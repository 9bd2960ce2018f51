"""Times what a step costs beside the ranks' work: scheduling, planning and applying results; and what the Ray
executor's channel adds to a call in this process. One JSON line per case.

The rank here computes nothing: it answers each plan with one token per row that draws, and its own time is
taken out. Rows end and are replaced all the time, as in a long run. Wall and CPU seconds of the stepping
thread are both told, since the first are no use on a machine that others load.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import gc
import json
import random
import resource
import statistics
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.config import EngineConfig, ModelSpec
from engine.engine import Engine
from engine.exec.base import RankReport
from engine.exec.echo import echo_spec
from engine.exec.wire import RowStep, StepPlan, StepResult
from engine.request import Request, Sampling

ROWS = 256
PROMPT, OUTPUT = (32, 96), (64, 192)
#: Blocks of 16 tokens that all rows could need at once, and as many again for cached prefixes.
BLOCKS = 2 * ROWS * -(-(PROMPT[1] + OUTPUT[1]) // 16)
TOKEN = 7


class IdleRank:
    """A worker without a model; the class that ranks of the Ray executor build."""

    def __init__(
        self, config: EngineConfig, spec: ModelSpec, rank: int, world: int, init_method: str | None
    ) -> None:
        self.rank = rank

    def init_device(self) -> None:
        pass

    def load(self) -> RankReport:
        return RankReport(self.rank, "cpu", "here", 0.0, 0.0, BLOCKS, 0.0, "none")

    def allocate(self, num_blocks: int) -> None:
        pass

    def run(self, plan: StepPlan) -> StepResult | None:
        return StepResult(plan.step, [(s.row, TOKEN) for s in plan.steps if s.sample])

    def close(self) -> None:
        pass


class IdleExecutor:
    """`engine.exec.inproc` with an idle rank, whose time it counts apart."""

    def __init__(self, config: EngineConfig) -> None:
        self.rank = IdleRank(config, echo_spec(), 0, 1, None)
        self.wall = self.cpu = 0.0
        self.num_kv_blocks, self.overlap_depth = BLOCKS, config.overlap_depth or 0
        self._results: deque[StepResult | None] = deque()

    def start(self) -> list[RankReport]:
        return [self.rank.load()]

    def submit(self, plan: StepPlan) -> None:
        wall, cpu = time.perf_counter(), time.thread_time()
        self._results.append(self.rank.run(plan))
        self.wall += time.perf_counter() - wall
        self.cpu += time.thread_time() - cpu

    def result(self) -> StepResult:
        result = self._results.popleft()
        assert result is not None
        return result

    def stop(self) -> None:
        pass


def loop(waiting: int, steps: int, depth: int) -> dict[str, Any]:
    """`steps` steps of ROWS rows with `waiting` requests behind them."""
    config = EngineConfig(
        model="idle",
        num_kv_blocks=BLOCKS,
        max_num_seqs=ROWS,
        max_num_batched_tokens=2048,
        overlap_depth=depth,
    )
    executor = IdleExecutor(config)
    engine = Engine(config, echo_spec(32_000), executor)
    engine.start()
    rng = random.Random(waiting)
    ids = [rng.randrange(100, 31_000) for _ in range(4096)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(waiting + ROWS):
        engine.add(_request(i, rng, ids))
    first = time.perf_counter()
    engine.step()
    first = time.perf_counter() - first
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    wall, cpu = [], []
    more = waiting + ROWS
    while len(wall) < steps:
        executor.wall = executor.cpu = 0.0
        began, began_cpu = time.perf_counter(), time.thread_time()
        ended = engine.step()
        if (
            engine.stats.running == ROWS and engine.stats.steps > OUTPUT[1]
        ):  # beyond the start, all rows in step
            cpu.append(time.thread_time() - began_cpu - executor.cpu)
            wall.append(time.perf_counter() - began - executor.wall)
        for _ in ended:
            engine.add(_request(more, rng, ids))
            more += 1
    return {
        "case": "loop",
        "rows": ROWS,
        "waiting": engine.stats.waiting,
        "overlap_depth": depth,
        "steps": steps,
        "wall_ms": _ms(wall),
        "cpu_ms": _ms(cpu),
        "first_step_s": round(first, 3),
        "bytes_per_waiting": round(grown * 1024 / waiting),
        "target_ms": 1.0,
    }


def dispatch(steps: int) -> list[dict[str, Any]]:
    """A plan of ROWS decoding rows, sent and answered: by a call, and over the step channel of a Ray rank."""
    from engine.exec.ray import RayExecutor

    plans = [StepPlan(i, [RowStep(r, 100 + i, 1, True) for r in range(ROWS)]) for i in range(steps)]
    inproc = _dispatched(IdleExecutor(EngineConfig(model="idle")), plans)
    config = EngineConfig(model="idle", executor="ray", device="cpu", num_threads=1)
    executor = RayExecutor(config, echo_spec(), "bench.step:IdleRank")
    executor.start()
    try:
        ray = _dispatched(executor, plans)
    finally:
        executor.stop()
    added = statistics.median(ray) - statistics.median(inproc)
    return [{
        "case": "dispatch", "rows": ROWS, "steps": steps, "inproc_ms": _ms(inproc), "ray_ms": _ms(ray),
        "added_ms": round(added * 1e3, 3), "target_ms": 0.3,
    }]  # fmt: skip


def _dispatched(executor: Any, plans: list[StepPlan]) -> list[float]:
    times = []
    for plan in plans:
        began = time.perf_counter()
        executor.submit(plan)
        executor.result()
        times.append(time.perf_counter() - began)
    return times[len(times) // 10 :]


def _request(number: int, rng: random.Random, ids: list[int]) -> Request:
    length, start = rng.randint(*PROMPT), rng.randrange(4000)
    return Request(
        f"r{number}", ids[start : start + length], Sampling(max_tokens=rng.randint(*OUTPUT), temperature=0.0)
    )


def _ms(seconds: list[float]) -> dict[str, float]:
    marks = statistics.quantiles(seconds, n=100)
    return {
        "median": round(marks[49] * 1e3, 3), "p99": round(marks[98] * 1e3, 3),
        "mean": round(statistics.fmean(seconds) * 1e3, 3), "max": round(max(seconds) * 1e3, 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--waiting", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6], metavar="N")
    parser.add_argument("--steps", type=int, default=2000, metavar="N")
    parser.add_argument("--depth", type=int, nargs="+", default=[0, 1], metavar="N", help="overlap")
    parser.add_argument("--no-dispatch", action="store_true", help="without the case that starts Ray")
    args = parser.parse_args()
    for depth in args.depth:
        for waiting in args.waiting:
            print(json.dumps(loop(waiting, args.steps, depth)), flush=True)
            gc.collect()
    if not args.no_dispatch:
        for line in dispatch(args.steps):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
