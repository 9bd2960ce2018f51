"""The permanent rows of one rank: what stays between steps, and how a plan's differences change it.

A row holds a running request's known tokens, its block table and how many positions it may sample.
Knows nothing of the model. The newest sampled token of each row stays on the device (`last_R`), so that
the next plan can leave before this step's result is read.

Suffixes: R rows, B blocks of a row.
"""

from __future__ import annotations

import numpy as np
import torch

from engine.config import NULL_BLOCK
from engine.exec.wire import NewRow, StepPlan
from engine.request import Sampling


class Rows:
    """`max_rows` rows of up to `max_blocks` blocks each."""

    def __init__(self, max_rows: int, max_blocks: int, device: torch.device) -> None:
        self.tables_RB = np.full((max_rows, max_blocks), NULL_BLOCK, dtype=np.int32)
        self.blocks_R = np.zeros(max_rows, dtype=np.int64)  # blocks in each table
        self.known_R = np.zeros(max_rows, dtype=np.int64)  # tokens that the driver has sent
        self.prompt_lens_R = np.zeros(max_rows, dtype=np.int64)
        #: First prompt position whose log-probability is wanted; beyond any prompt where none is.
        self.score_from_R = np.full(max_rows, NOTHING, dtype=np.int64)
        self.tokens: list[np.ndarray | None] = [None] * max_rows
        self.sampling: list[Sampling | None] = [None] * max_rows
        self.last_R = torch.zeros(max_rows, dtype=torch.int64, device=device)

    def apply(self, plan: StepPlan) -> None:
        """Free, fill and lengthen rows, in the plan's order."""
        for row in plan.finished:
            self._drop(row)
        for new in plan.new:
            self._fill(new)
        for s in plan.steps:
            if s.new_blocks:
                end = self.blocks_R[s.row] + len(s.new_blocks)
                self.tables_RB[s.row, self.blocks_R[s.row] : end] = s.new_blocks
                self.blocks_R[s.row] = end

    def _drop(self, row: int) -> None:
        self.tables_RB[row, : self.blocks_R[row]] = NULL_BLOCK
        self.blocks_R[row] = self.known_R[row] = 0
        self.score_from_R[row] = NOTHING
        self.tokens[row] = self.sampling[row] = None

    def _fill(self, new: NewRow) -> None:
        row, sampling = new.row, new.sampling
        self._drop(row)
        self.tables_RB[row, : len(new.blocks)] = new.blocks
        self.blocks_R[row] = len(new.blocks)
        self.tokens[row] = np.asarray(new.tokens, dtype=np.int64)
        self.known_R[row] = len(new.tokens)
        self.prompt_lens_R[row] = new.prompt_len
        self.sampling[row] = sampling
        if sampling.score_from is not None:
            self.score_from_R[row] = sampling.score_from
        elif sampling.prompt_logprobs is not None:
            self.score_from_R[row] = 1  # nothing stands before token 0


#: A position that no prompt reaches.
NOTHING = np.iinfo(np.int64).max
