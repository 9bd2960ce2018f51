"""What a row does to its own logits before a token is chosen: logit_bias, min_tokens, penalties.

State is kept only for rows that need it. Token counts are dense over this rank's ids and follow each
sampled token on the device, so that a step may leave before the one before it has been read.

Suffixes: R rows of a group, V values of this rank, N the pool's places for counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.request import Sampling
from engine.sample.shard import Shard


@dataclass(frozen=True, slots=True)
class Sparse:
    """Some of this rank's ids, and a number for each."""

    ids: torch.Tensor
    values: torch.Tensor


def bias_of(shard: Shard, sampling: Sampling) -> Sparse:
    """The part of logit_bias that falls on this rank."""
    return _sparse(shard, list(sampling.logit_bias), list(sampling.logit_bias.values()))


def stops_of(shard: Shard, sampling: Sampling) -> Sparse:
    """The stop ids of this rank, which min_tokens puts out of reach."""
    return _sparse(shard, list(sampling.stop_token_ids), [-torch.inf] * len(sampling.stop_token_ids))


def has_penalty(sampling: Sampling) -> bool:
    return (
        sampling.repetition_penalty != 1.0
        or sampling.frequency_penalty != 0.0
        or sampling.presence_penalty != 0.0
    )


class Penalties:
    """Counts of the tokens that stand in each penalised row, and the penalties made of them.

    Repetition (Keskar et al., 2019: positive logits are divided, negative ones multiplied) looks at
    prompt and output; frequency and presence at the output only, as in OpenAI's API and vLLM.
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self._place_of: dict[int, int] = {}
        self._free: list[int] = []
        self._width = max(1, shard.size)  # a rank without ids still has a column to leave alone
        self._seen_NV = torch.zeros((0, self._width), dtype=torch.bool, device=shard.device)
        self._output_NV = torch.zeros((0, self._width), dtype=torch.int32, device=shard.device)

    def add(self, row: int, tokens: list[int], prompt_len: int) -> None:
        """Count a row's known tokens; after preemption its output is among them."""
        if not self._free:
            self._grow()
        place = self._place_of[row] = self._free.pop()
        ids = torch.tensor(tokens, dtype=torch.int64, device=self.shard.device)
        mine, local = self.shard.mine(ids)
        self._seen_NV[place] = False
        self._seen_NV[place, local[mine]] = True
        output = local[prompt_len:][mine[prompt_len:]]
        self._output_NV[place] = torch.bincount(output, minlength=self._width)

    def drop(self, row: int) -> None:
        place = self._place_of.pop(row, None)
        if place is not None:
            self._free.append(place)

    def count(self, rows: list[int], ids_R: torch.Tensor) -> None:
        """One more token for each row."""
        place_R = self._places(rows)
        mine_R, local_R = self.shard.mine(ids_R)
        self._output_NV[place_R, local_R] += mine_R.to(torch.int32)
        self._seen_NV[place_R, local_R] |= mine_R

    def apply(self, values_RV: torch.Tensor, rows: list[int], samplings: list[Sampling]) -> None:
        """In place, on float32 rows of at least the shard's width."""
        place_R = self._places(rows)
        repetition, frequency, presence = values_RV.new_tensor(
            [(s.repetition_penalty, s.frequency_penalty, s.presence_penalty) for s in samplings]
        ).T[:, :, None]
        view_RV = values_RV[:, : self._width]
        scaled_RV = torch.where(view_RV > 0, view_RV / repetition, view_RV * repetition)
        output_RV = self._output_NV[place_R]
        view_RV.copy_(torch.where(self._seen_NV[place_R], scaled_RV, view_RV))
        view_RV -= frequency * output_RV
        view_RV -= presence * (output_RV > 0)

    def _places(self, rows: list[int]) -> torch.Tensor:
        return torch.tensor([self._place_of[r] for r in rows], device=self.shard.device)

    def _grow(self) -> None:
        old = len(self._seen_NV)
        new = max(4, 2 * old)
        for name in ("_seen_NV", "_output_NV"):
            table = getattr(self, name)
            setattr(self, name, torch.cat((table, table.new_zeros((new - old, self._width)))))
        self._free.extend(range(new - 1, old - 1, -1))


def _sparse(shard: Shard, ids: list[int], values: list[float]) -> Sparse:
    mine, local = shard.mine(torch.tensor(ids, dtype=torch.int64, device=shard.device))
    return Sparse(local[mine], torch.tensor(values, dtype=torch.float32, device=shard.device)[mine])
