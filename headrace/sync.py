"""`SyncClient`: what `headrace.client` does, for programs without asyncio. A loop in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from headrace.client import Client
from headrace.durable import Ack
from headrace.ledger import RunProgress
from headrace.messages import Completion, Job

T = TypeVar("T")


class SyncClient:
    """`Client` for programs without asyncio: the same verbs, blocking. A context manager; thread-safe."""

    def __init__(self, url: str | None = None, lane: str | None = None, timeout: float = 60.0) -> None:
        self._client = Client(url, lane, timeout)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="headrace-client", daemon=True)

    def __enter__(self) -> SyncClient:
        self._thread.start()
        self._wait(self._client.__aenter__())
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._wait(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def reply_to(self) -> str:
        return self._client.reply_to

    def generate(self, prompt: str | Sequence[int], **fields: Any) -> Completion:
        return self._wait(self._client.generate(prompt, **fields))

    def chat(self, messages: Sequence[Mapping[str, Any]], **fields: Any) -> Completion:
        return self._wait(self._client.chat(messages, **fields))

    def score(self, prompt: str, continuation: str, **fields: Any) -> Completion:
        return self._wait(self._client.score(prompt, continuation, **fields))

    def result(self, job_id: str, timeout: float | None = None) -> Completion:
        return self._wait(self._client.result(job_id, timeout))

    def submit(self, job: Job | Mapping[str, Any], ack: Ack = "memory") -> str:
        return self._wait(self._client.submit(job, ack))

    def submit_many(self, jobs: Iterable[Job | Mapping[str, Any]], ack: Ack = "memory") -> Counter[str]:
        return self._wait(self._client.submit_many(jobs, ack))

    def cancel(self, job_id: str, run: str | None = None) -> str:
        return self._wait(self._client.cancel(job_id, run))

    def cancel_run(self, run: str) -> None:
        self._wait(self._client.cancel_run(run))

    def progress(self, run: str) -> RunProgress:
        return self._wait(self._client.progress(run))

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
