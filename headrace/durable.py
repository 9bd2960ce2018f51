"""How far a submit is carried before it is confirmed: the server's memory, its disk, or a second server.

WAIT and WAITAOF speak for all writes that came before the last one of the connection they are sent on; so
one empty write is sent ahead of them, and covers what any connection wrote before it. Sent outside of
scripts, where they do not wait. Every call may be made again.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from redis import exceptions as rx

from headrace.connection import AsyncConnections
from headrace.errors import NotDurable, StoreError
from headrace.store import translated

#: `memory`: accepted by the server. `fsync`: in its append-only file, synced to disk. `replica`: received by
#: at least one replica.
Ack = Literal["memory", "fsync", "replica"]
#: Milliseconds that the server waits in one call; below the client's own timeout.
WAIT_MS = 2000


def check_ack(ack: str) -> None:
    """Raises ValueError for an unknown level."""
    if ack not in get_args(Ack):
        raise ValueError(f"ack {ack!r} is none of {', '.join(get_args(Ack))}")


async def confirm(connections: AsyncConnections, counters: str, ack: Ack) -> None:
    """Wait until everything that was written so far is as durable as `ack` says.

    `counters`: key of a run's counters, for the empty write. Raises NotDurable where that was not reached in
    time (what was submitted is accepted: submit it again to wait again), StoreError where the server cannot
    give it.
    """
    if ack == "memory":
        return
    shown = connections.shown
    wait: tuple[Any, ...] = ("WAITAOF", 1, 0, WAIT_MS) if ack == "fsync" else ("WAIT", 1, WAIT_MS)
    try:
        if ack == "replica" and not (await connections.idempotent.info("replication"))["connected_slaves"]:
            raise StoreError(f"{shown} has no replica: attach one, or submit with ack='fsync'")
        async with connections.idempotent.pipeline(transaction=False) as pipe:
            pipe.hincrby(counters, "submitted", 0)
            pipe.execute_command(*wait)
            _, reply = await pipe.execute()
    except rx.ResponseError as e:
        text = str(e)
        if "unknown command" in text:
            raise StoreError(
                f"{shown} has no {wait[0]}: use Redis 7.2 or newer or Valkey, or set appendfsync always, "
                "with which ack='memory' is on disk as well"
            ) from None
        if "appendonly" in text:
            raise StoreError(
                f"{shown} has no append-only file: set appendonly yes, or submit with ack='memory'"
            ) from None
        raise translated(e, shown) from e
    except rx.RedisError as e:
        raise translated(e, shown) from e
    reached = reply[0] if ack == "fsync" else reply
    if not reached:
        what = "on the disk" if ack == "fsync" else "on a replica"
        raise NotDurable(
            f"what was submitted is accepted, but was not {what} of {shown} within {WAIT_MS / 1000:g} s: "
            "submit it again to wait again"
        )
