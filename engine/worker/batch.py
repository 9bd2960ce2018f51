"""Turns a plan and the rows into one step's inputs: token ids, positions, cache slots, logits indices.

Vectorised over rows and tokens; only rows that compute prompt tokens cost Python of their own. Knows
nothing of the model or the sampler.

Suffixes: T tokens of the step, R rows of the step, S sampled rows, P scored prompt positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.attn.base import AttnStep
from engine.exec.wire import StepPlan
from engine.gpu.host import upload
from engine.worker.rows import Rows

#: CPU products over a multiple of 8 rows give each row the same bits whatever the other rows are; fewer
#: rows take other kernels (measured for float32 with MKL, 1 and 2 threads, up to 1,024 rows).
CPU_ROWS = 8


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs of one forward pass, and which of its hidden states need logits."""

    ids_T: torch.Tensor  # int64, padded; padding tokens are id 0 at position 0
    positions_T: torch.Tensor  # int64, padded
    prompt_lens_T: torch.Tensor  # int64, padded: the prompt length of each token's row
    attn: AttnStep
    sample_rows: list[int]
    sample_rows_S: torch.Tensor  # int64: the same
    sample_at_S: torch.Tensor  # int64: the token whose hidden state draws the row's next token
    sample_positions_S: torch.Tensor  # int64: the position of the token to be drawn
    score_rows: np.ndarray  # [P]
    score_positions: np.ndarray  # [P]: the prompt token whose log-probability is wanted
    score_at_P: torch.Tensor  # int64: the token before it in this step


def build(plan: StepPlan, rows: Rows, block_size: int, device: torch.device) -> Batch:
    """The inputs of `plan`, whose differences `rows` has applied already."""
    steps = plan.steps
    row_R = np.fromiter((s.row for s in steps), np.int64, len(steps))
    start_R = np.fromiter((s.start for s in steps), np.int64, len(steps))
    count_R = np.fromiter((s.count for s in steps), np.int64, len(steps))
    sample_R = np.fromiter((s.sample for s in steps), bool, len(steps))
    cu = np.zeros(len(steps) + 1, np.int64)
    np.cumsum(count_R, out=cu[1:])
    total = int(cu[-1])
    padded = total if device.type == "cuda" else -(-total // CPU_ROWS) * CPU_ROWS

    row_T = np.repeat(row_R, count_R)
    positions = np.zeros(padded, np.int64)
    positions[:total] = np.arange(total) + np.repeat(start_R - cu[:-1], count_R)
    prompt_lens = np.ones(padded, np.int64)
    prompt_lens[:total] = rows.prompt_lens_R[row_T]
    block_T, offset_T = np.divmod(positions[:total], block_size)
    slots = rows.tables_RB[row_T, block_T].astype(np.int64) * block_size + offset_T

    most = int(-(-(start_R + count_R).max() // block_size))
    sampled = np.flatnonzero(sample_R)
    scored = _scored(rows, row_R, start_R, count_R, cu)
    return Batch(
        _ids(rows, row_R, start_R, count_R, cu, padded, device),
        upload(positions, device),
        upload(prompt_lens, device),
        AttnStep(start_R, count_R, cu, upload(rows.tables_RB[row_R, :most], device), upload(slots, device)),
        row_R[sampled].tolist(),
        upload(row_R[sampled], device),
        upload(cu[sampled + 1] - 1, device),
        upload((start_R + count_R)[sampled], device),
        row_R[scored[0]],
        scored[1],
        upload(scored[2], device),
    )


def _ids(
    rows: Rows, row_R: np.ndarray, start_R: np.ndarray, count_R: np.ndarray, cu: np.ndarray, padded: int,
    device: torch.device,
) -> torch.Tensor:  # fmt: skip
    """Token ids: what the driver sent, and for decoding rows the row's own last sample."""
    decoding = start_R >= rows.known_R[row_R]
    ids = np.zeros(padded, np.int64)
    for r in np.flatnonzero(~decoding).tolist():
        tokens = rows.tokens[row_R[r]]
        ids[cu[r] : cu[r + 1]] = tokens[start_R[r] : start_R[r] + count_R[r]]
    ids_T = upload(ids, device)
    own = np.flatnonzero(decoding)
    if len(own):
        ids_T[upload(cu[own], device)] = rows.last_R[upload(row_R[own], device)]
    return ids_T


def _scored(
    rows: Rows, row_R: np.ndarray, start_R: np.ndarray, count_R: np.ndarray, cu: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(index into the step's rows, prompt position, token before it in the step), one per scored token.

    The logits at position q give the log-probability of prompt token q + 1.
    """
    first_R = np.maximum(start_R + 1, rows.score_from_R[row_R])
    end_R = np.minimum(start_R + count_R + 1, rows.prompt_lens_R[row_R])
    number_R = np.maximum(end_R - first_R, 0)
    index = np.repeat(np.arange(len(row_R)), number_R)
    offset = np.arange(len(index)) - np.repeat(np.cumsum(number_R) - number_R, number_R)
    position = first_R[index] + offset
    return index, position, cu[:-1][index] + position - 1 - start_R[index]
