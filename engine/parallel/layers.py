"""Linear layers split over the ranks, after Megatron-LM (Shoeybi et al., 2019).

Column-parallel layers own output rows and need no communication; row-parallel layers own input columns
and end in one all-reduce. Layers take their tensors by name out of the dictionary that
`engine.load.checkpoint` filled, so what is left there was loaded for nobody.

Suffixes: T tokens, I input features, O output features (of this rank).
"""

from __future__ import annotations

import torch

from engine.cpu.gemm import Panels
from engine.cpu.int8 import Int8Panels
from engine.load.shards import owned
from engine.parallel.comm import Comm
from engine.parallel.linear import Tensors, gated_product, partial_product, product


class ColumnParallelLinear:
    """y = x @ W.T + b with this rank's rows of W."""

    def __init__(self, tensors: Tensors, name: str) -> None:
        weight, bias = tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.bias", None)
        self.product = product(tensors, weight, bias)

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        return self.product(x_TI)


class MergedColumnParallelLinear(ColumnParallelLinear):
    """The gate and up projections of an MLP as one product: silu(x @ gate.T) * (x @ up.T)."""

    def __init__(self, tensors: Tensors, name: str) -> None:
        weight, bias = tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.bias", None)
        self.product = gated_product(tensors, weight, bias)


class QKVParallelLinear(ColumnParallelLinear):
    """Q, K and V as one product: this rank's query heads, then its KV heads twice.

    With fewer KV heads than ranks, several ranks hold the same KV head.
    """

    def __init__(
        self, tensors: Tensors, name: str, num_heads: int, num_kv_heads: int, head_dim: int, comm: Comm
    ) -> None:
        super().__init__(tensors, name)
        self.num_heads = owned(num_heads, comm.rank, comm.world)[1]
        self.num_kv_heads = owned(num_kv_heads, comm.rank, comm.world)[1]
        self.head_dim = head_dim

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        """[T, heads + 2 * kv_heads, head_dim]: q, k and v along the second dimension."""
        qkv_TO = self.product(x_TI)
        return qkv_TO.view(x_TI.shape[0], self.num_heads + 2 * self.num_kv_heads, self.head_dim)


class RowParallelLinear:
    """y = sum over ranks of x_rank @ W_rank.T, plus b once: only rank 0 holds the bias.

    With the C++ kernel the partial sums cross in float32, as branches of the tree in which one rank adds
    them: 1, 2 and 4 ranks give the same bits (but for a bias, which rank 0 adds before the others' sums).
    """

    def __init__(self, tensors: Tensors, name: str, comm: Comm) -> None:
        weight, bias = tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.bias", None)
        self.product = partial_product(tensors, weight, bias, comm.world)
        self.comm = comm

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        if self.comm.world == 1:
            return self.product(x_TI)
        if isinstance(self.product, Panels | Int8Panels):
            return self.comm.all_reduce(self.product(x_TI, wide=True)).to(x_TI.dtype)
        return self.comm.all_reduce(self.product(x_TI))
