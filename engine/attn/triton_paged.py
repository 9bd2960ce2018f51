"""Paged attention in Triton: the backend of GPUs. One kernel stores keys and values, one attends.

A step mixes decoding rows and chunks of prompts freely, as in vLLM's unified kernel (arXiv 2511.11581):
the query heads that share a KV head are packed with BLOCK_Q consecutive queries into one tile of rows,
and a program finds its row by bisection, so the grid depends on shapes only and nothing waits for the
host. Keys are read once per tile, with an online softmax in float32; there is no split over keys, so a
query's result does not depend on which rows share its step.

State: equal to `engine.attn.sdpa` in Triton's interpreter (float32), and compiled for sm_90 in float32,
bfloat16 and float16 (Triton 3.9); it has not been run or timed on a GPU yet.

Suffixes: T tokens, N heads, K KV heads, H head size.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from engine.attn.base import AttnShape, AttnStep, KVCache

#: Keys of one pass through the loop.
TILE = 64
#: tl.dot wants at least 16 rows; chunks of prompts fill larger tiles.
DECODE_ROWS = 16
CHUNK_ROWS = 64


class TritonBackend:
    """Paged attention on a GPU."""

    name = "triton"

    def __init__(self, shape: AttnShape) -> None:
        self.shape = shape
        self.scale = shape.head_dim**-0.5
        self.group = shape.num_heads // shape.num_kv_heads
        self.cache: KVCache

    def allocate(self, num_blocks: int) -> None:
        self.cache = KVCache(self.shape, num_blocks)

    def begin(self, step: AttnStep) -> None:
        self.step = step
        rows = DECODE_ROWS if int(step.counts.max()) == 1 else CHUNK_ROWS
        self.block_m = max(rows, triton.next_power_of_2(self.group))
        self.block_q = self.block_m // self.group
        # cu and starts in one transfer: [R + 1] and [R].
        packed = torch.from_numpy(np.concatenate([step.cu, step.starts]).astype(np.int32))
        packed = packed.to(self.shape.device, non_blocking=True)
        self.cu, self.starts = packed.split([len(step.cu), len(step.starts)])

    def attend(
        self, layer: int, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor
    ) -> torch.Tensor:
        s, step = self.shape, self.step
        k_cache, v_cache = self.cache.k[layer], self.cache.v[layer]
        width = s.num_kv_heads * s.head_dim
        q_TNH, k_TKH, v_TKH = q_TNH.contiguous(), k_TKH.contiguous(), v_TKH.contiguous()
        _store[(step.slots_T.shape[0],)](
            k_TKH, v_TKH, k_cache, v_cache, step.slots_T,
            WIDTH=width, PADDED=triton.next_power_of_2(width),
        )  # fmt: skip
        out_TNH = torch.zeros_like(q_TNH)
        rows = len(step.starts)
        tiles = int(step.cu[-1]) // self.block_q + rows
        window = s.windows[layer]
        _attend[(tiles, s.num_kv_heads)](
            out_TNH, q_TNH, k_cache, v_cache, step.tables_RB, self.cu, self.starts, rows,
            step.tables_RB.stride(0), self.scale, WINDOW=window or 0,
            N=s.num_heads, K=s.num_kv_heads, G=self.group, H=s.head_dim,
            PADDED_H=max(16, triton.next_power_of_2(s.head_dim)), BLOCK_SIZE=s.block_size,
            BLOCK_Q=self.block_q, BLOCK_M=self.block_m, TILE=TILE,
        )  # fmt: skip
        return out_TNH


@triton.jit
def _store(k, v, k_cache, v_cache, slots, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """One program per token: its keys and values of all KV heads go to its slot."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    i = tl.arange(0, PADDED)
    here = i < WIDTH
    tl.store(k_cache + slot * WIDTH + i, tl.load(k + token * WIDTH + i, mask=here), mask=here)
    tl.store(v_cache + slot * WIDTH + i, tl.load(v + token * WIDTH + i, mask=here), mask=here)


@triton.jit
def _attend(
    out, q, k_cache, v_cache, tables, cu, starts, rows, table_stride, scale, WINDOW: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, G: tl.constexpr, H: tl.constexpr, PADDED_H: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program per (tile of BLOCK_Q queries, KV head). Row r's tiles begin at cu[r] // BLOCK_Q + r:
    more than it needs, so that the number of tiles is known without looking at the rows."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    low: tl.int32 = 0
    high = rows
    while low < high:  # the last row whose tiles begin at or before this one
        middle = (low + high) // 2
        if tl.load(cu + middle) // BLOCK_Q + middle <= tile:
            low = middle + 1
        else:
            high = middle
    row = low - 1
    first = tl.load(cu + row)
    count = tl.load(cu + row + 1) - first
    start = tl.load(starts + row)
    query0 = (tile - first // BLOCK_Q - row) * BLOCK_Q
    if query0 < count:
        m = tl.arange(0, BLOCK_M)
        h = tl.arange(0, PADDED_H)
        query = query0 + m // G
        real = (query < count) & (m < BLOCK_Q * G)
        at = (first + query).to(tl.int64) * N * H + (kv_head * G + m % G) * H
        whole = real[:, None] & (h < H)[None, :]
        q_MH = tl.load(q + at[:, None] + h[None, :], mask=whole, other=0.0)
        position = start + query

        end = start + tl.minimum(query0 + BLOCK_Q, count)  # keys that some query of the tile sees
        begin = 0
        if WINDOW > 0:
            begin = tl.maximum(start + query0 - WINDOW + 1, 0) // TILE * TILE
        best = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, PADDED_H], tl.float32)
        for tile_at in range(begin, end, TILE):
            key = tile_at + tl.arange(0, TILE)
            written = key < end
            block = tl.load(tables + row * table_stride + key // BLOCK_SIZE, mask=written, other=0)
            slot = block.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE
            kv_at = slot * K * H + kv_head * H
            # Keys beyond `end` are read as 0: what stands in the cache there may be NaN.
            live = written[:, None] & (h < H)[None, :]
            k_LH = tl.load(k_cache + kv_at[:, None] + h[None, :], mask=live, other=0.0)
            v_LH = tl.load(v_cache + kv_at[:, None] + h[None, :], mask=live, other=0.0)
            seen = (key[None, :] <= position[:, None]) & written[None, :]
            if WINDOW > 0:
                seen = seen & (key[None, :] > position[:, None] - WINDOW)
            score = tl.dot(q_MH, tl.trans(k_LH), input_precision="ieee") * scale
            score = tl.where(seen, score, float("-inf"))
            new_best = tl.maximum(best, tl.max(score, axis=1))
            # A tile may hold no key that a query sees (window, padding rows): -inf - -inf is NaN.
            base = tl.where(new_best == float("-inf"), 0.0, new_best)
            p = tl.exp(score - base[:, None])
            shrink = tl.exp(best - base)
            total = total * shrink + tl.sum(p, axis=1)
            acc = acc * shrink[:, None] + tl.dot(p.to(v_LH.dtype), v_LH, input_precision="ieee")
            best = new_best
        o_MH = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out + at[:, None] + h[None, :], o_MH.to(out.dtype.element_ty), mask=whole)
