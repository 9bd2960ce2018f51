"""An executor without a model: a row's output repeats its prompt, then ends. For tests of all that stands
above a model.

It checks plans as strictly as a worker trusts them: rows, block tables, and that every position is
computed once; and it keeps a mark for each slot of its KV cache, so that a row which would read a block
with another sequence's tokens in it raises EngineError.
"""

from __future__ import annotations

import os
import time
from collections import deque
from dataclasses import dataclass, field

from engine.config import NULL_BLOCK, EngineConfig, ModelSpec, RopeSpec
from engine.errors import EngineError, WorkerDied
from engine.exec.base import RankReport
from engine.exec.wire import NewRow, RowStep, StepPlan, StepResult
from engine.request import Sampling, TokenLogprobs

#: KV blocks where the settings name no number.
DEFAULT_BLOCKS = 1024
#: What logprobs are asked for is answered with this.
LOGPROB = -0.5


def echo_spec(vocab_size: int = 256, max_position: int = 4096) -> ModelSpec:
    """A shape for the toy model, whose vocabulary and context are all that matters."""
    return ModelSpec(
        "Echo", vocab_size, 8, 8, 1, 1, 1, 8, max_position, 1e-6, RopeSpec(),
        eos_token_ids=(vocab_size - 1,),
    )  # fmt: skip


def echo_token(prompt: list[int], index: int, sampling: Sampling) -> int:
    """Output token `index` (from 0): the prompt once, then the first stop token id; where there is none,
    or min_tokens is not reached, the prompt again."""
    if index >= max(len(prompt), sampling.min_tokens) and sampling.stop_token_ids:
        return sampling.stop_token_ids[0]
    return prompt[index % len(prompt)]


@dataclass(slots=True)
class _Row:
    tokens: list[int]
    prompt_len: int
    sampling: Sampling
    computed: int
    blocks: list[int]
    serial: int  # of this stay in the row; never used twice
    marks: list[int] = field(default_factory=list)  # by position: names all tokens up to there


class EchoExecutor:
    """Implements `engine.exec.base.Executor`.

    `step_seconds`: time that each step takes. `die_at_step`: the rank dies in this step. `poison`: a token
    id whose rows get logits that are not finite.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        step_seconds: float = 0.0,
        die_at_step: int | None = None,
        poison: int | None = None,
    ) -> None:
        self.config = config
        self.step_seconds = step_seconds
        self.die_at_step = die_at_step
        self.poison = poison
        self.computed_tokens = 0
        self.most_under_way = 0
        self._stays = 0
        self._rows: list[_Row | None] = [None] * config.max_num_seqs
        self._slots: list[list[int | None]] = []
        self._results: deque[tuple[StepResult, dict[int, int]]] = deque()  # with block -> writer's serial

    def start(self) -> list[RankReport]:
        blocks = self.config.num_kv_blocks or DEFAULT_BLOCKS
        self._slots = [[None] * self.config.block_size for _ in range(blocks)]
        return [RankReport(0, "cpu", "localhost", 0.0, 0.0, blocks, 0.0, "echo", os.getpid())]

    def submit(self, plan: StepPlan) -> None:
        if not self._slots:
            raise WorkerDied(0, "it was stopped, or never started")
        if self.die_at_step is not None and plan.step >= self.die_at_step:
            raise WorkerDied(0, f"told to die at step {self.die_at_step}")
        if self.step_seconds:
            time.sleep(self.step_seconds)
        for row in plan.finished:
            if self._rows[row] is None:
                raise EngineError(f"row {row} ends and was empty")
            self._rows[row] = None
        for new in plan.new:
            self._enter(new)
        if len({step.row for step in plan.steps}) != len(plan.steps):
            raise EngineError(f"step {plan.step} names a row twice: {[step.row for step in plan.steps]}")
        if plan.tokens > self.config.max_num_batched_tokens:
            raise EngineError(f"step {plan.step} computes {plan.tokens} tokens, more than the budget")
        result = StepResult(plan.step, [])
        writes: dict[int, int] = {}
        for step in plan.steps:
            self._compute(step, result, writes)
        self.computed_tokens += plan.tokens
        self._results.append((result, writes))
        self.most_under_way = max(self.most_under_way, len(self._results))

    def result(self) -> StepResult:
        return self._results.popleft()[0]

    @property
    def num_kv_blocks(self) -> int:
        return len(self._slots)

    @property
    def overlap_depth(self) -> int:
        return self.config.overlap_depth or 0

    def stop(self) -> None:
        self._slots.clear()
        self._results.clear()

    # -- the toy worker --------------------------------------------------------------------------

    def _enter(self, new: NewRow) -> None:
        if self._rows[new.row] is not None:
            raise EngineError(f"row {new.row} is given away and still in use")
        self._stays += 1
        # The plan's lists are this side's own: were they the scheduler's, both would lengthen them.
        row = _Row(new.tokens, new.prompt_len, new.sampling, new.computed, new.blocks, self._stays)
        for token in row.tokens:
            row.marks.append(_mark(row.marks[-1] if row.marks else 0, token))
        self._rows[new.row] = row

    def _compute(self, step: RowStep, result: StepResult, writes: dict[int, int]) -> None:
        row = self._rows[step.row]
        if row is None:
            raise EngineError(f"row {step.row} computes and is empty")
        row.blocks += step.new_blocks
        start, end = step.start, step.start + step.count
        if start != row.computed or step.count < 1 or end > len(row.tokens):
            raise EngineError(
                f"row {step.row} computes [{start}, {end}): {row.computed} of {len(row.tokens)} were computed"
            )
        self._read(row, start)
        self._write(row, start, end, writes)
        row.computed = end
        score_from = row.sampling.score_from
        if step.sample != (end == len(row.tokens) and score_from is None):
            raise EngineError(f"row {step.row} has sample {step.sample} at {end} of {len(row.tokens)} tokens")
        first = score_from if score_from is not None else 1
        if score_from is not None or row.sampling.prompt_logprobs is not None:
            for position in range(max(start + 1, first), min(end + 1, row.prompt_len)):
                entry = TokenLogprobs(row.tokens[position], LOGPROB, 1)
                result.prompt_logprobs.append((step.row, position, entry))
        if self.poison is not None and self.poison in row.tokens[start:end]:
            result.bad_rows.append((step.row, f"token {self.poison} is poison"))
        if step.sample:
            prompt = row.tokens[: row.prompt_len]
            token = echo_token(prompt, len(row.tokens) - row.prompt_len, row.sampling)
            row.tokens.append(token)
            row.marks.append(_mark(row.marks[-1], token))
            result.sampled.append((step.row, token))
            if row.sampling.logprobs is not None:
                result.logprobs.append((step.row, TokenLogprobs(token, LOGPROB, 1)))

    def _read(self, row: _Row, count: int) -> None:
        """Attention over the row's first `count` positions: each must hold this row's own tokens."""
        size = self.config.block_size
        for i, first in enumerate(range(0, count, size)):
            length = min(size, count - first)
            if self._slots[row.blocks[i]][:length] != row.marks[first : first + length]:
                raise EngineError(f"block {row.blocks[i]} does not hold the row's tokens from {first} on")

    def _write(self, row: _Row, start: int, end: int, writes: dict[int, int]) -> None:
        size = self.config.block_size
        if end > len(row.blocks) * size:
            raise EngineError(f"a row computes up to {end} and has {len(row.blocks)} blocks")
        for position in range(start, end):
            block = row.blocks[position // size]
            if block == NULL_BLOCK or writes.setdefault(block, row.serial) != row.serial:
                raise EngineError(f"block {block} is the null block, or two rows of this step write to it")
            for _, on_its_way in self._results:
                if on_its_way.get(block, row.serial) != row.serial:
                    raise EngineError(f"block {block} changed hands while a step that writes it is under way")
            self._slots[block][position % size] = row.marks[position]


def _mark(before: int, token: int) -> int:
    return hash((before, token))
