"""Which environment variables of the driver a rank gets: an allow-list by prefix, less node-local names.

Ray starts ranks with an environment of its own. A rank should see the user's tuning of its libraries,
and must not see what belongs to the driver's node or process (TensorRT-LLM #12024). Pure functions.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

ALLOWED_PREFIXES = (
    "NCCL_",
    "GLOO_",
    "TORCH_",
    "CUDA_",
    "OMP_",
    "HF_",
    "HEADRACE_",
)
#: Names with an allowed prefix that belong to one node or process, or that no rank has business with.
DENIED = frozenset({
    "NCCL_ASYNC_ERROR_HANDLING", "NCCL_HOSTID", "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "HEADRACE_PARENT_PID", "HEADRACE_REDIS",
})  # fmt: skip
_DENIED_SUFFIX = "_VISIBLE_DEVICES"
#: Ray sets these in every actor, so that a rank's own value is no choice of its node's owner.
_RAYS_OWN = frozenset({"OMP_NUM_THREADS"})


def for_ranks(environ: Mapping[str, str]) -> dict[str, str]:
    """The part of `environ` that every rank gets."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if name.startswith(ALLOWED_PREFIXES) and name not in DENIED and not name.endswith(_DENIED_SUFFIX)
    }


def adopt(own: MutableMapping[str, str], drivers: Mapping[str, str]) -> None:
    """Add the driver's part to a rank's `own` environment. What its node has set already stays: a pod knows
    its own network interface."""
    for name, value in drivers.items():
        if name in _RAYS_OWN or name not in own:
            own[name] = value
