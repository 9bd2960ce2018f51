"""Linear layers split over the ranks, after Megatron-LM (Shoeybi et al., 2019).

Column-parallel layers own output rows and need no communication; row-parallel layers own input columns
and end in one all-reduce. Layers take their tensors by name out of the dictionary that
`engine.load.checkpoint` filled, so what is left there was loaded for nobody.

Suffixes: T tokens, I input features, O output features (of this rank).
"""

from __future__ import annotations

import torch

from engine.load.shards import owned
from engine.parallel.comm import Comm
from engine.parallel.linear import linear, prepare

Tensors = dict[str, torch.Tensor]


class ColumnParallelLinear:
    """y = x @ W.T + b with this rank's rows of W."""

    def __init__(self, tensors: Tensors, name: str) -> None:
        self.weight = prepare(tensors.pop(f"{name}.weight"))
        self.bias_O = tensors.pop(f"{name}.bias", None)

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        return linear(x_TI, self.weight, self.bias_O)


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Two column-parallel layers of one input as one product: gate and up of an MLP."""

    def __call__(self, x_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        y_TO = linear(x_TI, self.weight, self.bias_O)
        half = y_TO.shape[-1] // 2
        return y_TO[:, :half], y_TO[:, half:]


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
        qkv_TO = linear(x_TI, self.weight, self.bias_O)
        return qkv_TO.view(x_TI.shape[0], self.num_heads + 2 * self.num_kv_heads, self.head_dim)


class RowParallelLinear:
    """y = sum over ranks of x_rank @ W_rank.T, plus b once: only rank 0 holds the bias."""

    def __init__(self, tensors: Tensors, name: str, comm: Comm) -> None:
        self.weight = prepare(tensors.pop(f"{name}.weight"))
        self.bias_O = tensors.pop(f"{name}.bias", None)
        self.comm = comm

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        return self.comm.all_reduce(linear(x_TI, self.weight, self.bias_O))
