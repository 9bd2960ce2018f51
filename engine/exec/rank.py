"""What runs inside a Ray actor: one rank, in two phases, then the step loop.

Ray may only construct it (cheap), because its node and devices are known afterwards; `prepare` then gives
it the environment and its place in the group. Knows nothing of placement or supervision.
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

from engine.config import EngineConfig, ModelSpec
from engine.errors import CapacityError, CheckpointError, ConfigError
from engine.exec.base import RankReport
from engine.exec.channel import STOP, Endpoint, RankChannel
from engine.exec.wire import pack_result, unpack_plan

#: Errors that say what the user must mend; they travel by name and text, everything else as a traceback.
USER_ERRORS = {cls.__name__: cls for cls in (CapacityError, CheckpointError, ConfigError)}


@dataclass(frozen=True, slots=True)
class Place:
    """Where an actor came to live."""

    node: str
    host: str
    pid: int


@dataclass(frozen=True, slots=True)
class Refused:
    """A user's error from a rank."""

    kind: str
    message: str


class RankProcess:
    """One rank. `worker` names its class as "module:name"."""

    def __init__(self, worker: str) -> None:
        self._worker_path = worker
        self._store: Any = None
        self._worker: Any = None

    def place(self) -> Place:
        import ray

        return Place(ray.get_runtime_context().get_node_id(), socket.gethostname(), os.getpid())

    def address(self) -> str:
        """This node's IP address, for ranks on other nodes."""
        import ray

        return ray.util.get_node_ip_address()

    def rendezvous(self, host: str, world: int) -> str:
        """Rank 0 binds a free port itself and keeps it, so that nobody can take it meanwhile."""
        from torch.distributed import TCPStore

        self._store = TCPStore(host, 0, world, True, wait_for_workers=False, multi_tenant=True)
        return f"tcp://{host}:{self._store.port}"

    def prepare(
        self,
        config: EngineConfig,
        spec: dict[str, Any],
        rank: int,
        world: int,
        init_method: str | None,
        environment: dict[str, str],
    ) -> Refused | None:
        """Second phase: environment, device, process group."""
        os.environ.update(environment)
        logging.basicConfig(
            level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s"
        )
        module, _, name = self._worker_path.partition(":")
        kind = getattr(importlib.import_module(module), name)
        self.rank = rank
        self._worker = kind(config, ModelSpec.from_wire(spec), rank, world, init_method)
        return _refusals(self._worker.init_device)

    def load(self) -> tuple[RankReport, float, float] | Refused:
        """The report, and when loading began and ended (seconds of this host's monotonic clock)."""
        began = time.monotonic()
        report = _refusals(self._worker.load)
        return report if isinstance(report, Refused) else (report, began, time.monotonic())

    def allocate(self, num_blocks: int) -> Refused | None:
        return _refusals(self._worker.allocate, num_blocks)

    def run(self, endpoint: Endpoint) -> None:
        """The step loop. Returns after the driver's stop; ends the process when the driver is gone."""
        orphaned = threading.Event()
        channel = RankChannel(endpoint, self.rank, orphaned)
        threading.Thread(target=_end_with, args=(orphaned,), daemon=True).start()
        try:
            while (frame := channel.receive()) is not None and frame != STOP:
                result = self._worker.run(unpack_plan(frame))
                if result is not None:
                    channel.send(pack_result(result))
        finally:
            channel.close()
        self._worker.close()


def _end_with(orphaned: threading.Event) -> None:
    """The main thread may hang in a collective whose peers are gone; nobody would end it."""
    orphaned.wait()
    time.sleep(1)
    os._exit(1)


def _refusals(verb: Any, *args: Any) -> Any:
    try:
        return verb(*args)
    except tuple(USER_ERRORS.values()) as e:
        kind = next(name for name, cls in USER_ERRORS.items() if isinstance(e, cls))
        return Refused(kind, str(e))
