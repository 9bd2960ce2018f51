"""Attention by gathering a row's blocks and calling torch's scaled_dot_product_attention.

The backend of CPUs, and the oracle that all others are tested against. It knows nothing of kernels.

A row's result is the same bits alone, in a batch, and however its tokens were cut into chunks. That
holds because (measured in float32 and bfloat16, one and two threads) the CPU kernel's arithmetic for one
query does not change when queries are padded to a multiple of 8 and keys to a multiple of 16.

Suffixes: T tokens, G rows of a group, B blocks, L keys, N heads, K KV heads, P query heads per KV head
(padded), H head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from engine.attn.base import AttnShape, AttnStep, KVCache

#: Queries of a chunk that are attended at once: bounds the mask, and skips keys no query of it sees.
QUERY_TILE = 256


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows with one query each and similar lengths, attended as one padded batch."""

    at_G: torch.Tensor  # the rows' tokens in the step
    blocks_GB: torch.Tensor  # flattened [G * B]
    dead: torch.Tensor  # flat [G * L] indices of keys that no query may touch
    masks: dict[int | None, torch.Tensor]  # by window: bool [G, 1, 1, L]


@dataclass(frozen=True, slots=True)
class _Tile:
    """Up to QUERY_TILE consecutive queries of one row, against its first L keys."""

    first: int  # tokens [first, last) of the step
    last: int
    blocks_B: torch.Tensor
    length: int  # keys that have been written; those up to L are zeroed
    masks: dict[int | None, torch.Tensor]  # by window: bool [queries padded to 8, L]


class SdpaBackend:
    """Gather and SDPA."""

    name = "sdpa"
    attend_heads = None

    def __init__(self, shape: AttnShape) -> None:
        self.shape = shape
        self.scale = shape.head_dim**-0.5
        self.windows = set(shape.windows)
        self.group_size = shape.num_heads // shape.num_kv_heads
        # Whole blocks whose tokens are a multiple of 16.
        self.block_step = 16 // np.gcd(16, shape.block_size).item()
        self.cache: KVCache

    def allocate(self, num_blocks: int) -> None:
        self.cache = KVCache(self.shape, num_blocks)

    def begin(self, step: AttnStep) -> None:
        self.slots_T = step.slots_T
        single = step.counts == 1
        self.groups = self._groups(step, np.flatnonzero(single)) if single.any() else []
        self.tiles = [tile for r in np.flatnonzero(~single) for tile in self._tiles(step, int(r))]

    def attend(
        self, layer: int, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor
    ) -> torch.Tensor:
        k_cache, v_cache = self.cache.k[layer], self.cache.v[layer]
        real = self.slots_T.shape[0]
        k_cache.flatten(0, 1).index_copy_(0, self.slots_T, k_TKH[:real])
        v_cache.flatten(0, 1).index_copy_(0, self.slots_T, v_TKH[:real])
        window = self.shape.windows[layer]
        # Padding tokens stay 0: NaN of an earlier use of this memory would travel through the layers.
        out_TNH = torch.zeros_like(q_TNH)
        for group in self.groups:
            out_TNH[group.at_G] = self._attend_group(group, q_TNH[group.at_G], k_cache, v_cache, window)
        for tile in self.tiles:
            q = q_TNH[tile.first : tile.last]
            out_TNH[tile.first : tile.last] = self._attend_tile(tile, q, k_cache, v_cache, window)
        return out_TNH

    def _attend_group(
        self, group: _Group, q_GNH: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
        window: int | None,
    ) -> torch.Tensor:  # fmt: skip
        g = q_GNH.shape[0]
        kv_heads, head_dim = self.shape.num_kv_heads, self.shape.head_dim
        k, v = (
            c.index_select(0, group.blocks_GB).view(-1, kv_heads * head_dim).index_fill_(0, group.dead, 0)
            for c in (k_cache, v_cache)
        )
        k_GKLH, v_GKLH = (x.view(g, -1, kv_heads, head_dim).transpose(1, 2) for x in (k, v))
        # The heads of one KV head are its queries, so that each key is read once.
        q_GKPH = F.pad(q_GNH.view(g, kv_heads, self.group_size, head_dim), (0, 0, 0, -self.group_size % 8))
        o_GKPH = F.scaled_dot_product_attention(
            q_GKPH, k_GKLH, v_GKLH, attn_mask=group.masks[window], scale=self.scale
        )
        return o_GKPH[:, :, : self.group_size].reshape(q_GNH.shape)

    def _attend_tile(
        self, tile: _Tile, q_TNH: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
        window: int | None,
    ) -> torch.Tensor:  # fmt: skip
        k_LKH, v_LKH = (c.index_select(0, tile.blocks_B).flatten(0, 1) for c in (k_cache, v_cache))
        k_LKH[tile.length :] = 0
        v_LKH[tile.length :] = 0
        mask = tile.masks[window]
        q_TNH = F.pad(q_TNH, (0, 0, 0, 0, 0, mask.shape[0] - q_TNH.shape[0]))
        o_NTH = F.scaled_dot_product_attention(
            q_TNH.transpose(0, 1)[None],
            k_LKH.transpose(0, 1)[None],
            v_LKH.transpose(0, 1)[None],
            attn_mask=mask[None, None],
            scale=self.scale,
            enable_gqa=self.group_size > 1,
        )[0]
        return o_NTH[:, : tile.last - tile.first].transpose(0, 1)

    def _groups(self, step: AttnStep, rows: np.ndarray) -> list[_Group]:
        """Group single-token rows by length, four groups an octave: padding costs a fifth at most."""
        lengths = step.starts[rows] + 1
        octave = np.maximum(np.ceil(4 * np.log2(lengths / 64)), 0).astype(np.int64)
        return [
            self._group(step, rows[octave == o], lengths[octave == o]) for o in np.unique(octave).tolist()
        ]

    def _group(self, step: AttnStep, rows: np.ndarray, lengths: np.ndarray) -> _Group:
        blocks = self._blocks(int(lengths.max()))
        keys = np.arange(blocks * self.shape.block_size)
        alive = keys < lengths[:, None]
        masks = {
            w: alive if w is None else alive & (keys >= lengths[:, None] - w)
            for w in self.windows
        }  # fmt: skip
        device = self.shape.device
        table = self._table(step, torch.from_numpy(rows).to(device), blocks)
        return _Group(
            torch.from_numpy(step.cu[rows]).to(device),
            table.flatten(),
            torch.from_numpy(np.flatnonzero(~alive)).to(device),
            {w: torch.from_numpy(m).to(device)[:, None, None] for w, m in masks.items()},
        )

    def _tiles(self, step: AttnStep, row: int) -> list[_Tile]:
        start, count, at = int(step.starts[row]), int(step.counts[row]), int(step.cu[row])
        return [
            self._tile(step, row, start + done, min(QUERY_TILE, count - done), at + done)
            for done in range(0, count, QUERY_TILE)
        ]

    def _tile(self, step: AttnStep, row: int, start: int, count: int, at: int) -> _Tile:
        length = start + count
        blocks = self._blocks(length)
        queries = torch.arange(start, start + -(-count // 8) * 8, device=self.shape.device)
        queries = queries.clamp(max=length - 1)[:, None]  # padding queries repeat the last one's mask
        keys = torch.arange(blocks * self.shape.block_size, device=self.shape.device)
        causal = keys <= queries
        return _Tile(
            at,
            at + count,
            self._table(step, torch.tensor([row], device=self.shape.device), blocks)[0],
            length,
            {w: causal if w is None else causal & (keys > queries - w) for w in self.windows},
        )

    def _blocks(self, length: int) -> int:
        """Blocks that hold `length` tokens, rounded up to a multiple of 16 tokens."""
        blocks = -(-length // self.shape.block_size)
        return -(-blocks // self.block_step) * self.block_step

    def _table(self, step: AttnStep, rows: torch.Tensor, blocks: int) -> torch.Tensor:
        table = step.tables_RB.index_select(0, rows)[:, :blocks]
        return F.pad(table, (0, blocks - table.shape[1]))
