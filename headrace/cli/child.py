"""The engine as a child process of `headrace run`: started, watched, restarted, ended.

The child dies with its parent, also by kill -9: the kernel signals it (PR_SET_PDEATHSIG). It runs in a
session of its own, so that Ctrl-C at the terminal reaches the parent alone, which then lets the child
hand its jobs back. What it prints goes to a log file; the last line it wrote in headrace's error form
is the reason shown when it cannot start.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from headrace.cli.common import CommandError

#: Restarts after which an engine that finishes nothing is given up.
MAX_RESTARTS = 3
#: Seconds that an engine gets to finish what runs, then to hand the rest back, before it is killed.
DRAIN_S, HAND_BACK_S = 3.0, 10.0
#: Environment variable that tells a child which parent it must not outlive.
PARENT = "HEADRACE_PARENT_PID"
_ERROR = "headrace: error: "


@dataclass(slots=True)
class Engine:
    """One engine process at a time. All methods are called from the thread that called `start`: the
    kernel's parent-death signal fires when the *thread* that started a child ends."""

    command: list[str]
    log: Path
    restarts: int = 0  # since rows were last finished
    _process: subprocess.Popen[bytes] | None = None
    _log_start: int = field(default=0)
    _finished: int = field(default=0)

    @property
    def started(self) -> bool:
        return self._process is not None

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    def start(self) -> None:
        with open(self.log, "ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {PARENT: str(os.getpid())},
                start_new_session=True,
            )

    def watch(self, finished: int) -> str | None:
        """Restart a dead engine; returns why it died where it did. `finished` counts rows answered so far.

        Raises CommandError when it ended with exit code 1 before its first answer (it cannot start), or
        died once more after `MAX_RESTARTS` restarts without an answer.
        """
        if finished > self._finished:
            self._finished, self.restarts = finished, 0
        if self._process is None or self._process.poll() is None:
            return None
        reason = self._reason()
        never_up = self._finished == 0 and self._process.returncode == 1
        if never_up or self.restarts >= MAX_RESTARTS:
            tried = "" if never_up else f" ({self.restarts} restarts finished no row)"
            raise CommandError(f"{reason.rstrip('.')}{tried}; the engine's log is {self.log}")
        self.restarts += 1
        self.start()
        return reason

    def stop(self, drain_s: float) -> None:
        """SIGTERM (finish what runs), SIGTERM again (hand back), SIGKILL; also to what the engine started."""
        if self._process is None:
            return
        for patience in (drain_s, HAND_BACK_S if drain_s else 0.0):
            if self._process.poll() is None:
                self._process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(patience)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _reason(self) -> str:
        assert self._process is not None
        code = self._process.returncode
        with open(self.log, "rb") as log:
            log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - (1 << 16)))
            lines = log.read().decode("utf-8", "replace").splitlines()
        for line in reversed(lines):
            if line.startswith(_ERROR):
                return line.removeprefix(_ERROR)
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"the engine was {how}" if code < 0 else f"the engine {how}"


def die_with_parent() -> None:
    """Called first thing in a child: from now on the kernel kills it when its parent ends.

    Without HEADRACE_PARENT_PID (the process was started by hand) nothing happens.
    """
    parent = os.environ.pop(PARENT, None)
    if parent is None or not sys.platform.startswith("linux"):
        return
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before the call above
        os.kill(os.getpid(), signal.SIGKILL)
