"""The clients of one Redis or Valkey server, and the checks it must pass. Knows no key and no script.

Three clients, because one retry rule does not fit all (docs/design.md, section 4):

    idempotent  sends again after a lost reply (3 times, with jitter); for scripts that may run twice
    once        never sends again; for reads that hand entries over, and for blocking ones
    renewal     short timeout, so that a slow server is noticed while the lease still holds
"""

from __future__ import annotations

import asyncio
import logging
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import redis
import redis.asyncio
from redis import exceptions as rx
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.retry import Retry

from headrace.errors import StoreError
from headrace.requirements import unsafe

log = logging.getLogger("headrace.connection")

#: Longest block of one read; a stop flag is seen within it.
MAX_BLOCK_MS = 1000
#: Seconds for an ordinary reply.
TIMEOUT_S = 5.0
#: Seconds to connect; longer would hold up the first attempt after a partition.
CONNECT_TIMEOUT_S = 2.0
#: Seconds for the reply to a lease renewal.
RENEWAL_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Connections:
    """The three clients, for threads. `shown` is the URL without its password."""

    idempotent: redis.Redis
    once: redis.Redis
    renewal: redis.Redis
    shown: str

    def close(self) -> None:
        for client in (self.idempotent, self.once, self.renewal):
            client.close()


@dataclass(frozen=True, slots=True)
class AsyncConnections:
    """The same for asyncio, where nobody renews leases."""

    idempotent: redis.asyncio.Redis
    once: redis.asyncio.Redis
    shown: str

    async def close(self) -> None:
        await asyncio.gather(self.idempotent.aclose(), self.once.aclose())


def connect(url: str, allow_volatile: bool = False) -> Connections:
    """Connects and checks the server.

    `url`: redis://[user:password@]host:port/db, rediss://... (TLS) or unix:///path/to.sock?db=0.
    `allow_volatile` takes a server without an append-only file: a restart of it loses the queue.
    Raises StoreError, in one line, where the server cannot be reached or is unsafe for a queue.
    """
    shown = redacted(url)
    try:
        clients = [
            redis.Redis.from_url(url, retry=retry, socket_timeout=timeout, **COMMON)
            for retry, timeout in (
                (Retry(_backoff(), 3), TIMEOUT_S),
                (Retry(NoBackoff(), 0), TIMEOUT_S + MAX_BLOCK_MS / 1000),
                (Retry(NoBackoff(), 0), RENEWAL_TIMEOUT_S),
            )
        ]
    except ValueError as e:
        raise bad_url(shown, e) from None
    try:
        info = clients[0].info()
    except (rx.RedisError, OSError) as e:
        raise unreachable(shown, e) from None
    check(info, shown, allow_volatile)
    idempotent, once, renewal = clients
    return Connections(idempotent, once, renewal, shown)


async def connect_async(url: str, allow_volatile: bool = False) -> AsyncConnections:
    """`connect` for asyncio."""
    shown = redacted(url)
    try:
        clients = [
            redis.asyncio.Redis.from_url(url, retry=retry, socket_timeout=timeout, **COMMON)
            for retry, timeout in (
                (AsyncRetry(_backoff(), 3), TIMEOUT_S),
                (AsyncRetry(NoBackoff(), 0), TIMEOUT_S + MAX_BLOCK_MS / 1000),
            )
        ]
    except ValueError as e:
        raise bad_url(shown, e) from None
    try:
        info = await clients[0].info()
    except (rx.RedisError, OSError) as e:
        raise unreachable(shown, e) from None
    check(info, shown, allow_volatile)
    idempotent, once = clients
    return AsyncConnections(idempotent, once, shown)


#: RESP2 keeps replies to scripts the same on every server and redis-py version.
COMMON: dict[str, Any] = {
    "decode_responses": False,
    "protocol": 2,
    "socket_connect_timeout": CONNECT_TIMEOUT_S,
}


def _backoff() -> ExponentialWithJitterBackoff:
    return ExponentialWithJitterBackoff(cap=1.0, base=0.05)


def check(info: dict[str, Any], shown: str, allow_volatile: bool) -> None:
    """Refuses a server, by its INFO, on which a queue would lose jobs. Raises StoreError."""
    if problems := unsafe(info, allow_volatile):
        raise StoreError(problems[0].line(shown))
    if not info.get("aof_enabled"):
        log.warning("volatile_server url=%s appendonly=no", shown)


def redacted(url: str) -> str:
    """`url` with its password as ***."""
    url = re.sub(r"([?&]password=)[^&]*", r"\1***", url)
    try:
        parts = urlsplit(url)
    except ValueError:
        return "the Redis URL"
    user, at, host = parts.netloc.rpartition("@")
    if ":" in user:
        return url.replace(parts.netloc, f"{user.partition(':')[0]}:***{at}{host}", 1)
    return url


def bad_url(shown: str, e: Exception) -> StoreError:
    return StoreError(
        f"{shown!r} is not a Redis URL ({e}): give redis://host:port/0, rediss://host:port/0 or unix:///path/to.sock"
    )


def unreachable(shown: str, e: Exception) -> StoreError:
    text = " ".join(str(e).split()).rstrip(".") or type(e).__name__
    if isinstance(e, rx.AuthenticationError | rx.AuthorizationError | rx.NoPermissionError):
        return StoreError(f"{shown} refuses this user: {text}: check the user and password of the URL")
    return StoreError(
        f"cannot reach Redis at {shown}: {text}: check that the server runs and the URL is right"
    )
