"""The sampler of one rank: rows and their settings, and the next token of each, the same on all ranks.

Each rank sees the logits of its own token ids only. It finds its best candidate per row, the ranks
exchange (value, id), and all of them know the winner. A row's token depends on its own logits, settings,
tokens, seed and position: not on its neighbours, the number of ranks, or anything drawn before.

Suffixes: S rows of a step, R rows of a group, V this rank's ids, P scored positions.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntFlag

import numpy as np
import torch

from engine.gpu import ops as gpu_ops
from engine.parallel.comm import Comm
from engine.request import Sampling, TokenLogprobs
from engine.sample.chunks import compact, first_max, padded
from engine.sample.draw import Draw
from engine.sample.edits import Penalties, Sparse, bias_of, has_penalty, stops_of
from engine.sample.limits import min_p_floor, top_k_floor, top_p_floor
from engine.sample.logprobs import LogprobTensors, token_logprobs
from engine.sample.output import SampleOutput
from engine.sample.rng import row_keys
from engine.sample.shard import Shard

#: vLLM's bound: below it, scaled logits would leave float32's range, and the draw is the argmax anyway.
GREEDY_BELOW = 1e-5
#: Candidates per row up to which each one's exact score is computed.
FEW = 4096


class Need(IntFlag):
    """What a row asks for beyond the greatest logit."""

    BIAS = 1
    MIN_TOKENS = 2
    PENALTY = 4
    EDIT = BIAS | MIN_TOKENS | PENALTY
    RANDOM = 8
    TOP_K_OR_MIN_P = 16
    TOP_P = 32
    LIMITED = TOP_K_OR_MIN_P | TOP_P
    LOGPROBS = 64


class Sampler:
    """Samples from logits of the token ids [vocab_start, vocab_end) of `vocab_size`, row by row.

    `comm` (None means alone) joins the ranks that hold the other ids. Every rank makes the same calls.
    Settings are trusted: jobs are validated where they enter.
    """

    def __init__(
        self, comm: Comm | None, vocab_size: int, vocab_start: int, vocab_end: int, max_rows: int,
        device: torch.device | str,
    ) -> None:  # fmt: skip
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.shard = Shard(comm, vocab_start, vocab_end, self.device)
        self.draw = Draw(self.shard)
        self.penalties = Penalties(self.shard)
        self.sampling: list[Sampling] = [Sampling()] * max_rows
        self.bias: dict[int, Sparse] = {}
        self.stops: dict[int, Sparse] = {}
        self.needs_R = np.zeros(max_rows, np.int64)
        self.output_R = np.zeros(max_rows, np.int64)  # tokens drawn, while min_tokens holds
        # What a GPU's one-pass kernel is told; a temperature of 0 is greedy.
        self.seeds_R = np.zeros(max_rows, np.int64)
        self.temperatures_R = np.zeros(max_rows, np.float32)

    def add_row(self, row: int, sampling: Sampling, tokens: list[int], prompt_len: int) -> None:
        """A request takes `row`. `tokens`: its prompt, and after preemption its output so far."""
        self.drop_row(row)
        self.sampling[row] = sampling
        self.output_R[row] = len(tokens) - prompt_len
        needs = Need(0)
        if sampling.logit_bias:
            needs |= Need.BIAS
            self.bias[row] = bias_of(self.shard, sampling)
        if sampling.min_tokens > self.output_R[row] and sampling.stop_token_ids:
            needs |= Need.MIN_TOKENS
            self.stops[row] = stops_of(self.shard, sampling)
        if has_penalty(sampling):
            needs |= Need.PENALTY
            self.penalties.add(row, tokens, prompt_len)
        if sampling.temperature >= GREEDY_BELOW:
            needs |= Need.RANDOM
            if self._top_k(row) or sampling.min_p > 0:
                needs |= Need.TOP_K_OR_MIN_P
            if sampling.top_p < 1:
                needs |= Need.TOP_P
        if sampling.logprobs is not None:
            needs |= Need.LOGPROBS
        self.needs_R[row] = needs
        self.seeds_R[row] = sampling.seed
        self.temperatures_R[row] = sampling.temperature if needs & Need.RANDOM else 0.0

    def drop_row(self, row: int) -> None:
        """Forget a row that ended or was preempted; an empty row may be dropped again."""
        self.needs_R[row] = 0
        self.bias.pop(row, None)
        self.stops.pop(row, None)
        self.penalties.drop(row)

    def sample(self, logits_SV: torch.Tensor, rows: list[int], positions: torch.Tensor) -> SampleOutput:
        """The next token of each row.

        `logits_SV`: this rank's logits, any float dtype, left unchanged. `positions` [S] int64: where
        the tokens will stand. Every rank returns the same ids.
        """
        logits_SV = self._never_empty(logits_SV)
        needs_S = self.needs_R[rows]
        free = gpu_ops.draw(logits_SV, rows, self.seeds_R, self.temperatures_R, positions, self.shard.start)
        if free is None:
            value_S, id_S = self.shard.best(*first_max(logits_SV))
            greatest_S, special = value_S, Need.EDIT | Need.RANDOM
        else:
            top_S, score_S, index_S = free
            greatest_S, special = self.shard.max(top_S), Need.EDIT | Need.LIMITED
            value_S, id_S = self.shard.best(score_S, index_S)
        if not needs_S.any():
            return SampleOutput(rows, self._or_zero(greatest_S, value_S, id_S), greatest_S, value_S)

        group = np.flatnonzero(needs_S & special)
        if len(group):
            at_R = torch.from_numpy(group).to(self.device)
            values_RV = padded(logits_SV[at_R])
            group_rows = [rows[i] for i in group]
            self._edit(values_RV, group_rows, needs_S[group])
            found = self._choose(values_RV, group_rows, needs_S[group], positions[at_R])
            value_S = value_S.index_copy(0, at_R, found[0])
            id_S = id_S.index_copy(0, at_R, found[1])
        id_S = self._or_zero(greatest_S, value_S, id_S)
        self._after(rows, needs_S, id_S)
        return SampleOutput(
            rows, id_S, greatest_S, value_S, self._token_logprobs(logits_SV, rows, needs_S, id_S)
        )

    def logprobs_of(
        self, logits_PV: torch.Tensor, token_ids_P: torch.Tensor, top_n: int
    ) -> list[TokenLogprobs]:
        """Log-probability and rank of token p under the raw logits p, and the `top_n` best tokens.

        NaN where logits are not finite. A rank of 1 means that the token is the greedy choice (or ties).
        """
        tensors = token_logprobs(self.shard, self._never_empty(logits_PV), token_ids_P, top_n)
        return tensors.entries([top_n] * len(token_ids_P))

    def _edit(self, values_RV: torch.Tensor, rows: list[int], needs_R: np.ndarray) -> None:
        """logit_bias, min_tokens, penalties, in place."""
        for i in np.flatnonzero(needs_R & Need.BIAS):
            bias = self.bias[rows[i]]
            values_RV[i, bias.ids] += bias.values
        for i in np.flatnonzero(needs_R & Need.MIN_TOKENS):
            stops = self.stops[rows[i]]
            values_RV[i, stops.ids] = stops.values
        some = np.flatnonzero(needs_R & Need.PENALTY)
        if len(some):
            penalised = [rows[i] for i in some]
            at = torch.from_numpy(some).to(self.device)
            part_RV = values_RV[at]
            self.penalties.apply(part_RV, penalised, [self.sampling[r] for r in penalised])
            values_RV[at] = part_RV

    def _choose(
        self, values_RV: torch.Tensor, rows: list[int], needs_R: np.ndarray, positions_R: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(score, token id) over all ranks: greedy, free and limited rows, each group by itself."""
        score_R = torch.empty(len(rows), dtype=torch.float64, device=self.device)
        id_R = torch.empty(len(rows), dtype=torch.int64, device=self.device)
        random_R = needs_R & Need.RANDOM > 0
        listed_R = needs_R & Need.TOP_K_OR_MIN_P > 0
        limited_R = listed_R | (needs_R & Need.TOP_P > 0)
        groups: list[tuple[np.ndarray, Callable[..., tuple[torch.Tensor, torch.Tensor]]]] = [
            (~random_R, self._argmax),
            (random_R & ~limited_R, self._draw_free),
            (listed_R, self._draw_listed),
            (limited_R & ~listed_R, self._draw_nucleus),
        ]
        for members_R, choose in groups:
            group = np.flatnonzero(members_R)
            if not len(group):
                continue
            group_rows = [rows[i] for i in group]
            at = torch.from_numpy(group).to(self.device)
            part_RV = values_RV if len(group) == len(rows) else values_RV[at]
            temperature_R = self._column(group_rows, lambda s: s.temperature)
            if random_R[group[0]]:
                part_RV = part_RV.div_(temperature_R[:, None])
            keys_R2 = row_keys(self._column(group_rows, lambda s: s.seed, torch.int64), positions_R[at])
            score_R[at], id_R[at] = choose(part_RV, group_rows, keys_R2)
        return self.shard.best(score_R, id_R)

    def _argmax(
        self, values_RV: torch.Tensor, rows: list[int], keys_R2: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        value_R, id_R = first_max(values_RV)
        return value_R.to(torch.float64), id_R

    def _draw_free(
        self, values_RV: torch.Tensor, rows: list[int], keys_R2: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.draw.over_all(values_RV, keys_R2)

    def _draw_listed(
        self, values_RV: torch.Tensor, rows: list[int], keys_R2: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows with min_p or top_k: what they leave is cut out first, top_p looks at that only."""
        max_R = self.shard.max(values_RV.amax(dim=1))
        floor_R = min_p_floor(max_R, self._column(rows, lambda s: s.min_p))
        top_k = [self._top_k(r) for r in rows]
        if any(top_k):
            k_R = torch.tensor(top_k, device=self.device)
            # min_p cuts from below and top_k counts from above, so the higher floor is both.
            floor_R = floor_R.maximum(top_k_floor(self.shard, values_RV, max_R, k_R, max(top_k)))
        kept_RC, ids_RC = compact(values_RV, floor_R)
        if any(self.sampling[r].top_p < 1 for r in rows):
            top_p_R = self._column(rows, lambda s: s.top_p, torch.float64)
            nucleus_R = top_p_floor(self.shard, kept_RC, max_R, top_p_R)
            kept_RC = kept_RC.masked_fill(kept_RC < nucleus_R[:, None], -torch.inf)
            floor_R = floor_R.maximum(nucleus_R)
        return self._draw_kept(values_RV, floor_R, kept_RC, ids_RC, keys_R2)

    def _draw_nucleus(
        self, values_RV: torch.Tensor, rows: list[int], keys_R2: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows with top_p alone."""
        max_R = self.shard.max(values_RV.amax(dim=1))
        top_p_R = self._column(rows, lambda s: s.top_p, torch.float64)
        floor_R = top_p_floor(self.shard, values_RV, max_R, top_p_R)
        return self._draw_kept(values_RV, floor_R, *compact(values_RV, floor_R), keys_R2)

    def _draw_kept(
        self, values_RV: torch.Tensor, floor_R: torch.Tensor, kept_RC: torch.Tensor, ids_RC: torch.Tensor,
        keys_R2: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        if kept_RC.shape[1] <= FEW:
            return self.draw.among(kept_RC, ids_RC, keys_R2)
        return self.draw.over_all(values_RV.masked_fill(values_RV < floor_R[:, None], -torch.inf), keys_R2)

    def _after(self, rows: list[int], needs_S: np.ndarray, id_S: torch.Tensor) -> None:
        """What rows remember of their new tokens."""
        penalised = np.flatnonzero(needs_S & Need.PENALTY)
        if len(penalised):
            at = torch.from_numpy(penalised).to(self.device)
            self.penalties.count([rows[i] for i in penalised], id_S[at])
        for i in np.flatnonzero(needs_S & Need.MIN_TOKENS):
            row = rows[i]
            self.output_R[row] += 1
            if self.output_R[row] >= self.sampling[row].min_tokens:
                self.needs_R[row] &= ~int(Need.MIN_TOKENS)
                del self.stops[row]

    def _token_logprobs(
        self, logits_SV: torch.Tensor, rows: list[int], needs_S: np.ndarray, id_S: torch.Tensor
    ) -> list[tuple[list[int], list[int], LogprobTensors]]:
        some = np.flatnonzero(needs_S & Need.LOGPROBS)
        if not len(some):
            return []
        at = torch.from_numpy(some).to(self.device)
        asked = [rows[i] for i in some]
        top_n = [self.sampling[r].logprobs or 0 for r in asked]
        return [(asked, top_n, token_logprobs(self.shard, logits_SV[at], id_S[at], max(top_n)))]

    def _top_k(self, row: int) -> int:
        k = self.sampling[row].top_k
        return k if 0 < k < self.vocab_size else 0

    def _column(
        self, rows: list[int], of: Callable[[Sampling], float], dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        return torch.tensor([of(self.sampling[r]) for r in rows], dtype=dtype, device=self.device)

    def _never_empty(self, logits: torch.Tensor) -> torch.Tensor:
        """A rank without ids of its own (few ids, many ranks) stands for one that never wins."""
        return logits if logits.shape[1] else logits.new_full((len(logits), 1), -torch.inf)

    @staticmethod
    def _or_zero(greatest_S: torch.Tensor, value_S: torch.Tensor, id_S: torch.Tensor) -> torch.Tensor:
        """Token 0 for bad rows: an index that nothing can stumble over."""
        return torch.where(greatest_S.isfinite() & value_S.isfinite(), id_S, 0)
