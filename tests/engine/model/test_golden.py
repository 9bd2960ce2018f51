"""Every family equals transformers in float32: logits and greedy ids, at TP 1, 2 and 4, however the
prompt is cut into chunks. Qwen-1, which transformers lacks, equals a plain reference.

All cases of one TP size run in one group of ranks, which leaves its answers in a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.model import drive, tiny

CHUNKS = (1, 3, 8, 1000)
PROMPT = tiny.prompt(21)  # longer than the sliding windows and than Qwen-1's trained length
NEW = 12
#: Qwen-1 checkpoints: its own settings, and one with every bias and without NTK and log-n.
QWEN1: dict[str, dict[str, Any]] = {
    "qwen1": {"seq_length": 16},
    "qwen1-biased": {"no_bias": False, "use_dynamic_ntk": False, "use_logn_attn": False, "seq_length": 512},
}
NAMES = [*tiny.FAMILIES, *QWEN1]


@pytest.fixture(scope="module")
def golden(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, tuple[torch.Tensor, list[int]]]]:
    """(folder of checkpoints, each reference's greedy continuation and the logits of the whole)."""
    folder = tmp_path_factory.mktemp("golden")
    expected = {}
    for name in tiny.FAMILIES:
        model = tiny.build(folder / name, name)
        with torch.no_grad():
            ids = model.generate(
                torch.tensor([PROMPT]), max_new_tokens=NEW, do_sample=False, eos_token_id=None
            )
            logits = model(ids[:, :-1]).logits[0]
        expected[name] = logits, ids[0, len(PROMPT) :].tolist()
    for name, changes in QWEN1.items():
        reference = tiny.build_qwen1(folder / name, **changes)
        greedy = reference.generate(PROMPT, NEW)
        expected[name] = reference.logits(PROMPT + greedy[:-1], len(PROMPT)), greedy
    return folder, expected


@pytest.fixture(scope="module")
def answers(golden: Any) -> dict[int, dict[str, dict[int, tuple[torch.Tensor, list[int]]]]]:
    """By TP size, name and chunk: (logits of prompt and continuation, greedy ids)."""
    folder, _ = golden
    rank_answers(0, 1, None, folder)
    for world in (2, 4):
        drive.spawn(world, rank_answers, folder)
    return {world: torch.load(folder / f"tp{world}.pt") for world in (1, 2, 4)}


def rank_answers(rank: int, world: int, init_method: str | None, folder: Path) -> None:
    """What one rank does for every checkpoint and chunk size."""
    out: dict[str, dict[int, tuple[torch.Tensor, list[int]]]] = {}
    group = None
    for name in NAMES:
        # Two ranks take the oracle's attention, the others what this machine chooses.
        w = drive.worker(folder / name, rank, world, init_method, group=group, sdpa=world == 2)
        group = w
        driver = drive.Driver(w, 64)
        logits: list[list[torch.Tensor]] = [[] for _ in CHUNKS]
        for counts in steps(driver):
            driver.run(counts)
            parts = w.last_logits(sum(counts.values())).split([*counts.values()])
            for row, part in zip(counts, parts, strict=True):
                logits[row].append(part)
        out[name] = {
            chunk: (torch.cat(logits[row]), driver.leave(row)[-NEW:]) for row, chunk in enumerate(CHUNKS)
        }
    if group is not None:
        group.close()
    if rank == 0:
        torch.save(out, folder / f"tp{world}.pt")


def steps(driver: drive.Driver) -> Iterator[dict[int, int]]:
    """Compute PROMPT in one row per chunk size, side by side, all ending in the same step; then decode."""
    for row in range(len(CHUNKS)):
        driver.enter(row, PROMPT)
    for left in range(len(PROMPT), 0, -1):
        yield {
            row: min(chunk, len(PROMPT) - driver.computed[row])
            for row, chunk in enumerate(CHUNKS)
            if -(-len(PROMPT) // chunk) >= left
        }
    for _ in range(NEW - 1):
        yield dict.fromkeys(range(len(CHUNKS)), 1)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_ids_equal_the_reference(golden: Any, answers: Any, name: str, world: int) -> None:
    expected_logits, expected_ids = golden[1][name]
    assert len(set(expected_ids)) > 3, f"{name}: the tiny model repeats itself: {expected_ids}"
    for chunk, (logits, ids) in answers[world][name].items():
        torch.testing.assert_close(
            logits, expected_logits, rtol=1e-4, atol=2e-4, msg=lambda m, c=chunk: f"chunk {c}: {m}"
        )
        assert ids == expected_ids, f"chunk {chunk}: greedy ids differ"


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_chunk_size_changes_no_bit_of_the_logits(answers: Any, name: str, world: int) -> None:
    whole = answers[world][name][1000][0]
    for chunk in (1, 3, 8):
        difference = (answers[world][name][chunk][0] - whole).abs().max().item()
        assert difference == 0, f"chunk {chunk} differs from the whole prompt by up to {difference}"
