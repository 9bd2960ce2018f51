"""Embedding and head split by vocabulary: each rank holds the ids [start, end) of a padded table.

The embedding ends in one all-reduce. The head ends in none: logits stay where they are, and the
sampler compares ranks by a few numbers per row.

Suffixes: T tokens, S selected rows, D hidden, V this rank's vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.load.shards import vocab_range
from engine.parallel.comm import Comm
from engine.parallel.linear import linear, prepare


class VocabParallelEmbedding:
    """Looks up this rank's ids, zero for all others, and sums over the ranks."""

    def __init__(self, weight_VD: torch.Tensor, vocab_size: int, comm: Comm) -> None:
        self.weight_VD = weight_VD
        self.comm = comm
        self.start, self.end, _ = vocab_range(vocab_size, comm.rank, comm.world)

    def __call__(self, ids_T: torch.Tensor) -> torch.Tensor:
        if self.comm.world == 1:
            return F.embedding(ids_T, self.weight_VD)
        mine_T = (ids_T >= self.start) & (ids_T < self.end)
        x_TD = F.embedding(torch.where(mine_T, ids_T - self.start, 0), self.weight_VD)
        return self.comm.all_reduce(x_TD.masked_fill_(~mine_T[:, None], 0))


class ParallelLMHead:
    """Logits of this rank's ids. Tied models pass the embedding's own tensor: an alias, not a copy."""

    def __init__(self, weight_VD: torch.Tensor, vocab_size: int, comm: Comm) -> None:
        self.weight = prepare(weight_VD)
        self.start, self.end, _ = vocab_range(vocab_size, comm.rank, comm.world)

    def __call__(self, x_SD: torch.Tensor) -> torch.Tensor:
        """[S, end - start]: the padding ids are cut off, so that nothing can ever draw one."""
        return linear(x_SD, self.weight)[:, : self.end - self.start]
