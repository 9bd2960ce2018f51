"""What a server must be to keep a queue: judged from its INFO alone, which every user may ask for. Pure.

`headrace.connection` refuses a server by `unsafe` whenever it connects; `headrace doctor` shows all of it,
with what only a person can decide on (`outdated`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Oldest servers that the ledger is tested on.
MIN_REDIS = (7, 0)
MIN_VALKEY = (9, 0)

#: First patch level of each line without a known hole or stream bug that a user of ours can reach. Redis:
#: CVE-2025-49844 and its companions (Lua, October 2025) in the lines that ended since, CVE-2025-62507
#: (XACKDEL), and the levels of August 2026 (an ACL bypass of XREAD and XREADGROUP, redis#15478) in the living
#: ones. Valkey: CVE-2026-63639 (a crafted stream runs code) in both, and GHSA-fq2f-crmw-q97r (Lua, no login
#: needed) in 9.1. Redis 7.0 had its last release in 2024: no level of it is good, distributions patch theirs.
PATCH_FLOOR: dict[str, dict[tuple[int, ...], int]] = {
    "Redis": {(7, 2): 11, (7, 4): 6, (8, 0): 4, (8, 2): 9, (8, 4): 6, (8, 6): 6, (8, 8): 2, (8, 10): 1},
    "Valkey": {(9, 0): 5, (9, 1): 2},
}


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a server is not fit: a sentence about it without its subject, and what mends it."""

    check: str
    found: str
    fix: str

    def line(self, shown: str) -> str:
        return f"{shown} {self.found}: {self.fix}"


def server(info: Mapping[str, Any]) -> tuple[str, str, tuple[int, ...]]:
    """Name, version as written, version as numbers. Valkey calls itself Redis 7.2.4 as well."""
    valkey = info.get("valkey_version")
    version = str(valkey or info.get("redis_version", "0"))
    return "Valkey" if valkey else "Redis", version, tuple(int(p) for p in re.findall(r"\d+", version)[:3])


def unsafe(info: Mapping[str, Any], allow_volatile: bool) -> list[Problem]:
    """Everything about a server on which a queue would lose jobs or not work at all.

    INFO and not CONFIG GET, because managed servers forbid the latter.
    """
    problems = []
    name, version, numbers = server(info)
    least = MIN_VALKEY if name == "Valkey" else MIN_REDIS
    if numbers[:2] < least:
        wanted = ".".join(map(str, least))
        problems.append(
            Problem(
                "version", f"is {name} {version}; headrace needs {name} >= {wanted}", "upgrade the server"
            )
        )
    if info.get("cluster_enabled"):
        problems.append(
            Problem(
                "role",
                "is a cluster node, which is not supported",
                "give a server that is not clustered",
            )
        )
    elif info.get("role") != "master":
        problems.append(Problem("role", "is a replica, which takes no writes", "give the URL of the primary"))
    policy = info.get("maxmemory_policy", "noeviction")
    if info.get("maxmemory") and policy != "noeviction":
        problems.append(
            Problem(
                "eviction",
                f"has maxmemory-policy {policy}, which evicts queued jobs when memory is short",
                "set maxmemory-policy noeviction, and use a server of its own for queues",
            )
        )
    if not info.get("aof_enabled") and not allow_volatile:
        problems.append(
            Problem(
                "persistence",
                "has no append-only file, so a restart of it loses the queue",
                "set appendonly yes, or pass --allow-volatile to accept that",
            )
        )
    return problems


def outdated(info: Mapping[str, Any]) -> Problem | None:
    """A patch level that is known to be bad; not a reason to refuse work that runs, but one to upgrade."""
    name, version, numbers = server(info)
    floor = PATCH_FLOOR[name].get(numbers[:2])
    if floor is None or numbers[2:3] >= (floor,):
        return None
    line = ".".join(map(str, numbers[:2]))
    return Problem(
        "patch level",
        f"is {name} {version}, which has known holes or stream bugs",
        f"upgrade to {line}.{floor} or newer",
    )
