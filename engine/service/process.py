"""Which process an engine is, so that its successor can tell whether it is dead; and what it was built of.

Only a process of the same running kernel and the same process namespace can be judged: there, a process
that is gone, or whose number was given to one born later, is dead beyond doubt. Of all others nothing is
known, and their leases run out instead. Linux only; elsewhere nothing is ever known.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any


def identity() -> dict[str, Any]:
    """What a heartbeat says of this process; empty where the system does not tell."""
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        return {}
    pid = os.getpid()
    return {"kernel": kernel, "space": space, "pid": pid, "born": _born(pid)}


def known_dead(other: dict[str, Any]) -> bool:
    """Whether the process of an `identity` is certainly dead."""
    here = identity()
    if not here or any(other.get(k) != here[k] for k in ("kernel", "space")):
        return False
    if not isinstance(other.get("pid"), int) or other.get("born") is None:
        return False
    return _born(other["pid"]) != other["born"]


def _born(pid: int) -> str | None:
    """Start of a process in clock ticks since boot; None when it is gone, or waits to be reaped."""
    try:
        # the name before the last ")" may hold anything
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


@cache
def build() -> str:
    """Versions that decide how a job runs."""
    return " ".join(f"{name}-{version(name)}" for name in ("headrace", "torch"))
