"""min_p, top_k and top_p as one floor per row: tokens whose scaled logit lies below it cannot be drawn.

A floor is a number that all ranks agree on, so no rank needs another's tokens. Equal logits at a limit
are kept or dropped together, which makes the kept set independent of how ids are split over ranks.
Applied in vLLM's order: min_p, then the k largest of what is left, then the nucleus of what is left
(Holtzman et al., 2020; Nguyen et al., 2024, for min_p).

Suffixes: R rows, V values of this rank (-inf fills up), W ranks, K candidates, M merged candidates,
B bins, C values of one bin, U rows that candidates do not settle.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.sample.chunks import LOWEST, compact, largest
from engine.sample.mass import NEGLIGIBLE, mass
from engine.sample.shard import Shard

#: Candidates that ranks exchange. Rows that need more are bisected, 8 bytes a rank and round.
CANDIDATES = 256
#: Bins between a row's maximum and the value that has no mass left.
BINS = 256
#: Values that are binned at a time, so that they stay in a core's cache.
_IN_CACHE = 1 << 18

Weigh = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def min_p_floor(max_R: torch.Tensor, min_p_R: torch.Tensor) -> torch.Tensor:
    """Keeps p >= min_p * p(best). `min_p_R` float32, 0 where it is off."""
    return max_R + min_p_R.log()


def top_k_floor(
    shard: Shard, values_RV: torch.Tensor, max_R: torch.Tensor, k_R: torch.Tensor, most: int
) -> torch.Tensor:
    """The k-th largest value over all ranks; -inf where fewer than k are above it or k is 0 (off).

    `k_R` int64; `most` is its maximum, as a plain number so that all ranks branch alike.
    """
    if most > CANDIDATES:
        floor_R = _floor(shard, values_RV, max_R, _one_each, lambda total_R: k_R)
    else:
        own_RK, _ = largest(values_RV, most)
        merged_RM = _merge(shard.gather(own_RK))
        floor_R = merged_RM.gather(1, (k_R - 1).clamp(min=0)[:, None])[:, 0]
    return torch.where(k_R > 0, floor_R, -torch.inf)


def top_p_floor(
    shard: Shard, values_RV: torch.Tensor, max_R: torch.Tensor, top_p_R: torch.Tensor
) -> torch.Tensor:
    """A token stays if the tokens above it hold less than top_p of the row's mass.

    `top_p_R` float64 in (0, 1); 1 and above keep all.
    """

    def need(total_R: torch.Tensor) -> torch.Tensor:
        return (top_p_R * total_R.to(torch.float64)).ceil().to(torch.int64)

    floor_R = _floor(shard, values_RV, max_R, mass, need)
    return torch.where(top_p_R < 1, floor_R, -torch.inf)


def _one_each(values_RV: torch.Tensor, max_R: torch.Tensor) -> torch.Tensor:
    return (values_RV > -torch.inf).to(torch.int64)


def _floor(
    shard: Shard, values_RV: torch.Tensor, max_R: torch.Tensor, weigh: Weigh,
    need_of: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """The least value whose weight above it, over all ranks, is less than what the row needs.

    A histogram finds the bin that holds it, then only that bin's values are looked at: 2 KiB a row and
    rank, and one pass over the values, whatever the distribution.
    """
    parts = [slice(i, i + _rows(values_RV)) for i in range(0, len(values_RV), _rows(values_RV))]
    weights_RB = torch.zeros((len(values_RV), BINS), dtype=torch.int64, device=values_RV.device)
    for part in parts:
        weights = weigh(values_RV[part], max_R[part])
        weights_RB[part].scatter_add_(1, _bins(values_RV[part], max_R[part]), weights)
    upto_RB = shard.sum(weights_RB).cumsum(dim=1)
    need_R = need_of(upto_RB[:, -1])
    bin_R = (upto_RB < need_R[:, None]).sum(dim=1).clamp(max=BINS - 1)
    above_R = torch.where(bin_R > 0, upto_RB.gather(1, (bin_R - 1).clamp(min=0)[:, None])[:, 0], 0)

    kept = []
    for part in parts:
        outside = _bins(values_RV[part], max_R[part]) != bin_R[part, None]
        inside = values_RV[part].masked_fill(outside, -torch.inf)
        kept.append(compact(inside, torch.full_like(max_R[part], LOWEST))[0])
    width = max(k.shape[1] for k in kept)
    inside_RC = torch.cat(
        [torch.nn.functional.pad(k, (0, width - k.shape[1]), value=-torch.inf) for k in kept]
    )
    return _floor_in_bin(shard, inside_RC, max_R, weigh, need_R - above_R)


def _floor_in_bin(
    shard: Shard, values_RC: torch.Tensor, max_R: torch.Tensor, weigh: Weigh, need_R: torch.Tensor
) -> torch.Tensor:
    """From the best candidates of each rank where these suffice, else by bisection over all values."""
    own_WRK = shard.gather(largest(values_RC, CANDIDATES)[0])
    # Below the least candidate of a rank that may hold more of them, the merged list has gaps.
    known_R = own_WRK[:, :, -1].amax(dim=0)
    merged_RM = _merge(own_WRK)
    weights_RM = weigh(merged_RM, max_R)
    above_RM = weights_RM.cumsum(dim=1) - weights_RM
    last_R = (above_RM < need_R[:, None]).logical_and(merged_RM > -torch.inf).sum(dim=1) - 1
    floor_R = merged_RM.gather(1, last_R.clamp(min=0)[:, None])[:, 0]

    covered_R = (weights_RM * (merged_RM >= known_R[:, None])).sum(dim=1) >= need_R
    open_U = (~covered_R & (known_R > -torch.inf)).nonzero(as_tuple=True)[0]
    if len(open_U):
        keys_UC, weights_UC = _key(values_RC[open_U]), weigh(values_RC[open_U], max_R[open_U])
        floor_R[open_U] = _bisect(
            lambda key_U: shard.sum(torch.where(keys_UC > key_U[:, None], weights_UC, 0).sum(dim=1)),
            need_R[open_U],
            _key(torch.full_like(known_R[open_U], LOWEST)),
            _key(known_R[open_U]),
        )
    return floor_R


def _bisect(
    above: Callable[[torch.Tensor], torch.Tensor],
    need_R: torch.Tensor,
    low_R: torch.Tensor,
    high_R: torch.Tensor,
) -> torch.Tensor:
    """The least value x with above(x) < need, where `above` is what lies strictly above a key.

    At most 33 rounds, because keys count the float32 numbers themselves. above(high) < need must hold.
    """
    low_R, high_R = low_R - 1, high_R.clone()
    while bool((high_R - low_R > 1).any()):
        middle_R = (low_R + high_R) >> 1
        enough_R = above(middle_R) < need_R
        high_R = torch.where(enough_R, middle_R, high_R)
        low_R = torch.where(enough_R, low_R, middle_R)
    return _value(high_R)


def _merge(own_WRK: torch.Tensor) -> torch.Tensor:
    """[R, W * K]: the candidates of all ranks, best first."""
    return own_WRK.transpose(0, 1).flatten(1).sort(dim=1, descending=True).values


def _rows(values_RV: torch.Tensor) -> int:
    per_call = _IN_CACHE if values_RV.device.type == "cpu" else 1 << 26
    return max(1, per_call // values_RV.shape[1])


def _bins(values_RV: torch.Tensor, max_R: torch.Tensor) -> torch.Tensor:
    """[R, V] int64 in [0, BINS): 0 at the maximum; it never falls as values fall, rounding included."""
    distance_RV = max_R[:, None] - values_RV
    return distance_RV.mul_(BINS / NEGLIGIBLE).clamp_(0, BINS - 1).nan_to_num_(0).to(torch.int64)


def _key(values: torch.Tensor) -> torch.Tensor:
    """int64 in the order of float32 values, NaN aside: neighbours differ by 1."""
    bits = values.to(torch.float32).contiguous().view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)


def _value(keys: torch.Tensor) -> torch.Tensor:
    bits = keys.to(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
