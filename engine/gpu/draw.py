"""The next token of every row in one pass over its logits, in Triton: argmax for greedy rows, Gumbel-max
for rows that draw from their whole distribution.

Noise is that of `engine.sample.rng`, recomputed from (seed, position, token id) in registers, so ids are
those of `engine.sample.draw`. Exact scores are float64, as there; a float32 bound on each block's scores
says which blocks can still win, and few do, so that float64 logarithms stay rare. Knows nothing of limits,
penalties or ranks.

State: equal to `engine.sample` in Triton's interpreter, compiled for sm_90; it has not been run on a GPU yet.

Suffixes: S rows of a step, V ids of this rank, P parts of a row.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from engine.gpu.host import upload
from engine.sample import rng

#: Ids of one pass through the loop.
BLOCK = 1024
#: Programs that fill a GPU; rows are cut into parts until there are as many.
PROGRAMS = 512
MAX_PARTS = 64

_MUL1 = tl.constexpr(rng._MUL1)
_MUL2 = tl.constexpr(rng._MUL2)
_GOLDEN = tl.constexpr(rng._GOLDEN)
_MIX1 = tl.constexpr(rng._MIX1)
_MIX2 = tl.constexpr(rng._MIX2)
#: Rounding of the float32 bound, absolute and relative to values of any size.
_SLACK = tl.constexpr(1e-3)
_RELATIVE_SLACK = tl.constexpr(1e-6)


def draw(
    logits_SV: torch.Tensor, seeds_S: np.ndarray, temperatures_S: np.ndarray, positions_S: torch.Tensor,
    first_id: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(greatest logit float32 [S], the winner's score float64 [S], its index int64 [S]).

    `seeds_S` int64 and `temperatures_S` float32 come from the host; temperature 0 means greedy, where the
    score is the greatest logit. `positions_S` int64: where the tokens will stand. Equal scores: the lowest
    index. A row with a NaN has a NaN as its greatest logit, and an index that means nothing.
    """
    rows, width = logits_SV.shape
    parts = min(MAX_PARTS, triton.cdiv(PROGRAMS, rows), triton.cdiv(width, BLOCK))
    size = triton.cdiv(triton.cdiv(width, parts), BLOCK) * BLOCK
    device = logits_SV.device
    # One transfer: float64 holds any float32, and has the size of a seed.
    settings_2S = upload(np.stack((seeds_S, temperatures_S.astype(np.float64).view(np.int64))), device)
    greatest_SP = torch.empty((rows, parts), dtype=torch.float32, device=device)
    score_SP = torch.empty((rows, parts), dtype=torch.float64, device=device)
    index_SP = torch.empty((rows, parts), dtype=torch.int64, device=device)
    _draw_parts[(rows, parts)](
        greatest_SP, score_SP, index_SP, logits_SV, logits_SV.stride(0), width, size, settings_2S,
        settings_2S[1].view(torch.float64), positions_S, first_id, BLOCK=BLOCK,
    )  # fmt: skip
    greatest_S, score_S, index_S = (x.new_empty(rows) for x in (greatest_SP, score_SP, index_SP))
    _best_part[(rows,)](
        greatest_S, score_S, index_S, greatest_SP, score_SP, index_SP, parts, MAX_PARTS=MAX_PARTS, num_warps=1
    )
    return greatest_S, score_S, index_S


@triton.jit
def _draw_parts(
    greatest_out, score_out, index_out, logits, stride, width, size, seeds, temperatures, positions,
    first_id, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per (row, part)."""
    s = tl.program_id(0)
    part = tl.program_id(1)
    temperature = tl.load(temperatures + s).to(tl.float32)
    key0, key1 = _row_keys(tl.load(seeds + s), tl.load(positions + s))
    greatest = tl.full([], float("-inf"), tl.float32)
    score = tl.full([], float("-inf"), tl.float64)
    index = tl.full([], 0, tl.int32)
    bad = tl.full([], 0, tl.int32)
    for at in range(part * size, tl.minimum((part + 1) * size, width), BLOCK):
        i = at + tl.arange(0, BLOCK)
        value = tl.load(logits + s.to(tl.int64) * stride + i, mask=i < width, other=float("-inf"))
        value = value.to(tl.float32)
        bad = tl.maximum(bad, tl.max((value != value).to(tl.int32), axis=0))
        top = tl.max(value, axis=0)
        if temperature == 0.0:
            if top > greatest:
                index = at + tl.argmax(value, axis=0, tie_break_left=True)
                score = top.to(tl.float64)
        else:
            scaled = tl.div_rn(value, temperature + tl.zeros([BLOCK], tl.float32))
            bits = _noise_bits(first_id + i, key0, key1)
            # -log(-log1p(-w)) is at most -log(w).
            bound = tl.max(scaled - tl.log((bits.to(tl.float32) + 0.5) * 4.656612873077393e-10), axis=0)
            if bound + _SLACK + _RELATIVE_SLACK * (tl.abs(bound) + 110.0) >= score:
                w = (bits.to(tl.float64) + 0.5) * 4.656612873077392578125e-10  # 2^-31
                # 1 - w is exact: w is a multiple of 2^-32.
                exact = scaled.to(tl.float64) - tl.log(-tl.log(1.0 - w))
                best = tl.max(exact, axis=0)
                if best > score:
                    index = at + tl.argmax(exact, axis=0, tie_break_left=True)
                    score = best
        greatest = tl.maximum(greatest, top)
    out = s * tl.num_programs(1) + part
    tl.store(greatest_out + out, tl.where(bad > 0, float("nan"), greatest))
    tl.store(score_out + out, score)
    tl.store(index_out + out, index.to(tl.int64))


@triton.jit
def _best_part(
    greatest_out, score_out, index_out, greatest, score, index, parts, MAX_PARTS: tl.constexpr
):  # fmt: skip
    """One program per row: of equal scores the first part's."""
    s = tl.program_id(0)
    p = tl.arange(0, MAX_PARTS)
    here = p < parts
    greatest_P = tl.load(greatest + s * parts + p, mask=here, other=float("-inf"))
    score_P = tl.load(score + s * parts + p, mask=here, other=float("-inf"))
    bad = tl.max((greatest_P != greatest_P).to(tl.int32), axis=0)
    tl.store(greatest_out + s, tl.where(bad > 0, float("nan"), tl.max(greatest_P, axis=0)))
    tl.store(score_out + s, tl.max(score_P, axis=0))
    winner = tl.argmax(score_P, axis=0, tie_break_left=True)
    tl.store(index_out + s, tl.load(index + s * parts + winner))


@triton.jit
def _row_keys(seed, position):
    """`rng.row_keys`: two int32."""
    x = _mix64(_mix64(seed + _GOLDEN) + position)
    return x.to(tl.int32), (x >> 32).to(tl.int32)


@triton.jit
def _mix64(x):
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _noise_bits(ids, key0, key1):
    """`rng.id_hashes` and `rng.noise_bits`; shifts of int32 are arithmetic, hence the masks."""
    x = ids ^ ((ids >> 16) & 0xFFFF)
    x = x * _MUL1
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _MUL2
    x = x ^ ((x >> 16) & 0xFFFF)
    x = (x ^ key0) * _MUL1
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = (x ^ key1) * _MUL2
    return (x ^ (x >> 16)) & 0x7FFFFFFF
