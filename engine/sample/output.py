"""What the sampler answers: tokens on the device at once, numbers on the host only when they are read."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from engine.gpu.host import Download
from engine.request import TokenLogprobs
from engine.sample.logprobs import LogprobTensors


@dataclass(slots=True)
class SampleOutput:
    """The tokens of one step. Reading `ids`, `bad_rows` or `logprobs` waits for the device."""

    rows: list[int]
    token_ids: torch.Tensor  # [S] int64 on the device; 0 for a bad row
    _greatest_S: torch.Tensor  # the raw logits' maximum: finite, or the row is bad
    _chosen_S: torch.Tensor  # the chosen token's value: -inf if every token was masked
    _logprobs: list[tuple[list[int], list[int], LogprobTensors]] = field(default_factory=list)
    _home: Download | None = None

    def depart(self) -> None:
        """On a GPU, start one copy of all that `ids` and `bad_rows` need; they will wait for it alone."""
        if self.token_ids.device.type == "cuda":
            parts = (self.token_ids, self._greatest_S, self._chosen_S)  # float64 holds any token id
            self._home = Download(torch.stack([x.to(torch.float64) for x in parts]))

    def ids(self) -> list[int]:
        """The token of each row; 0 for a bad row."""
        return self._numbers()[0].astype(np.int64).tolist()

    @property
    def bad_rows(self) -> list[tuple[int, str]]:
        """(row, reason) of rows whose token means nothing."""
        _, greatest, chosen = self._numbers()
        good = np.isfinite(greatest) & np.isfinite(chosen)
        return [
            (self.rows[i], f"logits are not finite (maximum {greatest[i]})" if not np.isfinite(greatest[i])
             else "every token is masked (logit_bias or min_tokens leave none)")
            for i in np.flatnonzero(~good).tolist()
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

    def _numbers(self) -> list[np.ndarray]:
        if self._home is not None:
            return list(self._home.read())
        return [x.cpu().numpy() for x in (self.token_ids, self._greatest_S, self._chosen_S)]
