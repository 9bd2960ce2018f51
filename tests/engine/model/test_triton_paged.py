"""The Triton backend equals the SDPA oracle on mixed steps, with windows, odd heads and poisoned blocks.

Runs on a GPU where there is one, else in Triton's interpreter; skipped where Triton is not installed
(torch for CPUs does not bring it).
"""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton")

from engine.attn.base import AttnShape, AttnStep
from engine.attn.sdpa import SdpaBackend
from engine.attn.triton_paged import TritonBackend

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCKS = 64
#: (start, count) of the rows of each step: decode only, chunks only, and both.
STEPS = {
    "decode": [(0, 1), (70, 1), (15, 1), (16, 1), (130, 1)],
    "chunks": [(0, 37), (20, 3), (64, 65)],
    "mixed": [(9, 1), (0, 5), (100, 1), (31, 33), (127, 1)],
}


@pytest.mark.parametrize("heads", [(4, 4, 16), (6, 2, 24), (7, 1, 64)], ids=str)
@pytest.mark.parametrize("windows", [(None,), (7,), (100, None)], ids=str)
@pytest.mark.parametrize("rows", STEPS.values(), ids=STEPS)
def test_equals_sdpa(
    rows: list[tuple[int, int]], windows: tuple[int | None, ...], heads: tuple[int, int, int]
) -> None:
    n, k, h = heads
    shape = AttnShape(n, k, h, 16, windows, torch.float32, DEVICE)
    generator = torch.Generator().manual_seed(0)
    starts, counts = (np.array(x) for x in zip(*rows, strict=True))
    cu = np.concatenate([[0], np.cumsum(counts)])
    order = torch.randperm(BLOCKS - 1, generator=generator) + 1
    tables = torch.zeros(len(rows), 9, dtype=torch.int32)
    slots = []
    past: list[list[int]] = []  # slots of each row's earlier tokens
    for r, (start, count) in enumerate(rows):
        need = -(-(start + count) // 16)
        tables[r, :need], order = order[:need], order[need:]
        where = [int(tables[r, p // 16]) * 16 + p % 16 for p in range(start + count)]
        past.append(where[:start])
        slots += where[start:]
    step = AttnStep(starts, counts, cu, tables.to(DEVICE), torch.tensor(slots, device=DEVICE))
    total = int(cu[-1])
    draw = [torch.randn(total, heads_, h, generator=generator).to(DEVICE) for heads_ in (n, k, k)]
    old = [torch.randn(BLOCKS * 16, k, h, generator=generator).to(DEVICE) for _ in range(2 * len(windows))]

    results = []
    for backend in (SdpaBackend(shape), TritonBackend(shape)):
        backend.allocate(BLOCKS)
        for layer in range(len(windows)):
            for cache, values in zip((backend.cache.k, backend.cache.v), old[2 * layer :], strict=False):
                cache[layer].fill_(math.nan)
                for where in past:
                    cache[layer].flatten(0, 1)[where] = values[where]
        backend.begin(step)
        results.append([backend.attend(layer, *draw) for layer in range(len(windows))])
    for oracle, kernel in zip(*results, strict=True):
        assert torch.isfinite(oracle).all()
        torch.testing.assert_close(kernel, oracle, rtol=1e-4, atol=1e-5)
