"""The tensor-parallel group: what crosses between ranks inside a step, counted.

Knows nothing of models or plans. `Comm()` alone is the group of one rank, in which nothing crosses.
A forward pass makes 2L + 1 all-reduces; the sampler's few numbers travel by `all_gather`, counted
apart, so that a test can show that no logits do.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from engine.cpu.kernels import NAMES as SHARED_SUMS
from engine.parallel.shared import SLOT, SharedMemory, share


@dataclass(slots=True)
class Traffic:
    """What this rank has sent into collectives since it started."""

    all_reduces: int = 0
    all_reduce_bytes: int = 0
    gathers: int = 0
    gather_bytes: int = 0


class Comm:
    """Rank `rank` of `world`. Every rank must call the same verbs in the same order."""

    def __init__(self, rank: int = 0, world: int = 1, shared: SharedMemory | None = None) -> None:
        self.rank = rank
        self.world = world
        self.shared = shared  # CPU ranks of one machine
        self.traffic = Traffic()
        self._ordered_sum = world > 2 and dist.get_backend() == "gloo"

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks; may overwrite `x`.

        gloo's ring adds the ranks in an order that depends on where an element lies in the message, so
        for more than two ranks a row's sum would depend on how many rows share the step. There the
        ranks are gathered and added in pairs instead: the same bits for any batch.
        """
        if self.world == 1:
            return x
        self.traffic.all_reduces += 1
        self.traffic.all_reduce_bytes += x.numel() * x.element_size()
        if self.shared is not None and x.dtype in SHARED_SUMS:
            return self.shared.sum(x)
        if not self._ordered_sum:
            dist.all_reduce(x)
            return x
        parts = self._gather(x)
        sums = list(parts.unbind(0))
        while len(sums) > 1:  # neighbours first: the tree of `engine.cpu.gemm`
            sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=False)] + sums[len(sums) & ~1 :]
        return sums[0]

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[world, *x.shape]: the same shape from every rank. For the sampler's small tensors."""
        if self.world == 1:
            return x.unsqueeze(0)
        self.traffic.gathers += 1
        self.traffic.gather_bytes += x.numel() * x.element_size()
        return self._gather(x)

    def broadcast(self, x: torch.Tensor, source: int = 0) -> torch.Tensor:
        """`source`'s tensor, in place, on every rank."""
        if self.world > 1:
            dist.broadcast(x, source)
        return x

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the group. Peers that are dead already do not matter."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def _gather(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        if self.shared is not None and x.numel() * x.element_size() <= SLOT:
            return self.shared.gather(x)
        out = torch.empty((self.world, *x.shape), dtype=x.dtype, device=x.device)
        dist.all_gather(list(out.unbind(0)), x)
        return out


def connect(rank: int, world: int, init_method: str | None, device: torch.device, timeout_s: float) -> Comm:
    """Join the group at `init_method` ("tcp://host:port"): NCCL between GPUs, gloo between CPUs, and shared
    memory beside it where all ranks are on one machine."""
    if world > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=init_method,
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout_s),
        )
    on_cpus = world > 1 and device.type == "cpu"
    return Comm(rank, world, share(rank, world, timeout_s) if on_cpus else None)
