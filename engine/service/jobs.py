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
from engine.service.held import Held
from engine.text import complete, failure, prepare
from engine.tokenizer import Tokenizer
from headrace.errors import InvalidJob
from headrace.messages import NAME_PATTERN, Completion, ErrorInfo, Job, Status, Timings
from headrace.settings import Settings

log = logging.getLogger("headrace.jobs")


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

    def prepare(self, held: Held) -> list[Request]:
        """The requests to run; none where the job ends at once, with `held.completion` set."""
        try:
            held.job = job = Job.parse(held.leased.raw)
        except InvalidJob as e:
            held.completion = self._unreadable(held, e)
            return []
        if job.lane != self.settings.lane:
            message = f"the job names lane {job.lane}, and stands in lane {self.settings.lane}"
            held.completion = self._failure(held, "wrong_lane", message)
            return []
        if held.leased.failed >= self.settings.max_attempts:
            message = f"{held.leased.failed} deliveries ended in the death of an engine or rank"
            held.completion = self._failure(held, "too_many_attempts", message, Status.DEAD)
            return []
        if job.deadline is not None and time.time() > job.deadline:
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
            held.completion = self._failure(
                held, "internal_error", f"{type(e).__name__}: see the engine's log"
            )
            return []
        for i, request in enumerate(held.prepared.requests):
            # by entry, not by job: after a run was forgotten, two entries may carry one job id
            request.id = f"{held.leased.stream} {held.leased.entry_id} {i}"
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
            return complete(
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
            return self._failure(held, "internal_error", f"{type(e).__name__}: see the engine's log")

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


def _fields(raw: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _name(value: Any) -> str | None:
    return value if isinstance(value, str) and re.fullmatch(NAME_PATTERN, value) else None
