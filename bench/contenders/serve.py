"""The loop of a contender: it loads its model once, then runs the workloads that its standard input brings.

One JSON line in, {"warm": ROWS, "rows": ROWS}, one JSON line out, {"seconds", "ids", "peak_rss_mb"}; the
first line out, {"name", "version", ...}, says that the model is loaded. ROWS is a list of {"prompt": ids,
"max_tokens": n}: greedy, without an end-of-sequence. Standard library only: it runs in any engine's own
virtual environment.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

Rows = list[dict[str, Any]]


def own_stdout() -> TextIO:
    """The pipe to whoever compares; what the engine itself prints goes to standard error from here on."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return out


def serve(
    out: TextIO, about: dict[str, Any], run: Callable[[Rows], list[list[int]]], reset: Callable[[], None]
) -> None:
    """Answer workloads until standard input ends. `reset` empties the prefix cache before the clock."""
    print(json.dumps(about), file=out, flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        run(work["warm"])
        reset()
        began = time.perf_counter()
        ids = run(work["rows"])
        seconds = time.perf_counter() - began
        answer = {"seconds": seconds, "ids": ids, "peak_rss_mb": round(peak_rss_mb())}
        print(json.dumps(answer), file=out, flush=True)


def peak_rss_mb() -> float:
    """The high-water marks of this process and its descendants, added; shared pages count in each."""
    pids, total = [os.getpid()], 0.0
    while pids:
        pid = pids.pop()
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            for task in Path(f"/proc/{pid}/task").iterdir():
                pids += map(int, (task / "children").read_text().split())
        except OSError:
            continue  # it ended meanwhile
        total += next((int(x.split()[1]) / 1024 for x in status.splitlines() if x.startswith("VmHWM")), 0.0)
    return total
