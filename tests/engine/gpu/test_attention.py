"""The Triton backend equals the SDPA oracle on any mix of rows, reads no foreign or unwritten slot, and
gives a row the same bits whatever its neighbours are.

New memory and unwritten slots are NaN throughout (`bench.gpu_attention`).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.engine.gpu.interpreter import DEVICE  # isort: skip
from bench import gpu_attention
from bench.gpu_attention import case, fill, poisoned_memory
from engine.attn import triton_paged
from engine.attn.base import AttnShape, AttnStep
from engine.attn.triton_paged import TritonBackend

#: (start, count) of the rows of each step: decode only, chunks only, and both.
STEPS = {
    "decode": [(0, 1), (70, 1), (15, 1), (16, 1), (191, 1), (400, 1)],
    "chunks": [(0, 37), (20, 3), (64, 65)],
    "mixed": [(9, 1), (0, 5), (150, 1), (31, 33), (63, 1)],
}


@pytest.fixture(autouse=True)
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 128 keys are split already."""
    monkeypatch.setattr(triton_paged, "SPLIT_KEYS", 64)
    monkeypatch.setattr(triton_paged, "MAX_SPLITS", 4)


def backend(
    heads: tuple[int, int, int] = (6, 2, 24), window: int | None = None, exact: bool = False
) -> TritonBackend:
    return TritonBackend(AttnShape(*heads, gpu_attention.BLOCK, (window,), torch.float32, DEVICE), exact)


@pytest.mark.parametrize("exact", [False, True], ids=["split", "exact"])
@pytest.mark.parametrize("heads", [(4, 4, 16), (6, 2, 24), (7, 1, 64)], ids=str)
@pytest.mark.parametrize("window", [None, 7, 100], ids=str)
@pytest.mark.parametrize("rows", STEPS.values(), ids=STEPS)
def test_equals_sdpa(
    rows: list[tuple[int, int]], window: int | None, heads: tuple[int, int, int], exact: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(gpu_attention, "choose", lambda shape: (TritonBackend(shape, exact), ""))
    error, _ = gpu_attention.largest_error(rows, heads, window, torch.float32, DEVICE, seed=7)
    assert error < 1e-5


def test_a_step_splits_long_rows_and_only_those() -> None:
    assert splits([(0, 1), (126, 1)]) == 1
    assert splits([(0, 1), (127, 1)]) == 2
    assert splits([(10_000, 1)]) == 4
    assert splits([(10_000, 2)]) == 1, "chunks are never split"
    assert splits([(10_000, 1)], exact=True) == 1


def splits(rows: list[tuple[int, int]], exact: bool = False) -> int:
    attention = backend(exact=exact)
    starts, counts = (np.array(x, np.int64) for x in zip(*rows, strict=True))
    cu = np.concatenate([[0], np.cumsum(counts)])
    attention.begin(
        AttnStep(starts, counts, cu, torch.zeros(len(rows), 700, dtype=torch.int32), torch.zeros(1))
    )
    return attention.splits


@pytest.mark.parametrize("exact", [False, True], ids=["split", "exact"])
def test_a_row_has_the_same_bits_alone_and_beside_others(exact: bool) -> None:
    """Decoding rows beside a chunk and beside a longer row, whose step has more splits."""
    attention = backend(exact=exact)
    step, caches, *qkv = case([(150, 1), (40, 9), (399, 1), (63, 1)], attention.shape, torch.float32, seed=3)
    with poisoned_memory():
        fill(attention, step, caches)
        together = attention.attend(0, *qkv)
        for row in range(4):
            at = slice(int(step.cu[row]), int(step.cu[row + 1]))
            attention.begin(AttnStep(
                step.starts[row : row + 1], step.counts[row : row + 1],
                np.array([0, step.counts[row]]), step.tables_RB[row : row + 1], step.slots_T[at],
            ))  # fmt: skip
            alone = attention.attend(0, *(x[at] for x in qkv))
            assert torch.equal(alone, together[at]), f"row {row}"


def test_exact_gives_a_query_the_same_bits_however_its_row_is_cut() -> None:
    attention = backend(exact=True)
    step, caches, *qkv = case([(100, 60)], attention.shape, torch.float32, seed=4)
    fill(attention, step, caches)
    whole = attention.attend(0, *qkv)
    done = 0
    for count in (1, 1, 30, 3, 24, 1):
        at = slice(done, done + count)
        attention.begin(AttnStep(
            np.array([100 + done]), np.array([count]), np.array([0, count]), step.tables_RB, step.slots_T[at]
        ))  # fmt: skip
        assert torch.equal(attention.attend(0, *(x[at] for x in qkv)), whole[at]), at
        done += count


@pytest.mark.parametrize("padding", [0, 3])
def test_a_decoding_step_from_device_tensors_equals_the_same_step_from_the_host(padding: int) -> None:
    """What CUDA graphs record. Padding rows write to the null block and disturb nobody."""
    attention = backend()
    rows = STEPS["decode"]
    step, caches, *qkv = case(rows, attention.shape, torch.float32, seed=5)
    fill(attention, step, caches)
    expected = attention.attend(0, *qkv)

    fill(attention, step, caches)
    number = len(rows) + padding
    starts, slots = (torch.zeros(number, dtype=torch.int64, device=DEVICE) for _ in range(2))
    starts[: len(rows)] = torch.from_numpy(step.starts)
    slots[: len(rows)] = step.slots_T
    tables = torch.zeros(number, 40, dtype=torch.int32, device=DEVICE)
    tables[: len(rows), : step.tables_RB.shape[1]] = step.tables_RB
    rows_R1 = torch.arange(number + 1, dtype=torch.int32, device=DEVICE)
    attention.begin_decoding(starts, rows_R1, tables, slots)
    padded = [torch.cat((x, x.new_full((padding, *x.shape[1:]), 9.0))) for x in qkv]
    found = attention.attend(0, *padded)
    assert torch.equal(found[: len(rows)], expected)
    live = attention.cache.k[0][1:].clone()
    fill(attention, step, caches)
    attention.attend(0, *qkv)
    torch.testing.assert_close(live, attention.cache.k[0][1:], equal_nan=True, rtol=0, atol=0)
