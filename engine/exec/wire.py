"""What crosses between the driver and the ranks, as msgpack: plans out, results back.

A plan carries differences only. A worker keeps one permanent row per running request (its tokens,
block table and sampling state); a plan says which rows are new, which are gone, which blocks were
added, and how many tokens each row computes in this step. With overlap the driver does not know the
newest token of a decoding row when it plans: the worker takes it from its own last sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import msgpack

from engine.request import Sampling, TokenLogprobs

#: Bumped when the frames change; ranks refuse another version.
PROTOCOL = 1


@dataclass(frozen=True, slots=True)
class NewRow:
    """A request enters (or, after preemption, re-enters) a row."""

    row: int
    tokens: list[int]  # prompt, and after preemption the output so far
    prompt_len: int
    computed: int  # tokens whose KV already stands in `blocks` (prefix hits)
    blocks: list[int]
    sampling: Sampling


class RowStep(NamedTuple):
    """What one row computes in this step. A tuple, because a step makes, packs and unpacks one for each row.

    The row computes positions [start, start + count). `sample` says that the last of them is the last
    known token, so the row's next token is drawn: it becomes the token at position start + count.
    """

    row: int
    start: int
    count: int  # type: ignore[assignment]  # nobody counts values in this tuple
    sample: bool
    new_blocks: Sequence[int] = ()  # appended to the row's block table first


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Order of application: `finished`, then `new`, then `steps`."""

    step: int
    steps: list[RowStep]
    new: list[NewRow] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)  # rows freed (ended or preempted)

    @property
    def tokens(self) -> int:
        return sum(s.count for s in self.steps)


@dataclass(frozen=True, slots=True)
class StepResult:
    """Rank 0's answer to one plan.

    `sampled` has one (row, token id) for each RowStep with `sample`, in plan order (score rows have
    none: their RowStep never has `sample`). `prompt_logprobs` are (row, position, entry) for prompt
    positions whose logits this step computed; position p holds the log-probability of token p given the
    tokens before it. `bad_rows` are rows whose logits were not finite: (row, reason).
    """

    step: int
    sampled: list[tuple[int, int]]
    logprobs: list[tuple[int, TokenLogprobs]] = field(default_factory=list)
    prompt_logprobs: list[tuple[int, int, TokenLogprobs]] = field(default_factory=list)
    bad_rows: list[tuple[int, str]] = field(default_factory=list)
    seconds: float = 0.0  # device time of the step
    allreduces: int = 0


#: RowStep from a tuple, as its `_make` does, without a Python call for each row.
_row_step = partial(tuple.__new__, RowStep)


def pack_plan(plan: StepPlan) -> bytes:
    new = [(n.row, n.tokens, n.prompt_len, n.computed, n.blocks, n.sampling.to_wire()) for n in plan.new]
    return msgpack.packb((PROTOCOL, plan.step, plan.steps, new, plan.finished))


def unpack_plan(raw: bytes) -> StepPlan:
    version, step, steps, new, finished = msgpack.unpackb(raw, use_list=False, strict_map_key=False)
    if version != PROTOCOL:
        raise ValueError(f"step protocol {version}, this rank speaks {PROTOCOL}")
    return StepPlan(
        step,
        list(map(_row_step, steps)),
        [NewRow(r, list(t), p, c, list(b), Sampling.from_wire(s)) for r, t, p, c, b, s in new],
        list(finished),
    )


def _pack_logprobs(e: TokenLogprobs) -> tuple[Any, ...]:
    return (e.token_id, e.logprob, e.rank, e.top)


def _unpack_logprobs(raw: Any) -> TokenLogprobs:
    token_id, logprob, rank, top = raw
    return TokenLogprobs(token_id, logprob, rank, top)


def pack_result(r: StepResult) -> bytes:
    return msgpack.packb((
        PROTOCOL, r.step, r.sampled,
        [(row, _pack_logprobs(e)) for row, e in r.logprobs],
        [(row, pos, _pack_logprobs(e)) for row, pos, e in r.prompt_logprobs],
        r.bad_rows, r.seconds, r.allreduces,
    ))  # fmt: skip


def unpack_result(raw: bytes) -> StepResult:
    unpacked = msgpack.unpackb(raw, use_list=False)
    version, step, sampled, logprobs, prompt, bad, seconds, allreduces = unpacked
    if version != PROTOCOL:
        raise ValueError(f"step protocol {version}, this driver speaks {PROTOCOL}")
    return StepResult(
        step,
        list(sampled),
        [(row, _unpack_logprobs(e)) for row, e in logprobs],
        [(row, pos, _unpack_logprobs(e)) for row, pos, e in prompt],
        list(bad),
        seconds,
        allreduces,
    )
