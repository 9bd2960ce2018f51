"""Attention of CPUs by one C++ kernel that reads the paged cache in place (`cpu_paged.cpp`).

Gathering blocks for torch's SDPA reads and writes every key twice more, and pads rows to each other; here
a step of decoding rows and prompt chunks is one call a layer. Results depend on nothing but the row itself.

Suffixes: T tokens, N heads, K KV heads, H head size.
"""

from __future__ import annotations

import numpy as np
import torch

from engine.attn.base import AttnShape, AttnStep, KVCache
from engine.cpu.build import library
from engine.cpu.kernels import LANES, NAMES, kernel

#: Queries (tokens times query heads of a KV head) that share one pass over the keys.
QUERIES = 32


def refusal(shape: AttnShape) -> str | None:
    """Why this backend cannot serve a shape; None if it can."""
    if shape.dtype not in NAMES:
        return f"no CPU kernel for {shape.dtype}"
    if shape.head_dim % LANES:
        return f"head size {shape.head_dim} is no multiple of {LANES}"
    built, reason = library()
    return None if built is not None else reason


class CpuPagedBackend:
    """Implements `engine.attn.base.AttentionBackend`. `refusal` must have been None."""

    name = "cpu_paged"
    attend_heads = None

    def __init__(self, shape: AttnShape) -> None:
        self.shape = shape
        self.scale = shape.head_dim**-0.5
        self.tile = max(1, QUERIES // (shape.num_heads // shape.num_kv_heads))
        self._attend = kernel("attend", shape.dtype)
        self._store = kernel("store", shape.dtype)
        self.cache: KVCache

    def allocate(self, num_blocks: int) -> None:
        self.cache = KVCache(self.shape, num_blocks)

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

    def attend(
        self, layer: int, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor
    ) -> torch.Tensor:
        s, step, tasks = self.shape, self.step, self.tasks_X3
        q_TNH, k_TKH, v_TKH = (_packed_heads(x) for x in (q_TNH, k_TKH, v_TKH))
        k_cache, v_cache = self.cache.k[layer].data_ptr(), self.cache.v[layer].data_ptr()
        real = step.slots_T.shape[0]
        self._store(
            k_TKH.data_ptr(), v_TKH.data_ptr(), k_TKH.stride(0), v_TKH.stride(0),
            k_cache, v_cache, step.slots_T.data_ptr(), real, s.num_kv_heads * s.head_dim,
        )  # fmt: skip
        out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype)
        # Padding tokens are 0: NaN of an earlier use of this memory would travel through the layers.
        out_TNH[real:] = 0
        self._attend(
            out_TNH.data_ptr(), q_TNH.data_ptr(), k_cache, v_cache, self.tables_RB.data_ptr(),
            self.starts.ctypes.data, self.cu.ctypes.data, tasks.ctypes.data,
            out_TNH.stride(0), q_TNH.stride(0), self.tables_RB.stride(0), len(tasks), self.most,
            s.num_heads, s.num_kv_heads, s.head_dim, s.block_size, s.windows[layer] or 0,
            self.scale, torch.get_num_threads(),
        )  # fmt: skip
        return out_TNH


def _packed_heads(x: torch.Tensor) -> torch.Tensor:
    """Heads of a token beside each other; tokens may lie apart."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
