"""A TCP proxy that breaks lines on purpose: what toxiproxy does, as one asyncio loop in a thread.

Modes: `pass`; `latency` (each chunk waits half a second); `reset` (lines are cut with RST at their next
byte); `cut_reply` (the request reaches the server, and the line is cut inside the reply: executed, but nobody
heard of it); `blackhole` (bytes are swallowed, the line stays open); `slice` (a few bytes at a time).
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from typing import Any

MODES = ("latency", "reset", "cut_reply", "blackhole", "slice")
LATENCY_S = 0.5


class Proxy:
    """Listens on a port of its own. `mode`, `target` (host, port) may be changed while it runs."""

    def __init__(self, target: tuple[str, int], seed: int = 0) -> None:
        self.target, self.mode, self.cut = target, "pass", 0
        self._rng = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        ready: list[Any] = []
        started = threading.Event()

        def serve() -> None:
            asyncio.set_event_loop(self._loop)
            server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
            ready.append(server.sockets[0].getsockname()[1])
            started.set()
            self._loop.run_forever()

        threading.Thread(target=serve, name="chaos-proxy", daemon=True).start()
        started.wait()
        self.port: int = ready[0]

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def close(self) -> None:
        def end() -> None:
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.call_later(0.05, self._loop.stop)

        self._loop.call_soon_threadsafe(end)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_connection(*self.target)
        except OSError:
            _reset(writer)
            return
        both = (writer, up_writer)
        await asyncio.gather(
            self._pump(reader, up_writer, both, reply=False), self._pump(up_reader, writer, both, reply=True)
        )

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        both: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
        reply: bool,
    ) -> None:
        try:
            while data := await reader.read(1 << 16):
                mode = self.mode
                if mode == "latency":
                    await asyncio.sleep(LATENCY_S)
                elif mode == "blackhole":
                    continue
                elif mode == "reset" or (mode == "cut_reply" and reply and self._rng.random() < 0.5):
                    if mode == "cut_reply":
                        writer.write(data[: len(data) // 2])
                        await writer.drain()
                    self.cut += 1
                    for one in both:
                        _reset(one)
                    return
                pieces = [data]
                if mode == "slice":
                    pieces = [data[i : i + 997] for i in range(0, len(data), 997)]
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    if mode == "slice":
                        await asyncio.sleep(0.001)
        except OSError:
            pass  # the other direction cut it
        finally:
            for one in both:
                one.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    """RST instead of FIN."""
    sock: socket.socket = writer.get_extra_info("socket")
    if sock is not None and sock.fileno() != -1:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
