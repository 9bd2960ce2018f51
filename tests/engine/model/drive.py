"""Drives Workers by hand: what the scheduler and an executor do, for tests of one rank or a few.

`Driver` holds a pool of blocks and sends plans; `spawn` starts real gloo ranks that run one function.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from engine.attn.sdpa import SdpaBackend
from engine.config import EngineConfig
from engine.exec.base import RankReport
from engine.exec.wire import NewRow, RowStep, StepPlan, StepResult
from engine.load.shards import vocab_range
from engine.models.registry import read_spec
from engine.request import Sampling
from engine.worker.worker import Worker

GREEDY = Sampling(temperature=0.0)


class Probe(Worker):
    """A worker that can also show the logits of every token of its last step."""

    def load(self) -> RankReport:
        report = super().load()
        forward = self.model.forward

        def remembering(*args: Any) -> torch.Tensor:
            self.x_TD = forward(*args)
            return self.x_TD

        self.model.forward = remembering  # type: ignore[method-assign]
        return report

    @torch.inference_mode()
    def last_logits(self, tokens: int) -> torch.Tensor:
        """[tokens, vocabulary] of the last step, gathered over the ranks: all of them must call this."""
        start, end, size = vocab_range(self.spec.vocab_size, self.rank, self.world)
        rows = torch.zeros(tokens, size)
        rows[:, : end - start] = self._logits(self.x_TD, torch.arange(tokens))
        gathered = self.comm.all_gather(rows)
        return gathered.transpose(0, 1).reshape(tokens, -1)[:, : self.spec.vocab_size]

    def probe(self, plan: StepPlan) -> torch.Tensor:
        """Run a plan for its logits only."""
        self.run(plan)
        return self.last_logits(plan.tokens)


class Driver:
    """Rows on one worker (or on all ranks alike), with blocks handed out in a shuffled order."""

    def __init__(self, worker: Worker, num_blocks: int) -> None:
        self.worker = worker
        self.block_size = worker.config.block_size
        order = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(5)) + 1
        self.free: list[int] = order.tolist()
        self.blocks: dict[int, list[int]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.prompt_len: dict[int, int] = {}
        self.computed: dict[int, int] = {}
        self.sampling: dict[int, Sampling] = {}
        self.entering: list[int] = []
        self.leaving: list[int] = []
        self.step = 0

    def enter(
        self, row: int, tokens: list[int], prompt_len: int | None = None, sampling: Sampling = GREEDY
    ) -> None:
        self.tokens[row], self.computed[row], self.blocks[row] = list(tokens), 0, []
        self.prompt_len[row], self.sampling[row] = prompt_len or len(tokens), sampling
        self.entering.append(row)

    def leave(self, row: int) -> list[int]:
        """Free the row; returns its tokens."""
        self.free.extend(self.blocks.pop(row))
        self.leaving.append(row)
        del self.computed[row], self.sampling[row]
        return self.tokens.pop(row)

    def plan(self, counts: dict[int, int]) -> StepPlan:
        """Compute `counts[row]` more tokens of each row; the last known one is sampled from."""
        steps, new = [], []
        for row, count in counts.items():
            start = self.computed[row]
            need = -(-(start + count) // self.block_size) - len(self.blocks[row])
            fresh = [self.free.pop() for _ in range(need)]
            self.blocks[row] += fresh
            if row in self.entering:
                new.append(NewRow(
                    row, list(self.tokens[row]), self.prompt_len[row], start, fresh, self.sampling[row],
                ))  # fmt: skip
                fresh = []
            steps.append(RowStep(row, start, count, start + count == len(self.tokens[row]), fresh))
            self.computed[row] += count
        self.step += 1
        out = StepPlan(self.step, steps, new, self.leaving)
        self.entering = [row for row in self.entering if row not in counts]
        self.leaving = []
        return out

    def run(self, counts: dict[int, int]) -> StepResult | None:
        """One step; ranks other than 0 must be told the ids by `known`."""
        result = self.worker.run(self.plan(counts))
        if result is not None:
            for row, token in result.sampled:
                self.tokens[row].append(token)
        else:
            for row in counts:
                if self.computed[row] == len(self.tokens[row]):
                    self.tokens[row].append(-1)  # the rank takes it from its own last sample
        return result

    def generate(self, row: int, chunk: int, new_tokens: int) -> list[int]:
        """Prefill in chunks, then decode until the row has `new_tokens` more tokens."""
        target = len(self.tokens[row]) + new_tokens
        while len(self.tokens[row]) < target:
            self.run({row: min(chunk, len(self.tokens[row]) - self.computed[row])})
        return self.tokens[row][-new_tokens:]


def worker(
    folder: Path | str, rank: int = 0, world: int = 1, init_method: str | None = None, num_blocks: int = 64,
    group: Worker | None = None, sdpa: bool = False, **settings: Any,
) -> Probe:  # fmt: skip
    """A ready worker with `num_blocks` KV blocks; joins the group of an earlier worker of this process.

    `sdpa` takes the oracle's attention, whatever this machine would choose.
    """
    settings = {"num_threads": 1, "max_num_seqs": 64} | settings
    executor = "ray" if world > 1 else "inproc"
    config = EngineConfig(
        str(folder), executor=executor, tensor_parallel_size=world, num_kv_blocks=num_blocks, **settings
    )
    w = Probe(config, read_spec(folder), rank, world, init_method)
    if group is None:
        w.init_device()
    else:
        w.device, w.dtype, w.comm = group.device, group.dtype, group.comm
    w.load()
    if sdpa:
        w.attention = SdpaBackend(w.attention.shape)
    w.allocate(num_blocks)
    return w


def spawn(world: int, function: Callable[..., Any], *args: Any) -> None:
    """Run `function(rank, world, init_method, *args)` on `world` gloo ranks; raises what a rank raised."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(function, args=(world, f"tcp://127.0.0.1:{port}", *args), nprocs=world)
