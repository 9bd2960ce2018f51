"""What the sampler answers: tokens at once, everything that needs the device's numbers only when read."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from engine.request import TokenLogprobs
from engine.sample.logprobs import LogprobTensors


@dataclass(slots=True)
class SampleOutput:
    """The tokens of one step. Only reading `logprobs` or `bad_rows` waits for the device."""

    rows: list[int]
    token_ids: torch.Tensor  # [S] int64 on the device; 0 for a bad row
    _greatest_S: torch.Tensor  # the raw logits' maximum: finite, or the row is bad
    _chosen_S: torch.Tensor  # the chosen token's value: -inf if every token was masked
    _logprobs: list[tuple[list[int], list[int], LogprobTensors]] = field(default_factory=list)

    @property
    def bad_rows(self) -> list[tuple[int, str]]:
        """(row, reason) of rows whose token means nothing."""
        good = (self._greatest_S.isfinite() & self._chosen_S.isfinite()).tolist()
        if all(good):
            return []
        greatest = self._greatest_S.tolist()
        return [
            (row, f"logits are not finite (maximum {greatest[i]})" if not np.isfinite(greatest[i])
             else "every token is masked (logit_bias or min_tokens leave none)")
            for i, row in enumerate(self.rows) if not good[i]
        ]  # fmt: skip

    @property
    def logprobs(self) -> list[tuple[int, TokenLogprobs]]:
        """(row, entry) of rows that asked, bad ones left out."""
        if not self._logprobs:
            return []
        bad = {row for row, _ in self.bad_rows}
        return [
            (row, entry)
            for rows, top_n, tensors in self._logprobs
            for row, entry in zip(rows, tensors.entries(top_n), strict=True)
            if row not in bad
        ]
