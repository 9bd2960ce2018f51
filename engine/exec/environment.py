"""Which environment variables of the driver a rank gets: an allow-list by prefix, less node-local names.

Ray starts ranks with an environment of its own. A rank should see the user's tuning of its libraries,
and must not see what belongs to the driver's node or process (TensorRT-LLM #12024). A pure function.
"""

from __future__ import annotations

from collections.abc import Mapping

ALLOWED_PREFIXES = (
    "NCCL_",
    "GLOO_",
    "TORCH_",
    "CUDA_",
    "OMP_",
    "MKL_",
    "KMP_",
    "ONEDNN_",
    "HF_",
    "HEADRACE_",
)
#: Names with an allowed prefix that name a device, an interface or a process of one node.
DENIED = frozenset({
    "CUDA_VISIBLE_DEVICES", "NCCL_ASYNC_ERROR_HANDLING", "NCCL_HOSTID", "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "HEADRACE_PARENT_PID",
})  # fmt: skip
_DENIED_SUFFIXES = ("_VISIBLE_DEVICES", "_SOCKET_IFNAME_LOCAL")


def for_ranks(environ: Mapping[str, str]) -> dict[str, str]:
    """The part of `environ` that every rank gets."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if name.startswith(ALLOWED_PREFIXES) and name not in DENIED and not name.endswith(_DENIED_SUFFIXES)
    }
