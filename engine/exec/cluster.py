"""The Ray session and a place for every rank: start or join a cluster, reserve bundles, order the ranks.

Ray places, starts, watches and ends the ranks; it carries no steps. Knows nothing of what a rank does.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import sys
import threading
import time
from typing import Any

from engine.errors import CapacityError, ConfigError, EngineError
from engine.exec import reaper

log = logging.getLogger(__name__)

#: Seconds to wait for the resources of all ranks.
PLACEMENT_TIMEOUT_S = 120.0
#: CPUs of a local cluster, at least: they only count places, real threads are set by the ranks.
_LOCAL_CPUS = 64
_OBJECT_STORE_BYTES = 80 << 20
#: Ray gives its own processes thirty seconds to start, which a busy machine may need all of.
_STARTS = 2
#: Read by Ray when it is imported. No usage statistics; and no word of its own on standard output, where it
#: would tell of deaths that `engine.exec.watch` tells of.
_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": "."}
#: The same, for a local cluster. The first is the only way to loopback mode; with the last two Ray neither
#: ends ranks that fill the machine's memory on purpose, nor warns about the GPUs of ranks without one.
_LOCAL_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
#: Held for as long as this process lives, which is what it tells them.
_reapers: list[Any] = []


def join(address: str | None, cpus: int) -> str:
    """Start a local cluster with room for `cpus` threads, or join the one at `address`; once per process.
    Returns this node's IP address.

    A local cluster listens on the loopback interface only, asks for a token, has no dashboard, and ends with
    this process. (Where the application imported Ray before, it listens on the node's address as well.)
    Raises ConfigError when the cluster at `address` cannot be joined, EngineError when Ray does not start.
    """
    if "ray" not in sys.modules:
        _prepare_import(local=address is None)
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    if not ray.is_initialized():
        if address is None:
            _start_local(cpus)
        else:
            _join_remote(address)
    return "127.0.0.1" if address is None else ray.util.get_node_ip_address()


def _prepare_import(local: bool) -> None:
    for name, value in (_ENVIRONMENT | (_LOCAL_ENVIRONMENT if local else {})).items():
        os.environ.setdefault(name, value)
    if local and "RAY_AUTH_TOKEN_PATH" not in os.environ:  # Ray would write a token into the home folder
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _start_local(cpus: int) -> None:
    _reapers.append(reaper.start())
    for attempt in range(1, _STARTS + 1):
        error = _init(
            address="local",
            include_dashboard=False,
            num_cpus=max(cpus, _LOCAL_CPUS),
            object_store_memory=_OBJECT_STORE_BYTES,
            _node_ip_address="127.0.0.1",
        )
        if error is None:
            return
        log.warning("ray_not_started attempt=%d of=%d cause=%s", attempt, _STARTS, error)
    raise EngineError(f"Ray did not start on this machine: {error} (its logs are in /tmp/ray/session_latest)")


def _join_remote(address: str) -> None:
    if os.environ.get("RAY_AUTH_MODE") != "token":
        log.warning(
            "ray_without_token address=%s: whoever reaches the cluster can run code on it; "
            "set RAY_AUTH_MODE=token on all nodes",
            address,
        )
    if (error := _init(address=address)) is not None:
        raise ConfigError(f"--ray-address {address}: Ray could not be reached: {error}") from error


def _init(**settings: Any) -> Exception | None:
    """ray.init in a thread that lives as long as this process. Returns what it raised.

    Ray's processes get a signal when the *thread* that started them ends (PR_SET_PDEATHSIG): the caller's
    may end early, and after a failed start they should go. Ray also takes over SIGTERM, but not from here.
    """
    import ray

    started: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def keep() -> None:
        try:
            ray.init(log_to_driver=False, configure_logging=False, logging_level=logging.ERROR, **settings)
        except Exception as e:  # Ray raises bare exceptions here
            started.put(e)
            return
        started.put(None)
        threading.Event().wait()

    threading.Thread(target=keep, name="ray-session", daemon=True).start()
    return started.get()


def reserve(ranks: int, gpus: bool, cpus: int, wait: bool) -> Any:
    """A placement group with one bundle for each rank, as close together as can be: one GPU each, or `cpus`.

    `wait`: resources may still come, as nodes join. Raises CapacityError naming what is missing.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    kind, each = ("GPU", 1) if gpus else ("CPU", cpus)
    need = ranks * each
    if wait or ray.cluster_resources().get(kind, 0) >= need:
        group = placement_group([{kind: float(each)}] * ranks, strategy="PACK")
        began, interval, told = time.monotonic(), 5.0, 0.0
        while not group.wait(1):
            time.sleep(0.1)  # Ray's own wait may return at once
            waited = time.monotonic() - began
            if waited > PLACEMENT_TIMEOUT_S:
                remove_placement_group(group)
                break
            if waited - told > interval:
                told, interval = waited, interval * 2
                free = ray.available_resources().get(kind, 0)
                log.warning("waiting_for_resources need=%d kind=%s free=%g", need, kind, free)
        else:
            return group
    free, nodes = ray.available_resources().get(kind, 0), len(ray.nodes())
    hint = "add nodes, end what holds them" + (", or use --device cpu" if gpus else "")
    raise CapacityError(
        f"the Ray cluster of {nodes} nodes has {free:g} free {kind}s, and --tensor-parallel-size {ranks} "
        f"needs {need} ({each} on one node for each rank): {hint}"
    )


def has_gpus() -> bool:
    import ray

    return ray.cluster_resources().get("GPU", 0) > 0


def this_node() -> str:
    import ray

    return ray.get_runtime_context().get_node_id()


def driver_first(nodes: list[str], here: str) -> list[int]:
    """The order in which actors, by the node of each, become ranks 0, 1, ...: those on the driver's node
    (`here`) first, then node by node, so that neighbouring ranks share a host."""
    first = {node: i for i, node in reversed(list(enumerate(nodes)))}
    return sorted(range(len(nodes)), key=lambda i: (nodes[i] != here, first[nodes[i]], i))
