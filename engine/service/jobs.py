"""From a leased entry to the core's requests, and from finished requests to the completion.

Nothing that stands in a stream may stop the engine: what cannot be read or run ends as an error
completion here, routed by whatever of the job could be read. Knows no Redis.
"""

from __future__ import annotations

import logging
import re
import time
from typing import Any

import orjson

from engine.config import ModelSpec
from engine.errors import EngineError, InvalidRequest
from engine.request import Request
from engine.service.clock import ServerClock
from engine.service.held import Held
from engine.service.process import build
from engine.text import complete, failure, prepare
from engine.tokenizer import Tokenizer
from headrace.errors import InvalidJob
from headrace.messages import NAME_PATTERN, VERSION, Completion, ErrorInfo, Job, Priority, Status, Timings
from headrace.settings import Settings

log = logging.getLogger("headrace.jobs")

#: Priorities as the core counts them: lower goes first.
_RANK = {priority: rank for rank, priority in enumerate(Priority)}
#: Code of what went wrong in the engine and not in the job: it is tried again.
INTERNAL = "internal_error"


class Jobs:
    """Prepares and completes jobs for one model. Thread-safe."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        spec: ModelSpec,
        context: int,
        engine: str,
        model: str,
        settings: Settings,
    ) -> None:
        self.tokenizer, self.spec, self.context = tokenizer, spec, context
        self.engine, self.model, self.settings = engine, model, settings
        self.clock = ServerClock()

    def prepare(self, held: Held) -> list[Request]:
        """The requests to run; none where the job ends at once, with `held.completion` set, or is `newer`."""
        try:
            held.job = job = Job.parse(held.leased.raw)
        except InvalidJob as e:
            held.newer = _newer(held.leased.raw)
            held.completion = self._unreadable(held, e)
            return []
        if job.lane != self.settings.lane:
            message = f"the job names lane {job.lane}, and stands in lane {self.settings.lane}"
            held.completion = self._failure(held, "wrong_lane", message)
            return []
        attempts = held.leased.attempts
        if attempts.proven:
            message = f"an engine or a rank died under this job {attempts.crashes} times, the last time alone"
            held.completion = self._failure(held, "crashes_engine", message, Status.DEAD)
            return []
        if held.leased.cancelled:
            message = "the job was cancelled while it waited"
            held.completion = self._failure(held, "cancelled", message, Status.CANCELLED)
            return []
        if job.deadline is not None and self.clock.now() > job.deadline:
            message = "the deadline had passed when an engine was free"
            held.completion = self._failure(held, "deadline_exceeded", message, Status.EXPIRED)
            return []
        try:
            held.prepared = prepare(job, self.tokenizer, self.spec, self.context)
        except InvalidRequest as e:
            held.completion = self._failure(held, e.code, str(e))
            return []
        except Exception as e:  # one bad row must not stop the engine, whatever a tokenizer makes of it
            log.exception("prepare_failed job=%s", job.id)
            held.completion = self._failure(held, INTERNAL, f"{type(e).__name__}: see the engine's log")
            return []
        for i, request in enumerate(held.prepared.requests):
            # by entry, not by job: after a run was forgotten, two entries may carry one job id
            request.id = f"{held.leased.stream} {held.leased.entry_id} {i}"
            request.salt = (job.tenant or "").encode()  # what a tenant's prompts share, others cannot time
            request.priority = _RANK[job.priority]
        return held.prepared.requests

    def refuse(self, held: Held, error: EngineError) -> None:
        """The core does not take the job."""
        held.completion = self._failure(held, getattr(error, "code", "refused"), str(error))

    def completion(self, held: Held) -> Completion:
        if held.completion is not None:
            return held.completion
        assert held.job is not None
        assert held.prepared is not None
        try:
            done = complete(
                held.job,
                held.prepared,
                self.tokenizer,
                engine=self.engine,
                model=self.model,
                attempts=held.leased.failed + 1,
                leased=held.leased_at,
            )
        except Exception as e:  # as above, on the way out
            log.exception("complete_failed job=%s", held.job.id)
            return self._failure(held, INTERNAL, f"{type(e).__name__}: see the engine's log")
        deadline = held.job.deadline
        if held.stopped is Status.CANCELLED:
            return ended_early(done, Status.CANCELLED, "cancelled", "the job was cancelled while it ran")
        if held.stopped is Status.EXPIRED or (deadline is not None and self.clock.now() > deadline):
            message = "the deadline passed while the job ran"
            return ended_early(done, Status.EXPIRED, "deadline_exceeded", message)
        return done

    def again(self, held: Held, completion: Completion) -> bool:
        """Whether the job is to be tried again instead of ending like this."""
        failed = completion.error is not None and completion.error.code == INTERNAL
        return failed and held.leased.attempts.errors + 1 < self.settings.max_attempts

    def letter(self, held: Held, completion: Completion) -> dict[str, Any] | None:
        """What a dead letter should say of the job, without its bytes; None where it leaves none."""
        error = completion.error
        given_up = completion.status is Status.DEAD or held.job is None
        if error is None or not (given_up or error.code == INTERNAL):
            return None
        return {
            "id": completion.id, "run": completion.run, "status": completion.status.value, "code": error.code,
            "message": error.message, "engine": self.engine, "model": self.model, "build": build(),
            "at": round(self.clock.now(), 3),
        }  # fmt: skip

    def _failure(self, held: Held, code: str, message: str, status: Status = Status.ERROR) -> Completion:
        assert held.job is not None
        return failure(
            held.job,
            code,
            message,
            status=status,
            engine=self.engine,
            model=self.model,
            attempts=held.leased.failed + 1,
            leased=held.leased_at,
        )

    def _unreadable(self, held: Held, error: InvalidJob) -> Completion:
        """A completion for bytes that are no job, with what id, run and route they name."""
        entry = held.leased.entry_id
        seen = _fields(held.leased.raw)
        log.warning("unreadable_job entry=%s code=%s", entry, error.code)
        return Completion(
            id=_name(seen.get("id")) or f"unreadable-{entry}",
            run=_name(seen.get("run")) or "unreadable",
            lane=self.settings.lane,
            status=Status.ERROR,
            error=ErrorInfo(code=error.code, message=str(error)),
            attempts=held.leased.failed + 1,
            timings=Timings(leased=held.leased_at, finished=time.time()),
            engine=self.engine,
            model=self.model,
            reply_to=_name(seen.get("reply_to")),
            meta=meta if isinstance(meta := seen.get("meta"), dict) else {},
        )


def ended_early(done: Completion, status: Status, code: str, message: str) -> Completion:
    """The completion of a job that ran, but not to its end; what it made until then is only counted."""
    error = ErrorInfo(code=code, message=message)
    update = {
        "status": status,
        "error": error,
        "choices": [],
        "prompt_logprobs": None,
        "prompt_token_ids": None,
    }
    return done.model_copy(update=update)


def _newer(raw: bytes) -> bool:
    """Whether the bytes are a job of a version that came after this engine's."""
    v = _fields(raw).get("v")
    return isinstance(v, int) and not isinstance(v, bool) and v > VERSION


def _fields(raw: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _name(value: Any) -> str | None:
    return value if isinstance(value, str) and re.fullmatch(NAME_PATTERN, value) else None
