"""Runs ledger calls: values that say what to send, and two thin shells that send them.

A `Call` is one script or one command. A `Flow` is a generator of calls, for what takes several (batches
over the per-call limit, pages). `Store` and `AsyncStore` run either and hold no policy: which keys and
arguments a state change needs is `headrace.ledger`'s business, how to connect `headrace.connection`'s.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Generic, Literal, TypeVar

from redis import exceptions as rx

from headrace.connection import AsyncConnections, Connections
from headrace.errors import StoreError, StoreFull, StoreUnavailable

T = TypeVar("T")
Arg = str | bytes | int | float

#: Which client a call travels on: `idempotent` may be sent again after a lost reply, `once` never is and
#: may block on the server, `renewal` has a short timeout (see `headrace.connection`).
Channel = Literal["idempotent", "once", "renewal"]


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua file of `headrace/scripts`."""

    name: str
    source: str
    sha: str


@cache
def script(name: str) -> Script:
    source = resources.files("headrace").joinpath("scripts", f"{name}.lua").read_text("utf-8")
    # sha1 is the server's name for a script (EVALSHA), not a safeguard
    return Script(name, source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One round trip. Without a script, `args` is the whole command."""

    parse: Callable[[Any], T]
    script: Script | None
    keys: tuple[str, ...]
    args: tuple[Arg, ...]
    channel: Channel = "idempotent"


#: Several calls that depend on each other; returns T.
Flow = Generator[Call[Any], Any, T]
Work = Call[T] | Flow[T]


class Store:
    """Blocking shell. Thread-safe: each command takes its own connection from the pool.

    `run` raises StoreUnavailable, StoreFull or StoreError, and whatever the call itself raises.
    """

    def __init__(self, connections: Connections) -> None:
        self.connections = connections

    def run(self, work: Work[T]) -> T:
        if isinstance(work, Call):
            return self._send(work)
        step, value = work.send, None
        try:
            while True:
                call = step(value)
                try:
                    step, value = work.send, self._send(call)
                except StoreError as e:  # the flow may know what to do about it
                    step, value = work.throw, e
        except StopIteration as stop:
            return stop.value

    def close(self) -> None:
        self.connections.close()

    def _send(self, call: Call[T]) -> T:
        client = getattr(self.connections, call.channel)
        try:
            if call.script is None:
                return call.parse(client.execute_command(*call.args))
            rest = (len(call.keys), *call.keys, *call.args)
            try:
                reply = client.execute_command("EVALSHA", call.script.sha, *rest)
            except rx.NoScriptError:  # nothing ran: the server was restarted or its scripts flushed
                reply = client.execute_command("EVAL", call.script.source, *rest)
        except rx.RedisError as e:
            raise translated(e, self.connections.shown) from e
        return call.parse(reply)


class AsyncStore:
    """The same for asyncio. A command in flight is never cancelled: a cancelled caller leaves at once, and
    the command ends by itself, so no reply is ever taken for another's (redis-py#2665)."""

    def __init__(self, connections: AsyncConnections) -> None:
        self.connections = connections
        self._flying: set[asyncio.Task[Any]] = set()

    async def run(self, work: Work[T]) -> T:
        task = asyncio.ensure_future(self._run(work))
        self._flying.add(task)
        task.add_done_callback(self._landed)
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Waits for what is in flight, then disconnects."""
        while self._flying:
            await asyncio.wait(self._flying)
        await self.connections.close()

    def _landed(self, task: asyncio.Task[Any]) -> None:
        self._flying.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved, so that an abandoned failure is not logged as "never retrieved"

    async def _run(self, work: Work[T]) -> T:
        if isinstance(work, Call):
            return await self._send(work)
        step, value = work.send, None
        try:
            while True:
                call = step(value)
                try:
                    step, value = work.send, await self._send(call)
                except StoreError as e:
                    step, value = work.throw, e
        except StopIteration as stop:
            return stop.value

    async def _send(self, call: Call[T]) -> T:
        client = getattr(self.connections, call.channel)
        try:
            if call.script is None:
                return call.parse(await client.execute_command(*call.args))
            rest = (len(call.keys), *call.keys, *call.args)
            try:
                reply = await client.execute_command("EVALSHA", call.script.sha, *rest)
            except rx.NoScriptError:
                reply = await client.execute_command("EVAL", call.script.source, *rest)
        except rx.RedisError as e:
            raise translated(e, self.connections.shown) from e
        return call.parse(reply)


#: Error words of a server that refuses for now and will take the command later.
_PASSING = (
    "MISCONF",
    "READONLY",
    "MASTERDOWN",
    "NOREPLICAS",
    "TRYAGAIN",
    "CLUSTERDOWN",
    "BUSY ",
    "UNBLOCKED",
)


def translated(e: rx.RedisError, shown: str) -> StoreError:
    text = " ".join(str(e).split()) or type(e).__name__
    if isinstance(e, rx.OutOfMemoryError) or text.startswith("OOM "):
        return StoreFull(f"{shown} is at its maxmemory: raise it, or let engines and sinks drain the lane")
    if isinstance(e, rx.AuthenticationError | rx.AuthorizationError | rx.NoPermissionError):
        return StoreError(
            f"{shown} refuses this user: {text}: check the user and password of the URL and its ACL"
        )
    if isinstance(e, rx.ConnectionError | rx.TimeoutError | rx.ReadOnlyError) or text.startswith(_PASSING):
        return StoreUnavailable(f"{shown} does not answer: {text}: check that the server runs")
    return StoreError(f"{shown} refused a command: {text}")
