"""Attention of CPUs by one C++ kernel that reads the paged cache in place (`cpu_paged.cpp`).

Gathering blocks for torch's SDPA reads and writes every key twice more, and pads rows to each other; here
a step of decoding rows and prompt chunks is one call a layer. Results depend on nothing but the row itself.

Suffixes: T tokens, N heads, K KV heads, H head size.
"""

from __future__ import annotations

import numpy as np
import torch

from engine.attn.base import AttnShape, AttnStep, HeadWork, KVCache
from engine.cpu.build import library
from engine.cpu.kernels import LANES, NAMES, kernel
from engine.cpu.memory import zeros

#: Queries (tokens times query heads of a KV head) that share one pass over the keys.
QUERIES = 32


def refusal(shape: AttnShape) -> str | None:
    """Why this backend cannot serve a shape; None if it can."""
    if shape.dtype not in NAMES:
        return f"no CPU kernel for {shape.dtype}"
    for what, size in (("head size", shape.head_dim), ("block size", shape.block_size)):
        if size % LANES:
            return f"{what} {size} is no multiple of {LANES}"
    built, reason = library()
    return None if built is not None else reason


#: Bytes between blocks that are large and would else lie powers of two apart (`cpu_cache.h`).
GAP, LARGE = 320, 16 << 10


class UprightCache(KVCache):
    """[blocks, block], laid out within a block as `cpu_cache.h` says."""

    def __init__(self, shape: AttnShape, num_blocks: int) -> None:
        size = shape.num_kv_heads * shape.block_size * shape.head_dim
        if size * shape.dtype.itemsize >= LARGE:
            size += GAP // shape.dtype.itemsize
        self.k = [zeros((num_blocks, size), shape.dtype) for _ in shape.windows]
        self.v = [zeros((num_blocks, size), shape.dtype) for _ in shape.windows]


class CpuPagedBackend:
    """Implements `engine.attn.base.AttentionBackend`. `refusal` must have been None."""

    name = "cpu_paged"

    def __init__(self, shape: AttnShape) -> None:
        self.shape = shape
        self.scale = shape.head_dim**-0.5
        self.tile = max(1, QUERIES // (shape.num_heads // shape.num_kv_heads))
        self._attend = kernel("attend", shape.dtype)
        self._store = kernel("store", shape.dtype)
        self._heads = kernel("heads", shape.dtype)
        self.cache: KVCache

    def allocate(self, num_blocks: int) -> None:
        self.cache = UprightCache(self.shape, num_blocks)

    def begin(self, step: AttnStep) -> None:
        self.step = step
        self.starts, self.cu = np.ascontiguousarray(step.starts), np.ascontiguousarray(step.cu)
        self.tables_RB = step.tables_RB.contiguous()
        tiles_R = -(-step.counts // self.tile)
        row_X = np.repeat(np.arange(len(step.counts)), tiles_R)
        before_R = np.cumsum(tiles_R) - tiles_R
        first_X = (np.arange(len(row_X)) - before_R[row_X]) * self.tile
        count_X = np.minimum(self.tile, step.counts[row_X] - first_X)
        self.tasks_X3 = np.ascontiguousarray(np.stack((row_X, first_X, count_X), axis=1), dtype=np.int32)
        self.most = int(count_X.max())

    def store(self, layer: int, k_TKH: torch.Tensor, v_TKH: torch.Tensor, slots_T: torch.Tensor) -> None:
        """Write keys and values of the tokens that `slots_T` counts to their slots."""
        s = self.shape
        k_TKH, v_TKH = _packed_heads(k_TKH), _packed_heads(v_TKH)
        self._store(
            self.cache.k[layer].data_ptr(), self.cache.v[layer].data_ptr(),
            k_TKH.data_ptr(), v_TKH.data_ptr(), slots_T.data_ptr(), k_TKH.stride(0), v_TKH.stride(0),
            self.cache.k[layer].stride(0), slots_T.shape[0], s.num_kv_heads, s.head_dim, s.block_size,
            torch.get_num_threads(),
        )  # fmt: skip

    def attend(
        self, layer: int, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor
    ) -> torch.Tensor:
        self.store(layer, k_TKH, v_TKH, self.step.slots_T)
        return self._stored(layer, _packed_heads(q_TNH))

    def attend_heads(self, layer: int, qkv_TXH: torch.Tensor, work: HeadWork) -> torch.Tensor:
        """`attend` for raw heads; `cpu_heads.cpp` does the work on them while it stores them."""
        s, slots_T, tokens = self.shape, self.step.slots_T, qkv_TXH.shape[0]
        qkv_TXH = qkv_TXH.contiguous()
        q_TNH = torch.empty((tokens, s.num_heads, s.head_dim), dtype=s.dtype)
        # Held by name until the call: the kernel sees addresses only.
        factors = [None if x is None else x.contiguous() for x in (work.cos, work.sin, work.logn)]
        self._heads(
            q_TNH.data_ptr(), self.cache.k[layer].data_ptr(), self.cache.v[layer].data_ptr(),
            qkv_TXH.data_ptr(), *(_address(x) for x in (*factors, work.q_weight, work.k_weight)),
            slots_T.data_ptr(), tokens, slots_T.shape[0], self.cache.k[layer].stride(0),
            s.num_heads, s.num_kv_heads, s.head_dim, 0 if work.cos is None else work.cos.shape[-1],
            s.block_size, work.eps, torch.get_num_threads(),
        )  # fmt: skip
        return self._stored(layer, q_TNH)

    def _stored(self, layer: int, q_TNH: torch.Tensor) -> torch.Tensor:
        """Attention of the step's queries over what is in the cache."""
        s, tasks = self.shape, self.tasks_X3
        out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype)
        # Padding tokens are 0: NaN of an earlier use of this memory would travel through the layers.
        out_TNH[self.step.slots_T.shape[0] :] = 0
        self._attend(
            out_TNH.data_ptr(), q_TNH.data_ptr(), self.cache.k[layer].data_ptr(),
            self.cache.v[layer].data_ptr(), self.tables_RB.data_ptr(),
            self.starts.ctypes.data, self.cu.ctypes.data, tasks.ctypes.data,
            out_TNH.stride(0), q_TNH.stride(0), self.tables_RB.stride(0),
            self.cache.k[layer].stride(0), len(tasks), self.most,
            s.num_heads, s.num_kv_heads, s.head_dim, s.block_size, s.windows[layer] or 0,
            self.scale, torch.get_num_threads(),
        )  # fmt: skip
        return out_TNH


def _address(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _packed_heads(x: torch.Tensor) -> torch.Tensor:
    """Heads of a token beside each other; tokens may lie apart."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
