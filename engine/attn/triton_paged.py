"""Paged attention in Triton: the backend of GPUs. Decoding rows and prompt chunks have a kernel each.

Both pack the query heads of one KV head into the rows of a tile, read each key once per tile, in place,
and keep an online softmax in float32 (vLLM's unified kernel, arXiv 2511.11581, does the same). A row that
computes one token goes to the decoding kernel, which splits long rows over the GPU's cores by their keys
and merges the parts (flash-decoding, Dao et al., 2023); where it splits follows from the row's own length.
So a row's bits never depend on which rows share its step. `exact` goes further: no row is split, and all
go through one kernel with one tile shape, so that a query's bits do not even depend on how its row's
tokens were cut into steps. It is slower and off by default: cuBLAS does not promise as much.

What stands in blocks that no row has written is never read, or read as zero. Nothing here waits for the
device, and a decoding step's grid depends on shapes only, so CUDA graphs can hold it.

State: equal to `engine.attn.sdpa` in Triton's interpreter (float32) and compiled for sm_90 in float32,
bfloat16 and float16 (Triton 3.9). It has not been run or timed on a GPU yet.

Suffixes: R rows, T tokens, N heads, K KV heads, P query heads per KV head, H head size, S splits.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from engine.attn.base import AttnShape, AttnStep, HeadWork, KVCache
from engine.gpu.heads import prepare_heads

#: Keys of one pass through the loop.
TILE = 64
#: Tile rows: tl.dot wants at least 16; chunks of prompts fill larger tiles.
DECODE_ROWS = 16
CHUNK_ROWS = 64
#: A decoding row is split into parts of at least SPLIT_KEYS keys, and into MAX_SPLITS (a power of two) at
#: most.
SPLIT_KEYS = 512
MAX_SPLITS = 16
#: Shared memory that a kernel's loop may take for keys and values; a Hopper core has 227 KiB.
STAGE_BYTES = 160 << 10


class TritonBackend:
    """Implements `engine.attn.base.AttentionBackend` on a GPU."""

    name = "triton"

    def __init__(self, shape: AttnShape, exact: bool = False) -> None:
        self.shape = shape
        self.exact = exact
        self.group = shape.num_heads // shape.num_kv_heads
        self.padded_h = max(16, triton.next_power_of_2(shape.head_dim))
        self.stages = min(3, max(1, STAGE_BYTES // (2 * TILE * self.padded_h * shape.dtype.itemsize)))
        self.cache: KVCache

    def allocate(self, num_blocks: int) -> None:
        self.cache = KVCache(self.shape, num_blocks)

    def begin(self, step: AttnStep) -> None:
        """Everything that the kernels look up goes to the device in one transfer."""
        single = np.zeros(len(step.counts), bool) if self.exact else step.counts == 1
        self.block_q = CHUNK_ROWS // self.group or 1
        decoding = np.flatnonzero(single)
        tiles_X2 = _tiles(step.counts, np.flatnonzero(~single), self.block_q)
        longest = int((step.starts[decoding] + 1).max(initial=0))
        parts = (step.starts, step.cu, decoding, tiles_X2.ravel())
        packed = torch.from_numpy(np.concatenate(parts).astype(np.int32))
        if self.shape.device.type == "cuda":
            packed = packed.pin_memory()
        packed = packed.to(self.shape.device, non_blocking=True)
        self.starts, self.cu, self.decoding, tiles = packed.split([p.size for p in parts])
        self.tiles_X2 = tiles.view(-1, 2)
        self._begin(step.tables_RB, step.slots_T, longest)

    def begin_decoding(
        self, starts_R: torch.Tensor, rows_R1: torch.Tensor, tables_RB: torch.Tensor, slots_R: torch.Tensor
    ) -> None:
        """A step in which row r computes token r alone, at position starts[r], from tensors of the device.

        `rows_R1`: 0, 1, ..., R, int32. For CUDA graphs: launches depend on shapes only, so a later replay
        may find other numbers in the tensors. Rows of any length up to the table's fit.
        """
        self.starts, self.cu, self.decoding = starts_R, rows_R1, rows_R1[:-1]
        self.tiles_X2 = rows_R1.new_empty((0, 2))
        self._begin(tables_RB, slots_R, tables_RB.shape[1] * self.shape.block_size)

    def _begin(self, tables_RB: torch.Tensor, slots_T: torch.Tensor, longest: int) -> None:
        self.tables_RB, self.slots_T = tables_RB, slots_T
        self.splits = 1 if self.exact else max(1, min(MAX_SPLITS, longest // SPLIT_KEYS))
        if self.splits > 1:
            heads = self.shape.num_heads
            size = (len(self.decoding), heads, self.splits)
            self.partial = slots_T.new_empty((*size, self.shape.head_dim), dtype=torch.float32)
            self.weight = slots_T.new_empty((*size, 2), dtype=torch.float32)
        else:  # never touched
            self.partial = self.weight = slots_T

    def attend(
        self, layer: int, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor
    ) -> torch.Tensor:
        qkv_TXH = torch.cat((q_TNH, k_TKH, v_TKH), dim=1)
        return self.attend_heads(layer, qkv_TXH, HeadWork())

    def attend_heads(self, layer: int, qkv_TXH: torch.Tensor, work: HeadWork) -> torch.Tensor:
        """Normalise, rotate and store the step's heads in one kernel, then attend: [T, N, H]."""
        s = self.shape
        k_cache, v_cache = self.cache.k[layer], self.cache.v[layer]
        q_TNH = prepare_heads(qkv_TXH, s.num_heads, s.num_kv_heads, work, k_cache, v_cache, self.slots_T)
        out_TNH = torch.empty_like(q_TNH)
        # Padding tokens, if any, are 0: NaN of an earlier use of this memory would travel on.
        out_TNH[self.slots_T.shape[0] :] = 0
        shared = (
            out_TNH, q_TNH, k_cache, v_cache, self.tables_RB, self.cu, self.starts,
            self.tables_RB.stride(0), s.head_dim**-0.5,
        )  # fmt: skip
        sizes = {
            "WINDOW": s.windows[layer] or 0, "N": s.num_heads, "K": s.num_kv_heads, "G": self.group,
            "H": s.head_dim, "PADDED_H": self.padded_h, "BLOCK_SIZE": s.block_size, "TILE": TILE,
            "num_stages": self.stages,
        }  # fmt: skip
        if len(self.tiles_X2):
            _attend_chunks[(len(self.tiles_X2), s.num_kv_heads)](
                *shared, self.tiles_X2, BLOCK_Q=self.block_q,
                BLOCK_M=triton.next_power_of_2(max(16, self.block_q * self.group)), **sizes,
            )  # fmt: skip
        if len(self.decoding):
            _attend_decoding[(len(self.decoding), s.num_kv_heads, self.splits)](
                *shared, self.decoding, self.partial, self.weight, self.splits,
                MOST=MAX_SPLITS, SPLIT_KEYS=SPLIT_KEYS,
                BLOCK_M=triton.next_power_of_2(max(DECODE_ROWS, self.group)), **sizes,
            )  # fmt: skip
            if self.splits > 1:
                _merge[(len(self.decoding), s.num_heads)](
                    out_TNH, self.partial, self.weight, self.cu, self.starts, self.decoding,
                    self.splits, WINDOW=s.windows[layer] or 0, N=s.num_heads, H=s.head_dim,
                    PADDED_H=self.padded_h, MOST=MAX_SPLITS, SPLIT_KEYS=SPLIT_KEYS, TILE=TILE, num_warps=1,
                )  # fmt: skip
        return out_TNH


def _tiles(counts_R: np.ndarray, rows: np.ndarray, block_q: int) -> np.ndarray:
    """[X, 2]: (row, first query) of each tile of `block_q` queries."""
    tiles_R = -(-counts_R[rows] // block_q)
    row_X = np.repeat(rows, tiles_R)
    nth_X = np.arange(len(row_X)) - np.repeat(np.cumsum(tiles_R) - tiles_R, tiles_R)
    return np.stack((row_X, nth_X * block_q), axis=1)


@triton.jit
def _attend_chunks(
    out, q, k_cache, v_cache, tables, cu, starts, table_stride, scale, tiles,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, WINDOW: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    G: tl.constexpr, H: tl.constexpr, PADDED_H: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program per (tile of BLOCK_Q queries of one row, KV head)."""
    x = tl.program_id(0)
    kv_head = tl.program_id(1)
    row = tl.load(tiles + 2 * x)
    query0 = tl.load(tiles + 2 * x + 1)
    first = tl.load(cu + row)
    count = tl.load(cu + row + 1) - first
    start = tl.load(starts + row)
    m = tl.arange(0, BLOCK_M)
    h = tl.arange(0, PADDED_H)
    query = query0 + m // G
    whole = ((query < count) & (m < BLOCK_Q * G))[:, None] & (h < H)[None, :]
    at = (first + query).to(tl.int64) * N * H + (kv_head * G + m % G) * H
    q_MH = tl.load(q + at[:, None] + h[None, :], mask=whole, other=0.0)
    end = start + tl.minimum(query0 + BLOCK_Q, count)  # keys that some query of the tile sees
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(start + query0 - WINDOW + 1, 0) // TILE * TILE
    acc, _best, total = _over_keys(
        q_MH, start + query, begin, end, tables + row.to(tl.int64) * table_stride, k_cache, v_cache,
        kv_head, scale, BLOCK_M, WINDOW, K, H, PADDED_H, BLOCK_SIZE, TILE,
    )  # fmt: skip
    o_MH = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + at[:, None] + h[None, :], o_MH.to(out.dtype.element_ty), mask=whole)


@triton.jit
def _attend_decoding(
    out, q, k_cache, v_cache, tables, cu, starts, table_stride, scale, decoding, partial, weight, splits,
    MOST: tl.constexpr, SPLIT_KEYS: tl.constexpr, BLOCK_M: tl.constexpr, WINDOW: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, G: tl.constexpr, H: tl.constexpr, PADDED_H: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program per (row of one query, KV head, split). A row of one part is finished here."""
    i = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    row = tl.load(decoding + i)
    token = tl.load(cu + row).to(tl.int64)
    position = tl.load(starts + row).to(tl.int32)
    begin, end, parts = _part(position, split, WINDOW, MOST, SPLIT_KEYS, TILE)
    if split < parts:
        m = tl.arange(0, BLOCK_M)
        h = tl.arange(0, PADDED_H)
        whole = (m < G)[:, None] & (h < H)[None, :]
        head = kv_head * G + m
        q_MH = tl.load(q + (token * N + head)[:, None] * H + h[None, :], mask=whole, other=0.0)
        acc, best, total = _over_keys(
            q_MH, position + tl.zeros([BLOCK_M], tl.int32), begin, end,
            tables + row.to(tl.int64) * table_stride, k_cache, v_cache, kv_head, scale,
            BLOCK_M, WINDOW, K, H, PADDED_H, BLOCK_SIZE, TILE,
        )  # fmt: skip
        if parts == 1:
            o_MH = acc / tl.where(total == 0.0, 1.0, total)[:, None]
            o_at = (token * N + head)[:, None] * H + h[None, :]
            tl.store(out + o_at, o_MH.to(out.dtype.element_ty), mask=whole)
        else:
            at = (i.to(tl.int64) * N + head) * splits + split
            tl.store(partial + at[:, None] * H + h[None, :], acc, mask=whole)
            tl.store(weight + at * 2, best, mask=m < G)
            tl.store(weight + at * 2 + 1, total, mask=m < G)


@triton.jit
def _merge(
    out, partial, weight, cu, starts, decoding, splits,
    WINDOW: tl.constexpr, N: tl.constexpr, H: tl.constexpr, PADDED_H: tl.constexpr, MOST: tl.constexpr,
    SPLIT_KEYS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program per (row of one query, head): the parts of its keys, weighed by their softmax."""
    i = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.load(decoding + i)
    position = tl.load(starts + row).to(tl.int32)
    _begin, _end, parts = _part(position, 0, WINDOW, MOST, SPLIT_KEYS, TILE)
    if parts > 1:
        s = tl.arange(0, MOST)
        h = tl.arange(0, PADDED_H)
        at = (i.to(tl.int64) * N + head) * splits + s
        best = tl.load(weight + at * 2, mask=s < parts, other=float("-inf"))
        total = tl.load(weight + at * 2 + 1, mask=s < parts, other=0.0)
        whole = (s < parts)[:, None] & (h < H)[None, :]
        acc_SH = tl.load(partial + at[:, None] * H + h[None, :], mask=whole, other=0.0)
        share = tl.exp(best - tl.max(best, axis=0))  # the last part sees the query's own key
        o_H = tl.sum(acc_SH * share[:, None], axis=0) / tl.sum(total * share, axis=0)
        token = tl.load(cu + row).to(tl.int64)
        tl.store(out + (token * N + head) * H + h, o_H.to(out.dtype.element_ty), mask=h < H)


@triton.jit
def _part(
    position, split, WINDOW: tl.constexpr, MOST: tl.constexpr, SPLIT_KEYS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """(first key, end, number of parts) of one part of a decoding row: its own length decides."""
    length = position + 1
    low = 0
    if WINDOW > 0:
        low = tl.maximum(length - WINDOW, 0) // TILE * TILE
    parts = tl.minimum(tl.maximum((length - low) // SPLIT_KEYS, 1), MOST)
    keys = tl.cdiv(tl.cdiv(length - low, parts), TILE) * TILE
    begin = low + split * keys
    return begin, tl.minimum(begin + keys, length), tl.cdiv(length - low, keys)


@triton.jit
def _over_keys(
    q_MH, position, begin, end, table, k_cache, v_cache, kv_head, scale,
    BLOCK_M: tl.constexpr, WINDOW: tl.constexpr, K: tl.constexpr, H: tl.constexpr, PADDED_H: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(weighted sum of values, maximum, sum of weights) over keys [begin, end) of one row."""
    h = tl.arange(0, PADDED_H)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, PADDED_H], tl.float32)
    for tile_at in range(begin, end, TILE):
        key = tile_at + tl.arange(0, TILE)
        written = key < end
        block = tl.load(table + key // BLOCK_SIZE, mask=written, other=0)
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
    return acc, best, total
