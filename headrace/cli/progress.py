"""What a person sees of a run: a bar on a terminal, a line every few seconds elsewhere, a summary at the end.

Everything goes to standard error but the summary, so that the output of `headrace run` can be piped.
Knows numbers only; where they come from is `headrace.cli.pipeline`'s business.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

#: Seconds over which rates are taken: long enough to smooth batches, short enough to see a stall.
WINDOW_S = 20.0
#: Seconds between lines where there is no terminal.
PLAIN_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run at one moment. `total` is None until the input was read to its end."""

    done: int
    failed: int
    total: int | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    state: str = ""  # what the run waits for, where it does not make rows

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


class Rates:
    """Rows and generated tokens a second over the last `WINDOW_S`."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int, int]] = deque()
        self.rows = 0.0
        self.tokens = 0.0

    def add(self, now: float, snapshot: Snapshot) -> None:
        self._seen.append((now, snapshot.done, snapshot.completion_tokens))
        while len(self._seen) > 2 and self._seen[1][0] <= now - WINDOW_S:
            self._seen.popleft()
        then, rows, tokens = self._seen[0]
        if now > then:
            self.rows = (snapshot.done - rows) / (now - then)
            self.tokens = (snapshot.completion_tokens - tokens) / (now - then)

    def left(self, snapshot: Snapshot) -> float | None:
        """Seconds until the end at the present rate."""
        if snapshot.total is None or self.rows <= 0:
            return None
        return max(0, snapshot.total - snapshot.done) / self.rows


class Progress:
    """Shows snapshots; call `show` as often as you like."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stderr
        self._rates = Rates()
        self._bar: Any = None
        self._task: Any = None
        self._last = 0.0
        if self._stream.isatty():
            self._bar = _bar()
            self._task = self._bar.add_task("rows", total=None, of="?", facts="")
            self._bar.start()

    def show(self, snapshot: Snapshot) -> None:
        now = time.monotonic()
        self._rates.add(now, snapshot)
        if self._bar is not None:
            facts = _facts(snapshot, self._rates)
            of = "?" if snapshot.total is None else snapshot.total
            self._bar.update(self._task, completed=snapshot.done, total=snapshot.total, of=of, facts=facts)
        elif now - self._last >= PLAIN_EVERY_S:
            self._last = now
            total = "?" if snapshot.total is None else f"{snapshot.total:,}"
            self.say(f"{snapshot.done:,} of {total} rows, {_facts(snapshot, self._rates)}")

    def say(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def summary(rows: Mapping[str, int], snapshot: Snapshot, made: int, seconds: float) -> str:
    """The table at the end: `rows` by status, then tokens and time; `made` are the tokens of this pass."""
    lines = [f"{name:<18}{rows[name]:>12,}" for name in sorted(rows, key=lambda n: (n != "ok", n))]
    return "\n".join(
        [
            *lines,
            f"{'rows':<18}{snapshot.done:>12,}",
            f"{'prompt tokens':<18}{snapshot.prompt_tokens:>12,}  ({snapshot.hit_rate:.1%} prefix hits)",
            f"{'generated tokens':<18}{snapshot.completion_tokens:>12,}  ({made / seconds:,.0f} a second)",
            f"{'seconds':<18}{seconds:>12,.1f}",
        ]
    )


def _facts(snapshot: Snapshot, rates: Rates) -> str:
    if snapshot.state:
        return snapshot.state
    parts = [f"{_rate(rates.rows)} rows/s", f"{_rate(rates.tokens)} tok/s", f"{snapshot.failed:,} failed"]
    parts.append(f"{snapshot.hit_rate:.0%} prefix hits")
    left = rates.left(snapshot)
    if left is not None:
        parts.append(f"{_duration(left)} left")
    return ", ".join(parts)


def _rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.1f}"


def _duration(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Rich
    from rich.table import Column

    return Rich(
        BarColumn(bar_width=8),  # 80 columns hold the rest beside it
        TextColumn("{task.completed}/{task.fields[of]}", table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[facts]}"),
        console=Console(stderr=True),
        refresh_per_second=4,
    )
