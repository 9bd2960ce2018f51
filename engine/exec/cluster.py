"""The Ray session and a place for every rank: start or join a cluster, reserve bundles, order the ranks.

Ray places, starts, watches and ends the ranks; it carries no steps.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any

from engine.errors import CapacityError, ConfigError
from engine.exec import reaper

log = logging.getLogger(__name__)

#: Seconds to wait for the resources of all ranks.
PLACEMENT_TIMEOUT_S = 120.0
#: Logical CPUs of a local cluster: they only count places, real threads are set by the ranks.
_LOCAL_CPUS = 64
_OBJECT_STORE_BYTES = 80 << 20
#: Held for as long as this process lives, which is what it tells them.
_reapers: list[Any] = []


def join(address: str | None) -> tuple[str, bool]:
    """Start a local cluster, or join the one at `address`; once per process.

    Returns this node's IP address and whether the cluster is local. A local one listens on the loopback
    interface only, has no dashboard, and ends with this process. Raises ConfigError.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray hides all GPUs from actors without one otherwise; ranks pick theirs themselves
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "logging_level": "ERROR"}
    if not ray.is_initialized():
        try:
            if address is None:
                ray.init(
                    address="local",
                    include_dashboard=False,
                    num_cpus=_LOCAL_CPUS,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    _node_ip_address="127.0.0.1",
                    **quiet,
                )
                _reapers.append(reaper.start())
            else:
                ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as e:
            where = address or "a local cluster"
            raise ConfigError(f"--ray-address {where}: Ray could not be reached or started: {e}") from None
    host = "127.0.0.1" if address is None else ray.util.get_node_ip_address()
    return host, address is None


def reserve(ranks: int, gpus: bool) -> Any:
    """A placement group with one bundle for each rank, as close together as can be.

    Raises CapacityError naming what is missing.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    bundle = {"GPU": 1.0} if gpus else {"CPU": 1.0}
    group = placement_group([bundle] * ranks, strategy="PACK")
    deadline, interval = time.monotonic() + PLACEMENT_TIMEOUT_S, 5.0
    while not ray.wait([group.ready()], timeout=min(interval, max(0.1, deadline - time.monotonic())))[0]:
        kind = next(iter(bundle))
        free = ray.available_resources().get(kind, 0)
        log.warning("waiting_for_resources need=%d kind=%s free=%g", ranks, kind, free)
        interval *= 2
        if time.monotonic() > deadline:
            remove_placement_group(group)
            raise CapacityError(
                f"the Ray cluster has {free:g} free {kind}s and {ranks} are needed for "
                f"--tensor-parallel-size {ranks}: add nodes, or end what holds them"
            )
    return group


def has_gpus() -> bool:
    import ray

    return ray.cluster_resources().get("GPU", 0) > 0


def driver_first(nodes: list[str]) -> list[int]:
    """The order in which actors become ranks 0, 1, ...: those on the driver's node first, then node by node,
    so that neighbouring ranks share a host."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    first = {node: i for i, node in reversed(list(enumerate(nodes)))}
    return sorted(range(len(nodes)), key=lambda i: (nodes[i] != here, first[nodes[i]], i))
