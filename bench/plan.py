"""What the plan over the queue gives: the same rows first come first served and planned; a JSON line a case.

    prefixes   rows drawn from 100 prefixes of 512 tokens, shuffled, in a KV pool that holds 20 of these
    tail       output lengths with a long tail: half of them under twice the shortest, a few 64 times longer
               (Pareto with exponent 1, cut there), shuffled

By default the ranks are simulated: a step costs FIXED + TOKEN * computed tokens + ROW * rows that draw, on a
clock that only counts. With --model a real model computes the same kinds of rows, fewer and scaled down, and
the clock is the wall's; the two orders alternate.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.config import EngineConfig
from engine.engine import Engine
from engine.exec.base import Executor, RankReport
from engine.exec.echo import echo_spec
from engine.exec.wire import StepPlan, StepResult
from engine.models.registry import read_spec
from engine.request import Request, Sampling

#: Milliseconds: about a 0.6B model in bf16 on two cores (64 decoding rows: 250 ms a step, of which most is
#: paid for reading the weights; 330 prompt tokens a second more).
FIXED_MS, TOKEN_MS, ROW_MS = 120.0, 1.4, 0.6
BLOCK = 16
TARGETS = {"prefixes": 2.0, "tail": 1.2}


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """Rows as (prompt, output tokens), and the engine that takes them."""

    rows: list[tuple[list[int], int]]
    kv_blocks: int
    max_num_seqs: int
    budget: int


def prefixes(rng: random.Random, vocab: int, rows: int, groups: int, length: int, held: int) -> Case:
    """`rows` rows, each one of `groups` prefixes of `length` tokens and a few of its own."""
    shared = [_ids(rng, length, vocab) for _ in range(groups)]
    made = [
        (shared[i % groups] + _ids(rng, rng.randint(8, 48), vocab), rng.randint(4, 16)) for i in range(rows)
    ]
    rng.shuffle(made)
    return Case(made, held * length // BLOCK, 64, 1024)


def tail(rng: random.Random, vocab: int, rows: int, shortest: int, longest: int, slots: int) -> Case:
    """`rows` rows without shared prefixes, in `slots` places."""
    made = [
        (_ids(rng, rng.randint(16, 64), vocab), min(longest, int(shortest / (1 - rng.random()))))
        for _ in range(rows)
    ]
    blocks = slots * -(-(64 + longest) // BLOCK)
    return Case(made, blocks, slots, 1024)


class SimulatedRanks:
    """Implements `engine.exec.base.Executor`: answers at once and counts what a step would have cost."""

    overlap_depth = 0

    def __init__(self, blocks: int) -> None:
        self.num_kv_blocks = blocks + 1
        self.seconds = 0.0
        self.tokens = 0
        self._results: deque[StepResult] = deque()

    def start(self) -> list[RankReport]:
        return [RankReport(0, "cpu", "here", 0.0, 0.0, self.num_kv_blocks, 0.0, "none")]

    def submit(self, plan: StepPlan) -> None:
        sampled = [(s.row, 7) for s in plan.steps if s.sample]
        self.tokens += plan.tokens
        self.seconds += (FIXED_MS + TOKEN_MS * plan.tokens + ROW_MS * len(sampled)) / 1e3
        self._results.append(StepResult(plan.step, sampled))

    def result(self) -> StepResult:
        return self._results.popleft()

    def stop(self) -> None:
        pass


def simulate(case: Case, lookahead: int) -> dict[str, Any]:
    config = EngineConfig(
        model="simulated", lookahead=lookahead, block_size=BLOCK, num_kv_blocks=case.kv_blocks + 1,
        max_num_seqs=case.max_num_seqs, max_num_batched_tokens=case.budget,
    )  # fmt: skip
    ranks = SimulatedRanks(case.kv_blocks)
    engine = Engine(config, echo_spec(32_000), ranks)
    engine.start()
    seconds = _drain(engine, case)
    return _told(engine, ranks.seconds) | {"planner_ms_per_row": round(1e3 * seconds / len(case.rows), 3)}


def _drain(engine: Engine, case: Case) -> float:
    """Seconds of this process' CPU, simulated ranks included."""
    for i, (prompt, output) in enumerate(case.rows):
        engine.add(Request(f"r{i}", prompt, Sampling(max_tokens=output, temperature=0.0)))
    began = time.process_time()
    engine.drain()
    return time.process_time() - began


def _told(engine: Engine, seconds: float) -> dict[str, Any]:
    stats = engine.stats
    return {
        "seconds": round(seconds, 3),
        "out_tok_s": round(stats.output_tokens / seconds, 1),
        "steps": stats.steps,
        "prefill_tokens": stats.prefill_tokens,
        "prefix_hit_rate": round(stats.prefix_hit_rate, 3),
        "preemptions": stats.preemptions,
    }


class Real:
    """One engine on a model, emptied between runs; its order is switched by the look-ahead."""

    def __init__(self, model: str, case: Case, threads: int | None) -> None:
        from engine.exec.inproc import InprocExecutor

        config = EngineConfig(
            model=model, block_size=BLOCK, num_kv_blocks=case.kv_blocks + 1, num_threads=threads,
            max_num_seqs=case.max_num_seqs, max_num_batched_tokens=case.budget,
        )  # fmt: skip
        self.case, self.spec = case, read_spec(model)
        self.executor: Executor = InprocExecutor(config, self.spec)
        self.executor.start()
        self.config = config

    def run(self, lookahead: int) -> dict[str, Any]:
        engine = Engine(
            dataclasses.replace(self.config, lookahead=lookahead), self.spec, _Started(self.executor)
        )
        engine.start()
        for i, (prompt, output) in enumerate(self.case.rows):
            engine.add(Request(f"r{i}", prompt, Sampling(max_tokens=output, temperature=0.0)))
        began = time.perf_counter()
        engine.drain()
        return _told(engine, time.perf_counter() - began)


class _Started:
    """An executor whose ranks stand already, and stay when an engine ends. Step numbers go on."""

    def __init__(self, ranks: Executor) -> None:
        self._ranks = ranks
        self.submit, self.result, self.stop = ranks.submit, ranks.result, lambda: None

    def start(self) -> list[RankReport]:
        return []

    @property
    def num_kv_blocks(self) -> int:
        return self._ranks.num_kv_blocks

    @property
    def overlap_depth(self) -> int:
        return self._ranks.overlap_depth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", metavar="DIR", help="compute with this model instead of simulating")
    parser.add_argument("--lookahead", type=int, nargs="+", default=[256, 512, 2048], metavar="N")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--repeat", type=int, default=3, metavar="N", help="with --model: times that orders alternate"
    )
    parser.add_argument("--num-threads", type=int, help="with --model: CPU threads")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    if args.model:
        vocab = read_spec(args.model).vocab_size
        cases = {
            "prefixes": prefixes(rng, vocab, 200, 20, 256, 4),
            "tail": tail(rng, vocab, 128, 8, 512, 16),
        }
    else:
        cases = {
            "prefixes": prefixes(rng, 32_000, 2000, 100, 512, 20),
            "tail": tail(rng, 32_000, 1000, 16, 1024, 64),
        }
    for name, case in cases.items():
        for line in _compared(case, args):
            print(
                json.dumps({"case": name, "rows": len(case.rows)} | line | {"target": TARGETS[name]}),
                flush=True,
            )


def _compared(case: Case, args: argparse.Namespace) -> list[dict[str, Any]]:
    if not args.model:
        cost = {"fixed_ms": FIXED_MS, "ms_per_token": TOKEN_MS, "ms_per_row": ROW_MS}
        first = simulate(case, 0)
        return [
            {"ranks": "simulated", "cost": cost, "lookahead": n, "fcfs": first, "planned": planned,
             "ratio": round(first["seconds"] / planned["seconds"], 3)}
            for n in args.lookahead
            for planned in [simulate(case, n)]
        ]  # fmt: skip
    real, out = Real(args.model, case, args.num_threads), []
    for n in args.lookahead:
        pairs = [(real.run(0), real.run(n)) for _ in range(args.repeat)]
        ratio = statistics.median(first["seconds"] / planned["seconds"] for first, planned in pairs)
        out.append({
            "ranks": Path(args.model).name, "lookahead": n, "fcfs": pairs[-1][0], "planned": pairs[-1][1],
            "ratio": round(ratio, 3),
        })  # fmt: skip
    real.executor.stop()
    return out


def _ids(rng: random.Random, count: int, vocab: int) -> list[int]:
    return [rng.randrange(100, min(vocab, 31_000)) for _ in range(count)]


if __name__ == "__main__":
    main()
