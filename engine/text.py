"""The bridge between jobs and the engine core: text becomes token ids, and ids become completions.

`prepare` turns a `headrace.messages.Job` into the core's requests and refuses, with a stable code, what
this model cannot run; `complete` and `failure` build the one completion of a job. Pure and thread-safe:
no Redis, no clock but for time stamps. Called by `engine.service`, off the step loop; the core stays
ignorant of text.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

from engine.config import ModelSpec
from engine.detokenizer import decode, token_text
from engine.errors import InvalidRequest
from engine.monitor import TextMonitor
from engine.prompt import check_ids, no_tokenizer, output_tokens, prompt_ids
from engine.request import FinishReason, Request, Sampling, TokenLogprobs
from engine.tokenizer import Tokenizer, eos_token_ids
from headrace.messages import (
    Choice,
    Completion,
    ErrorInfo,
    Job,
    Kind,
    SamplingParams,
    Status,
    Timings,
    TokenLogprob,
    Usage,
)

#: Stands for minus infinity (a token that was masked out), which JSON does not have; as in the OpenAI API.
LOWEST_LOGPROB = -9999.0


@dataclass(slots=True)
class Prepared:
    """One job, ready for the core: its prompt's ids and one request per choice, in order."""

    prompt: list[int]
    requests: list[Request]


def prepare(job: Job, tokenizer: Tokenizer | None, spec: ModelSpec, context_length: int) -> Prepared:
    """The core's requests for a job.

    `context_length`: tokens that prompt and output may have together. Raises InvalidRequest with one of
    empty_prompt, prompt_too_long, max_tokens_too_large, min_tokens_too_large, token_out_of_range,
    no_tokenizer, no_chat_template, chat_template_failed, and what else a tokenizer refuses.
    """
    params = job.params
    check_ids(params.stop_token_ids, "stop_token_ids", spec)
    check_ids([int(k) for k in params.logit_bias], "logit_bias", spec)
    if tokenizer is None and params.stop:
        raise no_tokenizer("stop strings")
    prompt, score_from = prompt_ids(job, tokenizer, spec, context_length)
    if not prompt:
        raise InvalidRequest("empty_prompt", "the prompt has no tokens: send at least one")
    check_ids(prompt, "the prompt", spec)
    max_tokens = output_tokens(job, len(prompt), context_length)
    requests = []
    for index in range(params.n if score_from is None else 1):
        sampling = _sampling(job, index, max_tokens, score_from, tokenizer, spec)
        monitor = None
        if tokenizer and params.stop and score_from is None:
            monitor = TextMonitor(tokenizer, params, _continued(job, prompt))
        requests.append(Request(f"{job.id}/{index}", prompt, sampling, monitor, run=job.run))
    return Prepared(prompt, requests)


def complete(
    job: Job,
    prepared: Prepared,
    tokenizer: Tokenizer | None,
    *,
    engine: str = "",
    model: str = "",
    attempts: int = 1,
    leased: float | None = None,
) -> Completion:
    """The completion of a job whose requests have all finished (or of which one failed).

    `leased`: unix seconds. A request that ended in error or was cancelled decides the job's status.
    """
    requests = prepared.requests
    done = failure(
        job, "", "", status=Status.OK, engine=engine, model=model, attempts=attempts, leased=leased
    )
    score = requests[0].sampling.score_from is not None
    first = [r.first_token_at for r in requests if r.first_token_at is not None]
    done.timings.first_token = _unix(min(first)) if first else None
    done.usage = Usage(
        prompt_tokens=len(prepared.prompt),
        cached_tokens=min(r.cached for r in requests),
        completion_tokens=sum(len(r.output) for r in requests),
    )
    if failed := next((r for r in requests if r.finish is FinishReason.ERROR), None):
        code, message = failed.error or ("engine_error", "the engine gave no reason")
        done.status, done.error = Status.ERROR, ErrorInfo(code=code, message=message)
        return done
    if any(r.finish is FinishReason.CANCELLED for r in requests):
        done.status = Status.CANCELLED
        return done
    if score:
        done.choices = [_scored(job, requests[0], tokenizer)]
    else:
        done.choices = [_choice(job, i, r, prepared.prompt, tokenizer) for i, r in enumerate(requests)]
    if job.params.return_token_ids:
        done.prompt_token_ids = prepared.prompt
    if job.params.prompt_logprobs is not None:
        at = requests[0].prompt_logprobs
        done.prompt_logprobs = [
            _logprob(at[i], tokenizer) if i in at else None for i in range(len(prepared.prompt))
        ]
    return done


def failure(
    job: Job,
    code: str,
    message: str,
    *,
    status: Status = Status.ERROR,
    engine: str = "",
    model: str = "",
    attempts: int = 1,
    leased: float | None = None,
) -> Completion:
    """The completion of a job that has no answer; `code` "" leaves `error` out."""
    return Completion(
        id=job.id,
        run=job.run,
        lane=job.lane,
        kind=job.kind,
        status=status,
        error=ErrorInfo(code=code, message=message) if code else None,
        attempts=attempts,
        timings=Timings(enqueued=job.enqueued, leased=leased, finished=time.time()),
        engine=engine,
        model=model,
        reply_to=job.reply_to,
        meta=job.meta,
    )


def seed_of(job: Job, index: int) -> int:
    """63 bits for choice `index`: the job's own seed for the first, a mix of it for each further one.

    A job without a seed takes a hash of its id, so that a retry draws the same tokens.
    """
    seed = job.params.seed
    if seed is None:
        seed = _hash63(f"job {job.id}")
    return seed & (1 << 63) - 1 if index == 0 else _hash63(f"choice {seed} {index}")


# -- job to requests -----------------------------------------------------------------------------


def _sampling(
    job: Job,
    index: int,
    max_tokens: int,
    score_from: int | None,
    tokenizer: Tokenizer | None,
    spec: ModelSpec,
) -> Sampling:
    p = job.params
    stops = set(p.stop_token_ids)
    if not p.ignore_eos:
        stops.update(eos_token_ids(spec, tokenizer))
    if tokenizer:
        stops.update(_stop_tokens(p, tokenizer))
    return Sampling(
        max_tokens=max_tokens,
        temperature=p.temperature,
        top_k=p.top_k if 0 < p.top_k < spec.vocab_size else 0,
        top_p=p.top_p,
        min_p=p.min_p,
        presence_penalty=p.presence_penalty,
        frequency_penalty=p.frequency_penalty,
        repetition_penalty=p.repetition_penalty,
        logit_bias={int(k): v for k, v in p.logit_bias.items()},
        seed=seed_of(job, index),
        stop_token_ids=tuple(sorted(stops)),
        min_tokens=p.min_tokens,
        logprobs=p.logprobs,
        prompt_logprobs=p.prompt_logprobs,
        score_from=score_from,
    )


def _stop_tokens(params: SamplingParams, tokenizer: Tokenizer) -> dict[int, str]:
    """Stop strings that name a special token: its text may never show, so it stops by its id as well."""
    found = ((tokenizer.token_id(s), s) for s in params.stop)
    return {i: s for i, s in found if i is not None}


def _continued(job: Job, prompt: list[int]) -> list[int] | None:
    """What an output's text goes on from: a chat turn stands alone, a completion continues its prompt."""
    return None if job.kind is Kind.CHAT else prompt


# -- requests to completion ----------------------------------------------------------------------


def _choice(job: Job, index: int, request: Request, prompt: list[int], tokenizer: Tokenizer | None) -> Choice:
    params = job.params
    choice = Choice(index=index, finish_reason=request.finish.value if request.finish else None)
    if tokenizer is None or params.return_token_ids:
        choice.token_ids = list(request.output)
    if params.logprobs is not None:
        choice.logprobs = [_logprob(t, tokenizer) for t in request.logprobs]
    if tokenizer is not None:
        choice.text, choice.stop_reason = _text(job, request, prompt, tokenizer)
    elif (last := _stop_token(request)) in params.stop_token_ids:
        choice.stop_reason = last
    return choice


def _text(
    job: Job, request: Request, prompt: list[int], tokenizer: Tokenizer
) -> tuple[str, str | int | None]:
    """A choice's text and its stop reason: the string or id that the job named, None for EOS.

    The core leaves the stopping token in the output; its text is hidden unless
    include_stop_str_in_output is set.
    """
    params = job.params
    monitor = request.monitor
    if isinstance(monitor, TextMonitor) and monitor.stop is not None:
        return monitor.text, monitor.stop
    include = params.include_stop_str_in_output
    ids = request.output
    reason: str | int | None = None
    shown = ""
    if (last := _stop_token(request)) is not None:
        reason = _stop_tokens(params, tokenizer).get(last)
        if reason is not None:
            ids, shown = ids[:-1], str(reason) if include else ""
        else:
            ids = ids if include else ids[:-1]
            reason = last if last in params.stop_token_ids else None
    skip = params.skip_special_tokens
    return decode(tokenizer, ids, skip_special=skip, after=_continued(job, prompt)) + shown, reason


def _stop_token(request: Request) -> int | None:
    """The token id that ended the row, where one did."""
    stopped = request.finish is FinishReason.STOP and bool(request.output)
    last = request.output[-1] if stopped else None
    return last if last in request.sampling.stop_token_ids else None


def _scored(job: Job, request: Request, tokenizer: Tokenizer | None) -> Choice:
    start = request.sampling.score_from or 1
    scored = [request.prompt_logprobs[i] for i in range(start, len(request.prompt))]
    choice = Choice(
        score=sum(max(t.logprob, LOWEST_LOGPROB) for t in scored),
        is_greedy=all(t.rank == 1 for t in scored),
    )
    if job.params.return_token_ids:
        choice.token_ids = request.prompt[start:]
    if job.params.logprobs is not None:
        choice.logprobs = [_logprob(t, tokenizer) for t in scored]
    return choice


def _logprob(t: TokenLogprobs, tokenizer: Tokenizer | None) -> TokenLogprob:
    def text(token_id: int) -> str | None:
        return token_text(tokenizer, token_id) if tokenizer else None

    return TokenLogprob(
        token_id=t.token_id,
        token=text(t.token_id),
        logprob=max(t.logprob, LOWEST_LOGPROB),
        rank=t.rank,
        top=[(i, text(i), max(value, LOWEST_LOGPROB)) for i, value in t.top],
    )


def _unix(monotonic: float) -> float:
    """Unix seconds of a moment on the monotonic clock."""
    return time.time() - (time.monotonic() - monotonic)


def _hash63(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
