"""A plan on its way to the ranks, and what its result does to the rows: new tokens, and who ends.

Knows nothing of blocks and queues; `engine.sched.scheduler` keeps the flights and frees what ended rows
held.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.errors import EngineError
from engine.exec.wire import StepPlan, StepResult
from engine.request import FinishReason, Request


@dataclass(slots=True, eq=False)
class Flight:
    """A plan that was sent and whose result is not known yet."""

    plan: StepPlan
    rows: list[Request | None]  # who each of plan.steps is for; None once it has left its row
    filling: list[int]  # of those, indices of rows that this plan fills a block of
    computing: list[bytes] = field(default_factory=list)  # prefix blocks that it computes at known positions
    leaving: list[list[int]] = field(default_factory=list)  # block lists to release with the result


def land(flight: Flight, result: StepResult, now: float) -> tuple[list[Request], int]:
    """Give the rows their tokens and log-probabilities; `now` in time.monotonic() seconds.

    Returns (requests that ended, their `finish` set, tokens accepted). Entries of rows that left
    meanwhile are dropped. Raises EngineError when the result is not this plan's.
    """
    plan = flight.plan
    if result.step != plan.step:
        raise EngineError(f"the ranks answered step {result.step} where step {plan.step} was due")
    bad = dict(result.bad_rows)
    if result.logprobs or result.prompt_logprobs:
        _attach_logprobs(flight, result)
    tokens = dict(result.sampled)
    accepted = 0
    ended = []
    for (row, start, count, sample, _), req in zip(plan.steps, flight.rows, strict=True):
        if req is None:
            continue
        if bad and row in bad:
            fail(req, "non_finite_logits", f"the model's logits were not finite: {bad[row]}")
        elif sample:
            req.pending -= 1
            accepted += 1
            if (token := tokens.get(row)) is None:
                raise EngineError(f"step {plan.step}: the ranks drew no token for row {row}")
            _accept(req, token, now)
        elif req.sampling.score_from is not None and start + count == len(req.prompt):
            req.finish = FinishReason.LENGTH
        if req.finish is not None:
            req.finished_at = now
            ended.append(req)
    return ended, accepted


def fail(req: Request, code: str, message: str) -> None:
    req.finish = FinishReason.ERROR
    req.error = (code, message)


def _accept(req: Request, token: int, now: float) -> None:
    """One more output token, and whether the row ends with it."""
    output, sampling = req.output, req.sampling
    output.append(token)
    count = len(output)
    if count == 1:
        req.first_token_at = now
    if token in sampling.stop_token_ids and count >= sampling.min_tokens:
        req.finish = FinishReason.STOP
    elif count >= sampling.max_tokens:  # admission has made sure that the context is not full before
        req.finish = FinishReason.LENGTH
    if req.monitor is not None or req.on_token is not None:
        _tell(req, token)


def _tell(req: Request, token: int) -> None:
    """Show the token to those who asked. What they raise ends their own row and no other."""
    try:
        stopped = req.finish is FinishReason.STOP
        if req.monitor is not None and not stopped and req.monitor.push(token):
            req.finish = FinishReason.STOP
        if req.on_token is not None:
            req.on_token(req, token)
    except Exception as error:
        fail(req, "monitor_failed", f"the watcher of this row raised {type(error).__name__}: {error}")


def _attach_logprobs(flight: Flight, result: StepResult) -> None:
    rows = zip(flight.plan.steps, flight.rows, strict=True)
    present = {step.row: req for step, req in rows if req is not None}
    for row, entry in result.logprobs:
        if row in present:
            present[row].logprobs.append(entry)
    for row, position, entry in result.prompt_logprobs:
        if row in present:
            present[row].prompt_logprobs[position] = entry
