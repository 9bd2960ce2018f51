"""The step channel: plans from the driver to every rank, results from rank 0, signs of life from all.

Two ZeroMQ ROUTER sockets on the driver, one for steps and one for signs of life, each with CURVE
encryption (RFC 26): keys are made anew for every engine and handed to the ranks by Ray; a peer that does
not know them gets no further than the handshake. Frames are msgpack (`engine.exec.wire`), never pickle.
Knows nothing of Ray, nor of what a silent rank means.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import traceback
from dataclasses import dataclass

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from engine.errors import EngineError

#: Seconds between signs of life.
BEAT_S = 0.5
#: Signs of life without any answer after which a rank takes the driver for gone. Counted, not timed: a rank
#: that was itself stopped or starved for a minute has shown none in that minute.
ORPHANED_BEATS = 120
#: Characters of a stack that a rank tells at most: the innermost.
STACK_CHARS = 4000
STOP = b"stop"
_READY = b"ready"
_ALIVE, _TELL_STACK = b"", b"stack"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What a rank needs to join the channel; travels to it once, through Ray."""

    steps: str
    beats: str
    server_key: bytes
    client_public: bytes
    client_secret: bytes


class _OnlyRanks:
    """pyzmq's credentials provider: the ranks' one key, and no other."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._public


class DriverChannel:
    """The driver's end, bound to free ports of `host`. `send` and `receive` belong to one thread, `beats` to
    another. Raises EngineError where ZeroMQ cannot encrypt."""

    def __init__(self, host: str, ranks: int) -> None:
        if not zmq.has("curve"):
            raise EngineError("pyzmq was built without CURVE: install the pyzmq wheel from the package index")
        self._context = zmq.Context()
        public, secret = zmq.curve_keypair()
        client_public, client_secret = zmq.curve_keypair()
        self._auth = ThreadAuthenticator(self._context)
        self._auth.start()
        self._auth.configure_curve_callback(credentials_provider=_OnlyRanks(client_public))
        self._steps, self._beats = self._bind(secret), self._bind(secret)
        ports = [s.bind_to_random_port(f"tcp://{host}") for s in (self._steps, self._beats)]
        self._names = [b"%d" % rank for rank in range(ranks)]
        self.endpoint = Endpoint(
            f"tcp://{host}:{ports[0]}", f"tcp://{host}:{ports[1]}", public, client_public, client_secret
        )

    def wait_for_ranks(self, timeout_s: float) -> list[int]:
        """Until every rank has joined; returns those that have not after `timeout_s`."""
        missing = set(self._names)
        deadline = time.monotonic() + timeout_s
        while missing and self._steps.poll(max(0, int((deadline - time.monotonic()) * 1000))):
            name, _ = self._steps.recv_multipart()
            missing.discard(name)
        return sorted(int(name) for name in missing)

    def send(self, frame: bytes) -> int | None:
        """To every rank; returns the first that has left the channel, if one has."""
        gone = None
        for rank, name in enumerate(self._names):
            try:
                self._steps.send_multipart((name, frame))
            except zmq.ZMQError as e:
                if e.errno != zmq.EHOSTUNREACH:
                    raise
                gone = rank if gone is None else gone
        return gone

    def receive(self, timeout_s: float) -> bytes | None:
        """Rank 0's next result, None after `timeout_s`."""
        if not self._steps.poll(int(timeout_s * 1000)):
            return None
        return self._steps.recv_multipart()[1]

    def beats(self, timeout_s: float, tell_stack: bool = False) -> list[tuple[int, str]]:
        """Ranks that have shown a sign of life, after at most `timeout_s`; each is answered.

        With each the stack of its main thread, once it was asked for that (`tell_stack`).
        """
        alive = []
        wait = int(timeout_s * 1000)
        while self._beats.poll(wait):
            name, stack = self._beats.recv_multipart()
            with contextlib.suppress(zmq.ZMQError):  # it left meanwhile: nobody misses the answer
                self._beats.send_multipart((name, _TELL_STACK if tell_stack else _ALIVE))
            alive.append((int(name), stack.decode(errors="replace")))
            wait = 0
        return alive

    def close(self) -> None:
        for socket in (self._steps, self._beats):
            socket.close(linger=200)
        self._auth.stop()
        self._context.term()

    def _bind(self, secret: bytes) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.ROUTER)
        socket.curve_server = True
        socket.curve_secretkey = secret
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a rank that has left is an error, not silence
        return socket


class RankChannel:
    """A rank's end, made by the thread that will run its steps. Another thread shows signs of life from the
    start, and sets `orphaned` when the driver answers no more."""

    def __init__(self, endpoint: Endpoint, rank: int, orphaned: threading.Event) -> None:
        self._endpoint, self._rank, self._orphaned = endpoint, rank, orphaned
        self._main = threading.get_ident()
        self._context = zmq.Context()
        self._closed = threading.Event()
        self._steps = self._connect(endpoint.steps)
        self._steps.send(_READY)
        self._thread = threading.Thread(target=self._beat, name="signs-of-life", daemon=True)
        self._thread.start()

    def receive(self) -> bytes | None:
        """The next frame; None when the driver is gone."""
        while not self._orphaned.is_set():
            if self._steps.poll(500):
                return self._steps.recv()
        return None

    def send(self, frame: bytes) -> None:
        self._steps.send(frame)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self._steps.close(linger=200)
        self._context.term()

    def _beat(self) -> None:
        socket = self._connect(self._endpoint.beats)
        unanswered, answer = 0, _ALIVE
        while not self._closed.wait(BEAT_S):
            with contextlib.suppress(zmq.Again):  # no driver to send to; the number without answers decides
                socket.send(self._stack() if answer == _TELL_STACK else _ALIVE, zmq.NOBLOCK)
            unanswered += 1
            while socket.poll(0):
                answer = socket.recv()
                unanswered = 0
            if unanswered > ORPHANED_BEATS:
                self._orphaned.set()
                break
        socket.close(linger=0)

    def _stack(self) -> bytes:
        frame = sys._current_frames().get(self._main)
        return "".join(traceback.format_stack(frame))[-STACK_CHARS:].encode()

    def _connect(self, address: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.identity = b"%d" % self._rank
        socket.curve_serverkey = self._endpoint.server_key
        socket.curve_publickey = self._endpoint.client_public
        socket.curve_secretkey = self._endpoint.client_secret
        socket.connect(address)
        return socket
