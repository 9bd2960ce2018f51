"""Ends what a local Ray cluster leaves behind when its driver is killed.

Ray's own processes follow a killed driver, but for the raylet's agents, which stay for a minute. This program
runs beside the driver, holds the reading end of a pipe whose writing end dies with the driver, and then kills
those of the driver's descendants that it has seen and that are Ray's. Started by `engine.exec.cluster`; knows
nothing of ranks.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys

import psutil

#: Seconds between looks at the driver's family: short while Ray starts, long afterwards.
FIRST_LOOK_S, LAST_LOOK_S = 0.5, 10.0


def start() -> subprocess.Popen[bytes]:
    """Watch over this process. Keep the returned object: its pipe is the sign of life."""
    import ray

    return subprocess.Popen(
        [sys.executable, "-m", "engine.exec.reaper", str(os.getpid()), os.path.dirname(ray.__file__)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def watch(driver_pid: int, ray_folder: str) -> None:
    """Until standard input ends."""
    family: set[psutil.Process] = set()
    pause = FIRST_LOOK_S
    while not select.select([sys.stdin], [], [], pause)[0]:
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(driver_pid).children(recursive=True)
            found = {process for process in children if _is_rays(process, ray_folder)}
            pause = FIRST_LOOK_S if found - family else min(pause * 2, LAST_LOOK_S)
            family |= found
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()  # psutil checks that the number was not given to another process


def _is_rays(process: psutil.Process, ray_folder: str) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        words = process.cmdline()
        return any(word.startswith((f"{ray_folder}{os.sep}", "ray::")) for word in words)
    return False


if __name__ == "__main__":
    watch(int(sys.argv[1]), sys.argv[2])
