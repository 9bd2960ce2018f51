"""Collectives through shared memory: every rank gets the pairwise sum, and none waits for ever."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engine.cpu.build import library
from engine.parallel import shared
from engine.parallel.comm import connect
from tests.engine.model import drive

pytestmark = pytest.mark.skipif(library()[0] is None, reason=f"no kernels: {library()[1]}")
SIZES = [1, 17, 4096, 70_001, shared.SLOT // 4 + 5]


def message(rank: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(100 * rank + size % 97)).to(dtype)


def tree(parts: list[torch.Tensor]) -> torch.Tensor:
    """The sum as it is promised: neighbours first, in float32, rounded once."""
    dtype, sums = parts[0].dtype, [p.float() for p in parts]
    while len(sums) > 1:
        sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=False)] + sums[len(sums) & ~1 :]
    return sums[0].to(dtype)


def sums(rank: int, world: int, init: str, folder: Path) -> None:
    torch.set_num_threads(1)
    comm = connect(rank, world, init, torch.device("cpu"), 60)
    assert comm.shared is not None
    comm.barrier()
    mapped = [
        x for x in Path("/proc/self/maps").read_text().splitlines() if f"{shared.FOLDER}/headrace-" in x
    ]
    assert len(mapped) == 1
    assert mapped[0].endswith("(deleted)"), "the file still has a name"
    for dtype in (torch.float32, torch.bfloat16):
        for size in SIZES:
            parts = [message(r, size, dtype) for r in range(world)]
            assert torch.equal(comm.all_reduce(parts[rank].clone()), tree(parts)), (dtype, size)
    strided = torch.arange(12.0).view(3, 4).T * (rank + 1)
    assert torch.equal(comm.all_reduce(strided), torch.arange(12.0).view(3, 4).T * (world * (world + 1) / 2))
    for i in range(500):  # nobody reads a message of another round
        x = torch.full((i % 40 + 1,), float(i + rank))
        assert (comm.all_reduce(x) == world * i + world * (world - 1) / 2).all()
        ids = torch.tensor([[i, rank]])
        assert torch.equal(comm.all_gather(ids)[:, 0], torch.tensor([[i, r] for r in range(world)]))
    (folder / str(rank)).touch()
    comm.close()


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_rank_gets_the_pairwise_sum_and_all_messages(world: int, tmp_path: Path) -> None:
    drive.spawn(world, sums, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [str(r) for r in range(world)]


def waits(rank: int, world: int, init: str, folder: Path) -> None:
    comm = connect(rank, world, init, torch.device("cpu"), 60)
    assert comm.shared is not None
    comm.shared.timeout_s = 0.5
    if rank == 0:
        with pytest.raises(shared.PeerLost, match="did not come to collective 1"):
            comm.all_reduce(torch.ones(3))
        (folder / "said").touch()
    dist.barrier()
    comm.close()


def test_a_rank_that_does_not_come_is_reported(tmp_path: Path) -> None:
    drive.spawn(2, waits, tmp_path)
    assert (tmp_path / "said").exists()


def full(rank: int, world: int, init: str, folder: Path) -> None:
    shared.SLOT = 1 << 50
    comm = connect(rank, world, init, torch.device("cpu"), 60)
    assert comm.shared is None
    assert torch.equal(comm.all_reduce(torch.ones(3)), torch.full((3,), 2.0))
    (folder / str(rank)).touch()
    comm.close()


def test_without_room_for_it_the_ranks_use_gloo(tmp_path: Path) -> None:
    drive.spawn(2, full, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
