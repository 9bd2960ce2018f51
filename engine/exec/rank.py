"""What runs inside a Ray actor: one rank, in two phases, then the step loop.

Ray may only construct it (cheap), because its node and devices are known afterwards; `place` then gives it
the driver's environment, and `prepare` its place in the group. Every verb answers with a `Failure` instead
of raising: exceptions would travel by pickle, and not all of them survive it. Knows nothing of placement or
supervision.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

from engine.config import EngineConfig, ModelSpec
from engine.errors import CapacityError, CheckpointError, ConfigError
from engine.exec.base import RankReport
from engine.exec.channel import STOP, Endpoint, RankChannel
from engine.exec.environment import adopt
from engine.exec.wire import pack_result, unpack_plan

#: Errors that say what the user must mend; they travel by name and text, everything else as a traceback.
USER_ERRORS = {cls.__name__: cls for cls in (CapacityError, CheckpointError, ConfigError)}
_PR_SET_PDEATHSIG = 1

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Place:
    """Where an actor came to live."""

    node: str
    host: str
    pid: int
    address: str  # IP
    log: str  # file of its standard error, "" where that is none


@dataclass(frozen=True, slots=True)
class Failure:
    """What a verb raised: the name of a user's error and its text, or no name and a traceback."""

    kind: str
    text: str


def _answering(
    verb: Callable[Concatenate[RankProcess, P], T],
) -> Callable[Concatenate[RankProcess, P], T | Failure]:
    @functools.wraps(verb)
    def answer(self: RankProcess, /, *args: P.args, **kwargs: P.kwargs) -> T | Failure:
        try:
            return verb(self, *args, **kwargs)
        except tuple(USER_ERRORS.values()) as e:
            kind = next(name for name, cls in USER_ERRORS.items() if isinstance(e, cls))
            return Failure(kind, str(e))
        except Exception:
            return Failure("", traceback.format_exc())

    return answer


class RankProcess:
    """One rank. `worker` names its class as "module:name"."""

    def __init__(self, worker: str) -> None:
        # A rank that is stopped, or deep in a kernel, would outlive Ray's own processes otherwise.
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        self._worker_path = worker
        self._store: Any = None
        self._worker: Any = None
        self._channel: RankChannel

    @_answering
    def place(self, environment: dict[str, str]) -> Place:
        """First, before any library reads its environment."""
        import ray

        adopt(os.environ, environment)
        node = ray.get_runtime_context().get_node_id()
        return Place(node, socket.gethostname(), os.getpid(), ray.util.get_node_ip_address(), _log_file())

    @_answering
    def rendezvous(self, address: str, world: int) -> str:
        """Rank 0 binds a free port of `address` itself and keeps it, so that nobody can take it meanwhile."""
        from torch.distributed import TCPStore

        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.bind((address, 0))
        listener.listen(128)
        port = listener.getsockname()[1]
        # Left to itself the store would listen on all interfaces.
        self._store = TCPStore(
            address, port, world, True,
            wait_for_workers=False, multi_tenant=True, master_listen_fd=listener.detach(),
        )  # fmt: skip
        return f"tcp://{address}:{port}"

    @_answering
    def prepare(
        self,
        config: EngineConfig,
        spec: dict[str, Any],
        rank: int,
        world: int,
        init_method: str | None,
        endpoint: Endpoint,
    ) -> None:
        """Second phase: signs of life from here on, device, process group."""
        logging.basicConfig(
            level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s"
        )
        orphaned = threading.Event()
        self._channel = RankChannel(endpoint, rank, orphaned)
        threading.Thread(target=_end_with, args=(orphaned,), daemon=True).start()
        module, _, name = self._worker_path.partition(":")
        kind = getattr(importlib.import_module(module), name)
        self._worker = kind(config, ModelSpec.from_wire(spec), rank, world, init_method)
        self._worker.init_device()

    @_answering
    def load(self) -> tuple[RankReport, float, float]:
        """The report, and when loading began and ended (seconds of this host's monotonic clock)."""
        began = time.monotonic()
        return self._worker.load(), began, time.monotonic()

    @_answering
    def allocate(self, num_blocks: int) -> None:
        self._worker.allocate(num_blocks)

    @_answering
    def run(self) -> None:
        """The step loop. Returns after the driver's stop, or when the driver is gone."""
        try:
            while (frame := self._channel.receive()) is not None and frame != STOP:
                result = self._worker.run(unpack_plan(frame))
                if result is not None:
                    self._channel.send(pack_result(result))
        finally:
            self._channel.close()
        self._worker.close()


def _log_file() -> str:
    try:
        name = os.readlink("/proc/self/fd/2")
    except OSError:
        return ""
    return name if os.path.isfile(name) else ""


def _end_with(orphaned: threading.Event) -> None:
    """The main thread may hang in a collective whose peers are gone; nobody would end it."""
    orphaned.wait()
    time.sleep(1)
    os._exit(1)
