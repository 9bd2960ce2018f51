"""Gumbel-max over this rank's ids: the winner of value + noise, with noise computed where it matters.

Two ways, one result. Few candidates: their exact scores. A whole vocabulary: a bound on each score,
cheap enough to compute for every id (a hash and a float32 approximation of a logarithm from the bits of
a number), picks the few ids whose exact score can win. Exact scores are float64 in both.

Suffixes: R rows, V values of this rank (whole chunks, filled up with -inf), C candidates.
"""

from __future__ import annotations

import math

import torch

from engine.sample.chunks import CHUNK, at_least, first_max
from engine.sample.rng import gumbel, id_hashes, noise_bits
from engine.sample.shard import Shard

#: A positive float's bits, divided by 2^23, are its binary logarithm plus 127, at most 0.0861 too small.
_LN2_PER_BIT = math.log(2) / (1 << 23)
#: -log(-log1p(-w)) <= -log(w); for w = (bits + 0.5) / 2^31 that is this less ln2 times the logarithm.
_BOUND = math.log(2) * (31 + 127)
#: Rounding of the float32 bound, for values of any size.
_SLACK, _RELATIVE_SLACK = 2e-3, 1e-6
#: Values that fit a core's second-level cache beside their buffers.
_IN_CACHE = 1 << 18


class Draw:
    """Draws over the ids of one shard; holds the keyless half of their hashes."""

    def __init__(self, shard: Shard) -> None:
        whole = -(-max(shard.size, 1) // CHUNK) * CHUNK
        self.hashes_V = id_hashes(shard.start, whole, shard.device)

    def among(
        self, values_RC: torch.Tensor, ids_RC: torch.Tensor, keys_R2: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(score float64 [R], local id [R]) of the best candidate; ids ascend in each row."""
        noise_RC = gumbel(noise_bits(self.hashes_V[ids_RC], keys_R2[:, None]))
        score_R, at_R = (values_RC.to(torch.float64) + noise_RC).max(dim=1)
        return score_R, ids_RC.gather(1, at_R[:, None])[:, 0]

    def over_all(self, values_RV: torch.Tensor, keys_R2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same over every id, for float32 values as `chunks.padded` leaves them."""
        if values_RV.device.type == "cuda":
            step, best = max(1, (1 << 24) // values_RV.shape[1]), self._dense
        else:
            step, best = max(1, _IN_CACHE // values_RV.shape[1]), self._filtered
        parts = [best(values_RV[i : i + step], keys_R2[i : i + step]) for i in range(0, len(values_RV), step)]
        return torch.cat([score for score, _ in parts]), torch.cat([ids for _, ids in parts])

    def _dense(self, values_RV: torch.Tensor, keys_R2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """GPUs have the float64 units, and must not wait to learn how many candidates there are."""
        noise_RV = gumbel(noise_bits(self.hashes_V, keys_R2[:, None]))
        score_R, at_R = (values_RV.to(torch.float64) + noise_RV).max(dim=1)
        return score_R, at_R

    def _filtered(self, values_RV: torch.Tensor, keys_R2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        bits_RV = torch.empty(values_RV.shape, dtype=torch.int32)
        spare_RV = torch.empty_like(bits_RV)
        noise_bits(self.hashes_V, keys_R2[:, None], out=bits_RV, spare=spare_RV)
        float_RV = spare_RV.view(torch.float32).copy_(bits_RV)
        logs_RV = bits_RV.view(torch.float32).copy_(float_RV.view(torch.int32))
        bound_RV = torch.add(values_RV, logs_RV, alpha=-_LN2_PER_BIT, out=float_RV)

        top_R, at_R = first_max(bound_RV)
        score_R, _ = self.among(values_RV.gather(1, at_R[:, None]), at_R[:, None], keys_R2)
        slack_R = _SLACK + _RELATIVE_SLACK * (top_R.abs() + _BOUND)
        row_P, id_P = at_least(bound_RV, (score_R - _BOUND - slack_R).to(torch.float32))
        noise_P = gumbel(noise_bits(self.hashes_V[id_P], keys_R2[row_P]))
        score_P = values_RV[row_P, id_P].to(torch.float64) + noise_P
        best_R = torch.full_like(score_R, -torch.inf).scatter_reduce_(0, row_P, score_P, "amax")
        id_P = torch.where(score_P == best_R[row_P], id_P, values_RV.shape[1])
        first_R = torch.full_like(at_R, values_RV.shape[1]).scatter_reduce_(0, row_P, id_P, "amin")
        return best_R, torch.where(best_R > -torch.inf, first_R, 0)
