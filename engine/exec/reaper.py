"""Ends what a local Ray cluster leaves behind when its driver is killed.

Ray's own processes follow a killed driver, but for the raylet's agents, which stay. This program runs beside
the driver, holds the reading end of a pipe whose writing end dies with the driver, and then kills every
descendant that it has seen of it. Started by `engine.exec.cluster`; knows nothing of ranks.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys

import psutil

#: Seconds between looks at the driver's family: short while Ray starts, long afterwards.
FIRST_LOOK_S, LAST_LOOK_S = 1.0, 60.0


def start() -> subprocess.Popen[bytes]:
    """Watch over this process. Keep the returned object: its pipe is the sign of life."""
    return subprocess.Popen(
        [sys.executable, "-m", "engine.exec.reaper", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def watch(driver_pid: int) -> None:
    """Until standard input ends."""
    family: set[psutil.Process] = set()
    pause = FIRST_LOOK_S
    while not select.select([sys.stdin], [], [], pause)[0]:
        pause = min(pause * 2, LAST_LOOK_S)
        with contextlib.suppress(psutil.NoSuchProcess):
            family.update(psutil.Process(driver_pid).children(recursive=True))
    own = psutil.Process()
    for process in family - {own}:
        with contextlib.suppress(psutil.NoSuchProcess):
            if _is_rays(process):
                process.kill()  # psutil checks that the number was not given to another process


def _is_rays(process: psutil.Process) -> bool:
    words = process.cmdline()
    return any("ray" in word for word in words[:4])


if __name__ == "__main__":
    watch(int(sys.argv[1]))
