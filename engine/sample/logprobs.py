"""Log-probabilities and ranks of tokens from logits that stay split over the ranks.

Two exchanges: (maximum, the token's own logit, the best candidates), then (mass, larger logits). A
position whose logits are not finite gets NaN and harms no other. The numbers are of the raw logits,
before anything that sampling does to them, as in vLLM's default mode.

Suffixes: P positions, V values of this rank, K best candidates, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.request import TokenLogprobs
from engine.sample.chunks import largest, padded
from engine.sample.mass import log_total, mass
from engine.sample.shard import Shard

#: Float32 values that one slice of positions may take beside their masses.
_SLICE = 1 << 24


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """Answers still on the device."""

    token_ids_P: torch.Tensor  # int64
    logprob_P: torch.Tensor  # float64
    rank_P: torch.Tensor  # int64, from 1
    top_ids_PK: torch.Tensor  # int64
    top_logprobs_PK: torch.Tensor  # float64; -inf where the vocabulary has no more tokens

    def entries(self, top_n: list[int]) -> list[TokenLogprobs]:
        """As plain values, each position with its own number of best tokens."""
        tops = (
            tuple((i, p) for i, p in zip(ids[:n], ps[:n], strict=True) if p > -torch.inf)
            for n, ids, ps in zip(top_n, self.top_ids_PK.tolist(), self.top_logprobs_PK.tolist(), strict=True)
        )
        own = zip(self.token_ids_P.tolist(), self.logprob_P.tolist(), self.rank_P.tolist(), strict=True)
        return [TokenLogprobs(*o, top) for o, top in zip(own, tops, strict=True)]


def token_logprobs(
    shard: Shard, logits_PV: torch.Tensor, token_ids_P: torch.Tensor, top_n: int
) -> LogprobTensors:
    """Of token p under the logits p, and of the `top_n` best tokens there. Logits of any float dtype."""
    step = max(1, _SLICE // max(1, logits_PV.shape[1]))
    parts = [
        _slice(shard, padded(logits_PV[i : i + step]), token_ids_P[i : i + step], top_n)
        for i in range(0, len(token_ids_P), step)
    ]
    return LogprobTensors(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _slice(
    shard: Shard, values_PV: torch.Tensor, token_ids_P: torch.Tensor, top_n: int
) -> tuple[torch.Tensor, ...]:
    mine_P, local_P = shard.mine(token_ids_P)
    own_P = torch.where(mine_P, values_PV.gather(1, local_P[:, None])[:, 0], -torch.inf)
    columns = [values_PV.amax(dim=1, keepdim=True), own_P[:, None]]
    if top_n:
        best_PK, best_ids_PK = largest(values_PV, top_n)
        columns += [best_PK, best_ids_PK + shard.start]
    got_WPX = shard.gather(torch.cat([c.to(torch.float64) for c in columns], dim=1))
    max_P, own_P = got_WPX[:, :, :2].amax(dim=0).unbind(dim=1)

    larger_P = (values_PV > own_P.to(torch.float32)[:, None]).sum(dim=1)
    mass_P = mass(values_PV, max_P.to(torch.float32)).sum(dim=1)
    mass_P, larger_P = shard.sum(torch.stack((mass_P, larger_P), dim=1)).unbind(dim=1)
    log_z_P = max_P + log_total(mass_P)

    # Each rank's list is sorted and ranks' ids ascend, so a stable sort leaves equal logits in id order.
    top_PM = got_WPX[:, :, 2 : 2 + top_n].transpose(0, 1).flatten(1)
    top_ids_PM = got_WPX[:, :, 2 + top_n :].transpose(0, 1).flatten(1)
    top_PM, order_PM = top_PM.sort(dim=1, descending=True, stable=True)
    return (
        token_ids_P,
        own_P - log_z_P,
        larger_P + 1,
        top_ids_PM.gather(1, order_PM)[:, :top_n].to(torch.int64),
        top_PM[:, :top_n] - log_z_P[:, None],
    )
