"""One rank's share of the vocabulary, and the few numbers by which ranks agree on a row.

Knows nothing of sampling. All verbs are collective: every rank calls them in the same order with the
same number of rows, and every rank gets the same answer.

Suffixes: W ranks, R rows.
"""

from __future__ import annotations

import torch

from engine.parallel.comm import Comm


class Shard:
    """The token ids [start, end) of this rank. The ranks' ranges follow each other."""

    def __init__(self, comm: Comm | None, start: int, end: int, device: torch.device) -> None:
        self.comm = comm or Comm()
        self.start = start
        self.size = end - start
        self.device = device

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """[W, *x.shape]"""
        return self.comm.all_gather(x)

    def max(self, x: torch.Tensor) -> torch.Tensor:
        """The greatest over ranks, element by element; NaN if any is NaN."""
        return self.gather(x).amax(dim=0)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of integers, which no order of addition can change."""
        return self.gather(x).sum(dim=0)

    def best(self, values_R: torch.Tensor, ids_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(value, token id) of each row's greatest value over all ranks; of equal ones the lower id.

        Ids are this rank's own, counted from 0. Both travel as float64, which holds any id exactly.
        """
        pairs_R2 = torch.stack((values_R.to(torch.float64), (ids_R + self.start).to(torch.float64)), dim=1)
        pairs_WR2 = self.gather(pairs_R2)
        value_R, winner_R = pairs_WR2[:, :, 0].max(dim=0)  # the first of equal ones: the lowest ids
        return value_R, pairs_WR2[:, :, 1].gather(0, winner_R[None])[0].to(torch.int64)

    def mine(self, ids_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(whether the id is this rank's, its local index or 0) of global token ids."""
        local_R = ids_R - self.start
        mine_R = (local_R >= 0) & (local_R < self.size)
        return mine_R, torch.where(mine_R, local_R, 0)
