"""Whether a server is fit for a queue: everything that can be found out without changing it.

`examine` asks the server and returns one `Finding` for each check, each with what mends it. Knows nothing
of how findings are shown (`headrace.cli.doctor`).
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import redis
from redis import exceptions as rx
from redis.backoff import NoBackoff
from redis.retry import Retry

from headrace.connection import COMMON, TIMEOUT_S, bad_url, redacted, unreachable
from headrace.requirements import outdated, server, unsafe
from headrace.rights import Role, refused, rights

#: Seconds by which the clocks of this machine and the server may differ. Deadlines are set by one and
#: judged by another; leases do not depend on clocks.
MAX_SKEW_S = 2.0


class Verdict(StrEnum):
    OK = "ok"
    WARNING = "warning"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check. `fix` is empty where nothing is to be done."""

    check: str
    verdict: Verdict
    found: str
    fix: str = ""


def examine(url: str, lane: str, roles: Sequence[Role], allow_volatile: bool = False) -> list[Finding]:
    """All checks, as the user that `url` names. Raises StoreError where the server cannot be asked at all."""
    shown = redacted(url)
    try:
        client = redis.Redis.from_url(
            url,
            **COMMON,
            socket_timeout=TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
            single_connection_client=True,
        )
    except ValueError as e:
        raise bad_url(shown, e) from None
    except (rx.RedisError, OSError) as e:
        raise unreachable(shown, e) from None
    with client:
        try:
            info = client.info()
        except (rx.RedisError, OSError) as e:
            raise unreachable(shown, e) from None
        try:
            return [
                *_server(info, allow_volatile),
                _fsync(client, info),
                _open_user(client, url),
                _clock(client),
                *_rights(client, lane, roles),
            ]
        except rx.ConnectionError as e:
            raise unreachable(shown, e) from None


def fit(findings: Sequence[Finding]) -> bool:
    return all(f.verdict is not Verdict.REFUSED for f in findings)


def _server(info: Mapping[str, Any], allow_volatile: bool) -> list[Finding]:
    name, version, numbers = server(info)
    limit = info.get("maxmemory")
    good = {
        "version": f"{name} {version}",
        "patch level": "no known hole in this level",
        "role": "a primary, not clustered",
        "eviction": f"noeviction, maxmemory {limit:,}" if limit else "none: no maxmemory is set",
        "persistence": "append-only file",
    }
    problems = {p.check: p for p in unsafe(info, allow_volatile)}
    if (old := outdated(info)) is not None:
        problems[old.check] = old
    out = []
    for check, found in good.items():
        if (p := problems.get(check)) is not None:
            out.append(Finding(check, Verdict.REFUSED, p.found, p.fix))
        elif check == "persistence" and not info.get("aof_enabled"):
            out.append(Finding(check, Verdict.WARNING, "none, which --allow-volatile accepts"))
        elif check == "patch level" and name == "Redis" and numbers[:2] == (7, 0):
            fix = "use Redis 7.2 or newer, or make sure that your distribution patches 7.0"
            out.append(Finding(check, Verdict.WARNING, "Redis 7.0 has had no release since 2024", fix))
        else:
            out.append(Finding(check, Verdict.OK, found))
    if not limit:
        fix = "set maxmemory below the machine's memory: a full server refuses jobs, a killed one loses time"
        out.append(Finding("memory limit", Verdict.WARNING, "no maxmemory", fix))
    return out


def _fsync(client: redis.Redis, info: Mapping[str, Any]) -> Finding:
    """How much of what was acknowledged a power cut may take."""
    if not info.get("aof_enabled"):
        return Finding("fsync", Verdict.WARNING, "nothing is written to disk")
    if info.get("aof_last_write_status", "ok") != "ok":
        fix = "make room on the server's disk"
        return Finding("fsync", Verdict.REFUSED, "the last write of the append-only file failed", fix)
    policy = _config(client, "appendfsync")
    if policy == "no":
        fix = "set appendfsync everysec or always"
        return Finding("fsync", Verdict.REFUSED, "appendfsync no: a power cut takes up to 30 s of jobs", fix)
    notes = {
        None: "this user may not read appendfsync",
        "always": "appendfsync always: what was acknowledged is on disk",
        "everysec": "appendfsync everysec: a power cut may take the last second or two; ack='fsync' waits",
    }
    return Finding("fsync", Verdict.OK, notes.get(policy, f"appendfsync {policy}"))


def _open_user(client: redis.Redis, url: str) -> Finding:
    """Whether anybody who reaches the port is let in. Tried out, as ACL GETUSER is an admin's command."""
    kwargs = dict(client.connection_pool.connection_kwargs)
    local = "path" in kwargs or _is_loopback(kwargs.get("host", "localhost"))
    kwargs.pop("username", None)
    kwargs.pop("password", None)
    kwargs.pop("credential_provider", None)
    pool = redis.ConnectionPool(connection_class=client.connection_pool.connection_class, **kwargs)
    stranger = redis.Redis(connection_pool=pool)
    try:
        stranger.execute_command("EXISTS", "hr:doctor")
    except (rx.AuthenticationError, rx.NoPermissionError, rx.ResponseError):
        return Finding("open user", Verdict.OK, "nobody is let in without a password")
    except (rx.RedisError, OSError) as e:  # protected mode, a client certificate, a firewall
        return Finding("open user", Verdict.OK, f"a login without a password fails: {_line(e)}")
    finally:
        pool.disconnect()
    fix = "load deploy/redis/users.acl, which turns the default user off, or set requirepass"
    if not local:
        found = "the default user needs no password, and the server answers on a network address"
        return Finding("open user", Verdict.REFUSED, found, fix)
    port, tls, bind = (_config(client, name) for name in ("port", "tls-port", "bind"))
    if port == "0" and tls in ("0", None):
        return Finding("open user", Verdict.OK, "the default user is open, on a unix socket only")
    if bind is None:
        found = "the default user needs no password; this user may not read where the server listens"
        return Finding("open user", Verdict.WARNING, found, fix)
    wide = [a for a in bind.split() if not _is_loopback(a.lstrip("-"))] if bind else ["*"]
    if wide and _config(client, "protected-mode") != "yes":
        found = f"the default user needs no password, and the server listens on {' '.join(wide)}"
        return Finding("open user", Verdict.REFUSED, found, f"{fix}, or bind 127.0.0.1 -::1")
    return Finding("open user", Verdict.OK, "the default user is open, on loopback addresses only")


def _clock(client: redis.Redis) -> Finding:
    """The server's TIME against ours, in the quickest of five round trips, half of which is the error."""
    best = (float("inf"), 0.0)
    for _ in range(5):
        before = time.time()
        seconds, micros = client.time()
        after = time.time()
        best = min(best, (after - before, seconds + micros / 1e6 - (before + after) / 2))
    trip, skew = best
    found = f"server {skew:+.3f} s against this machine, within {trip / 2:.3f} s"
    if abs(skew) - trip / 2 > MAX_SKEW_S:
        fix = f"let both follow NTP: above {MAX_SKEW_S:g} s, deadlines end jobs early or late"
        return Finding("clock", Verdict.REFUSED, found, fix)
    return Finding("clock", Verdict.OK, found)


def _rights(client: redis.Redis, lane: str, roles: Sequence[Role]) -> list[Finding]:
    out = []
    for role in roles:
        try:
            missing = sorted({r.name for r in refused(client, rights(role, lane))})
        except rx.NoPermissionError:
            missing = ["eval"]
        missing.sort(key=lambda name: (not name.startswith("scripts"), name))
        if missing:
            fix = f"give it the rights of {role.value} in deploy/redis/users.acl, or name its own --role"
            found = f"the user lacks {', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}"
            out.append(Finding(f"rights: {role.value}", Verdict.REFUSED, found, fix))
        else:
            out.append(Finding(f"rights: {role.value}", Verdict.OK, "all that it needs"))
    return out


def _config(client: redis.Redis, name: str) -> str | None:
    """A setting, or None where this user may not read it."""
    try:
        reply: dict[Any, Any] = client.config_get(name)
    except rx.ResponseError:
        return None
    values = [v.decode() if isinstance(v, bytes) else str(v) for v in reply.values()]
    return values[0] if values else None


def _is_loopback(host: str) -> bool:
    try:
        found = {str(a[4][0]) for a in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(a.startswith("127.") or a == "::1" for a in found)


def _line(e: Exception) -> str:
    return " ".join(str(e).split()).rstrip(".") or type(e).__name__
