"""Threads and signals of a command that has several parts: what fails in one is raised in the main thread.

Knows nothing of what the parts do.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Part:
    """A thread whose failure the main thread raises."""

    def __init__(self, name: str, work: Callable[[threading.Event], Any]) -> None:
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
        self._thread.start()

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def end(self, patience_s: float) -> None:
        self._stop.set()
        self._thread.join(patience_s)

    def _run(self, work: Callable[[threading.Event], Any]) -> None:
        try:
            work(self._stop)
        except BaseException as e:
            self._failure = e


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """SIGINT and SIGTERM, collected instead of raised: the main loop ends in order."""
    seen: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    old = [signal.signal(s, lambda number, _: seen.append(number)) for s in signals]
    try:
        yield seen
    finally:
        for s, handler in zip(signals, old, strict=True):
            signal.signal(s, handler)
