"""Which rank failed, and how that is known: Ray's word on ended calls, signs of life, the state of processes
on this node, and where a rank stands when a step takes too long.

The first culprit is named, not the bystander: a rank whose peer is gone fails in its next collective, or
waits there. Knows nothing of placement or of what a step computes.
"""

from __future__ import annotations

import os
import re
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil

from engine.errors import EngineError, WorkerDied
from engine.exec.channel import BEAT_S, DriverChannel
from engine.exec.rank import USER_ERRORS, Failure, Place

#: Seconds of silence after which a rank counts as hung: on another node; on this one, where it is looked at;
#: and while it starts, as imports and slow disks may hold Python's lock for long.
SILENCE_S, NEAR_SILENCE_S, START_SILENCE_S = 5.0, 30.0, 300.0
#: Seconds of silence after which a rank on this node is looked at: a stopped process is found by that.
LOOK_S = 1.5
#: Seconds to wait for the rank that is to blame, where all that is known is that a collective broke.
CULPRIT_S = 3.0
#: Lines that evidence has at most, and those at its end that tell where a rank stood.
_LINES, _TAIL = 40, 8
#: Bytes of a dead rank's log that are shown.
_LOG_BYTES = 2000
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")

#: How much an ended call explains, best first.
_REFUSED, _DIED, _RAISED, _BROKEN_COLLECTIVE = range(4)


@dataclass(frozen=True, slots=True, order=True)
class Cause:
    """Why a rank's call failed."""

    order: int
    rank: int
    error: EngineError = field(compare=False)


def cause_of(ref: Any, rank: int, logs: Mapping[int, str]) -> Cause | None:
    """Of an ended call; None when it ended well. `logs`: files of the ranks on this node, by rank."""
    import ray

    try:
        value = ray.get(ref)
    except ray.exceptions.RayError as e:
        return Cause(_DIED, rank, WorkerDied(rank, _last_words(str(e), logs.get(rank, ""))))
    if not isinstance(value, Failure):
        return None
    if value.kind:
        return Cause(_REFUSED, rank, USER_ERRORS[value.kind](value.text))
    order = _BROKEN_COLLECTIVE if _in_collective(value.text) else _RAISED
    return Cause(order, rank, WorkerDied(rank, _short(value.text)))


def first_cause(ranks: Mapping[Any, int], logs: Mapping[int, str]) -> Cause | None:
    """Of calls (their ranks by reference) of which one at least has ended. None when those ended well."""
    import ray

    deadline = time.monotonic() + CULPRIT_S
    while True:
        ended, pending = ray.wait(list(ranks), num_returns=len(ranks), timeout=0)
        best = min(filter(None, (cause_of(ref, ranks[ref], logs) for ref in ended)), default=None)
        if best is None or best.order < _BROKEN_COLLECTIVE or not pending or time.monotonic() > deadline:
            return best
        time.sleep(0.05)


class Watch:
    """A thread that waits for the first death. `waiting_since` says since when the driver has waited for the
    oldest step (time.monotonic(); None when for none)."""

    def __init__(
        self,
        channel: DriverChannel,
        places: list[Place],
        node: str,
        step_timeout_s: float,
        waiting_since: Callable[[], float | None],
    ) -> None:
        self.death: WorkerDied | None = None
        self._channel, self._step_timeout_s, self._waiting_since = channel, step_timeout_s, waiting_since
        self._seen = dict.fromkeys(range(len(places)), time.monotonic())
        self._processes = {rank: process(p.pid) for rank, p in enumerate(places) if p.node == node}
        self._logs = {rank: places[rank].log for rank in self._processes}
        self._loops: dict[Any, int] = {}
        self._stopping, self._dead = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="rank-watch", daemon=True)
        self._thread.start()

    def follow(self, loops: dict[Any, int]) -> None:
        """The ranks run their step loops now: these calls should not end."""
        self._loops = loops

    def verdict(self, rank: int) -> WorkerDied:
        """The death that must soon be known, as `rank` has left the channel."""
        self._dead.wait(CULPRIT_S + 1)
        return self.death or WorkerDied(rank, "it left the step channel")

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _watch(self) -> None:
        try:
            while self.death is None and not self._stopping.is_set():
                self._listen()
                self.death = self._ended() or self._silent() or self._overdue()
        except Exception:  # nobody would watch any more, and the engine would wait for ever
            self.death = WorkerDied(0, f"its supervision failed:\n{traceback.format_exc()}")
        self._dead.set()

    def _listen(self, tell_stack: bool = False) -> list[tuple[int, str]]:
        alive = self._channel.beats(0.1, tell_stack)
        self._seen.update(dict.fromkeys((rank for rank, _ in alive), time.monotonic()))
        return alive

    def _ended(self) -> WorkerDied | None:
        import ray

        if not self._loops:
            return None
        ended, _ = ray.wait(list(self._loops), timeout=0)
        if not ended or self._stopping.is_set():
            return None
        cause = first_cause(self._loops, self._logs)
        if cause is None:
            return WorkerDied(self._loops[ended[0]], "it heard no more of the driver and ended itself")
        if cause.order == _BROKEN_COLLECTIVE:
            self._listen()
            rank, at = min(self._seen.items(), key=lambda item: item[1])
            if rank != cause.rank and (silence := time.monotonic() - at) > LOOK_S:
                return WorkerDied(rank, f"no sign of life for {silence:.1f} s; then {cause.error}")
        error = cause.error
        return error if isinstance(error, WorkerDied) else WorkerDied(cause.rank, str(error))

    def _silent(self) -> WorkerDied | None:
        for rank, at in self._seen.items():
            silence = time.monotonic() - at
            limit = NEAR_SILENCE_S if rank in self._processes else SILENCE_S
            if not self._loops:
                limit = START_SILENCE_S
            if silence > LOOK_S and _is_stopped(self._processes.get(rank)):
                return WorkerDied(rank, f"its process is stopped; no sign of life for {silence:.1f} s")
            if silence > limit:
                return WorkerDied(rank, f"it is hung: no sign of life for {silence:.1f} s")
        return None

    def _overdue(self) -> WorkerDied | None:
        since = self._waiting_since()
        if since is None or time.monotonic() - since <= self._step_timeout_s:
            return None
        stacks: dict[int, str] = {}
        deadline = time.monotonic() + 4 * BEAT_S
        while len(stacks) < len(self._seen) and time.monotonic() < deadline:
            stacks |= {rank: stack for rank, stack in self._listen(tell_stack=True) if stack}
        rank = min(self._seen, key=lambda r: (r in stacks, _in_collective(stacks.get(r, "")), r))
        where = f"the rank was at:\n{_short(stacks[rank])}" if rank in stacks else "the rank tells no stack"
        limit = f"{self._step_timeout_s:g} s (step_timeout_s)"
        return WorkerDied(rank, f"a step took longer than {limit}; {where}")


def _in_collective(text: str) -> bool:
    """Whether a traceback or stack ends in a collective, where a rank waits for its peers."""
    tail = "\n".join(text.rstrip().splitlines()[-_TAIL:])
    return any(sign in tail for sign in ("torch/distributed", "engine/parallel/shared.py", "gloo", "NCCL"))


def _short(text: str) -> str:
    """The end of a traceback, or Ray's word on how a process ended."""
    lines = [line.rstrip() for line in _COLOURS.sub("", text).splitlines() if line.strip()]
    return "\n".join(lines[-_LINES:])


def _last_words(rays: str, log: str) -> str:
    """How a process ended, by Ray's word without its guesses, and by the end of its own log."""
    detail = re.search(r"Worker exit detail: (.*?)(?: Some common causes|$)", rays, re.DOTALL)
    text = f"its process died: {detail[1] if detail else rays}"
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.stat(log).st_size - _LOG_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        lines = []
    words = "\n".join(line for line in lines if not line.startswith((":job_id:", ":actor_name:")))
    return _short(f"{text}\nits log ends with:\n{words}" if words else text)


def process(pid: int) -> psutil.Process | None:
    """None when it is gone already."""
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


def _is_stopped(rank: psutil.Process | None) -> bool:
    try:
        return rank is not None and rank.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except psutil.NoSuchProcess:
        return False
