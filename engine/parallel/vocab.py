"""Embedding and head split by vocabulary: each rank holds the ids [start, end) of a padded table.

The embedding ends in one all-reduce. The head ends in none: logits stay where they are, and the
sampler compares ranks by a few numbers per row.

Suffixes: T tokens, S selected rows, D hidden, V this rank's vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.cpu.gemm import Panels
from engine.cpu.int8 import Int8Panels
from engine.load.shards import vocab_range
from engine.parallel.comm import Comm
from engine.parallel.linear import Product, Tensors, product


class VocabParallelEmbedding:
    """Looks up this rank's ids, zero for all others, and sums over the ranks."""

    def __init__(self, weight_VD: torch.Tensor | Panels | Int8Panels, vocab_size: int, comm: Comm) -> None:
        self.weight_VD = weight_VD
        self.comm = comm
        self.start, self.end, _ = vocab_range(vocab_size, comm.rank, comm.world)

    def __call__(self, ids_T: torch.Tensor) -> torch.Tensor:
        if self.comm.world == 1:
            return self._rows(ids_T)
        mine_T = (ids_T >= self.start) & (ids_T < self.end)
        x_TD = self._rows(torch.where(mine_T, ids_T - self.start, 0))
        return self.comm.all_reduce(x_TD.masked_fill_(~mine_T[:, None], 0))

    def _rows(self, ids_T: torch.Tensor) -> torch.Tensor:
        if isinstance(self.weight_VD, torch.Tensor):
            return F.embedding(ids_T, self.weight_VD)
        return self.weight_VD.rows(ids_T)


class ParallelLMHead:
    """Logits of this rank's ids."""

    def __init__(self, product: Product, vocab_size: int, comm: Comm) -> None:
        self.product = product
        self.start, self.end, _ = vocab_range(vocab_size, comm.rank, comm.world)

    def __call__(self, x_SD: torch.Tensor) -> torch.Tensor:
        """[S, end - start]: the padding ids are cut off, so that nothing can ever draw one."""
        return self.product(x_SD)[:, : self.end - self.start]


def tied(
    tensors: Tensors, weight_VD: torch.Tensor, vocab_size: int, comm: Comm
) -> tuple[VocabParallelEmbedding, ParallelLMHead]:
    """Embedding and head of one table, held once where the head's form can give rows back."""
    head = product(tensors, weight_VD)
    shared = head if isinstance(head, Panels | Int8Panels) else weight_VD
    return VocabParallelEmbedding(shared, vocab_size, comm), ParallelLMHead(head, vocab_size, comm)
