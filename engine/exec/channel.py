"""The step channel: plans from the driver to every rank, results from rank 0, signs of life from all.

Two ZeroMQ ROUTER sockets on the driver, one for steps and one for signs of life, each with CURVE
encryption (RFC 26): keys are made anew for every engine and handed to the ranks by Ray; a peer that does
not know them gets no further than the handshake. Frames are msgpack (`engine.exec.wire`), never pickle.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from engine.errors import EngineError

#: Seconds between signs of life.
BEAT_S = 0.5
#: Seconds without an answer from the driver after which a rank ends itself.
ORPHANED_S = 15.0
STOP = b"stop"
_READY = b"ready"


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
    another."""

    def __init__(self, host: str, ranks: int) -> None:
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

    def send(self, frame: bytes) -> None:
        for name in self._names:
            self._steps.send_multipart((name, frame))

    def receive(self, timeout_s: float) -> bytes | None:
        """Rank 0's next result, None after `timeout_s`."""
        if not self._steps.poll(int(timeout_s * 1000)):
            return None
        return self._steps.recv_multipart()[1]

    def beats(self, timeout_s: float) -> list[int]:
        """Ranks that have shown a sign of life, after at most `timeout_s`; each is answered."""
        ranks = []
        wait = int(timeout_s * 1000)
        while self._beats.poll(wait):
            name, frame = self._beats.recv_multipart()
            self._beats.send_multipart((name, frame))
            ranks.append(int(name))
            wait = 0
        return ranks

    def close(self) -> None:
        for socket in (self._steps, self._beats):
            socket.close(linger=200)
        self._auth.stop()
        self._context.term()

    def _bind(self, secret: bytes) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.ROUTER)
        socket.curve_server = True
        socket.curve_secretkey = secret
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a rank that never joined is an error, not silence
        return socket


class RankChannel:
    """A rank's end. A thread of its own shows signs of life, and calls `orphaned` when the driver answers no
    more."""

    def __init__(self, endpoint: Endpoint, rank: int, orphaned: threading.Event) -> None:
        self._endpoint, self._rank, self._orphaned = endpoint, rank, orphaned
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
        answered = time.monotonic()
        while not self._closed.wait(BEAT_S):
            with contextlib.suppress(zmq.Again):  # no driver to send to; the time without answers decides
                socket.send(b"", zmq.NOBLOCK)
            while socket.poll(0):
                socket.recv()
                answered = time.monotonic()
            if time.monotonic() - answered > ORPHANED_S:
                self._orphaned.set()
                break
        socket.close(linger=0)

    def _connect(self, address: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.identity = b"%d" % self._rank
        socket.curve_serverkey = self._endpoint.server_key
        socket.curve_publickey = self._endpoint.client_public
        socket.curve_secretkey = self._endpoint.client_secret
        socket.connect(address)
        return socket


def require_curve() -> None:
    """Raises EngineError where this build of ZeroMQ cannot encrypt."""
    if not zmq.has("curve"):
        raise EngineError("pyzmq was built without CURVE: install the pyzmq wheel from the package index")
