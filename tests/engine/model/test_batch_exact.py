"""A row's logits are the same bits alone, among 63 other rows, in any order, and after preemption.

float32 and bfloat16 on a CPU; this is what makes a job's tokens repeatable.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.model import drive, tiny

PROMPT = tiny.prompt(70)


@pytest.fixture(scope="module", params=["mistral", "qwen3"])
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    tiny.build(path, request.param)
    return path


@pytest.fixture(params=["chosen", "sdpa"])
def sdpa(request: Any) -> bool:
    """Both the attention that this machine chooses and the oracle must keep the promise."""
    return request.param == "sdpa"


@pytest.fixture(params=["float32", "bfloat16"])
def worker(request: Any, folder: Path, sdpa: bool) -> drive.Probe:
    return drive.worker(folder, dtype=request.param, num_blocks=1024, sdpa=sdpa)


def alone(worker: drive.Probe, tokens: list[int]) -> torch.Tensor:
    """Logits of all tokens, computed in one step with nobody else."""
    driver = drive.Driver(worker, 1024)
    driver.enter(0, tokens)
    logits = worker.probe(driver.plan({0: len(tokens)}))
    driver.leave(0)
    worker.rows.apply(drive.StepPlan(0, [], finished=[0]))
    return logits


def test_neighbours_change_no_bit(worker: drive.Probe) -> None:
    expected = alone(worker, PROMPT)
    driver = drive.Driver(worker, 1024)
    me = 17
    for row in range(64):
        driver.enter(row, PROMPT if row == me else tiny.prompt(1 + 5 * row % 150, seed=row))
    generator = torch.Generator().manual_seed(0)
    done = 0
    while done < len(PROMPT):
        counts = {}
        for row in torch.randperm(64, generator=generator).tolist():
            left = len(driver.tokens[row]) - driver.computed[row]
            if left:  # mostly single tokens, some chunks: both paths of the attention share each step
                counts[row] = min(left, int(torch.randint(1, 12, (), generator=generator)) if row % 3 else 1)
        mine = list(counts).index(me)
        parts = worker.probe(driver.plan(counts)).split(list(counts.values()))
        for offset, logits in enumerate(parts[mine]):
            difference = (logits - expected[done + offset]).abs().max().item()
            assert difference == 0, f"position {done + offset} differs by {difference}"
        done += counts[me]


def test_neighbours_change_no_bit_with_two_threads(folder: Path) -> None:
    test_neighbours_change_no_bit(drive.worker(folder, num_threads=2, num_blocks=1024))


def test_preemption_changes_no_bit(worker: drive.Probe) -> None:
    driver = drive.Driver(worker, 1024)
    driver.enter(3, PROMPT)
    driver.generate(3, 16, 40)
    uninterrupted = driver.leave(3)

    driver.enter(5, PROMPT)
    driver.generate(5, 1000, 11)
    so_far = driver.leave(5)
    driver.enter(9, so_far, prompt_len=len(PROMPT))
    driver.generate(9, 7, 29)
    assert driver.leave(9) == uninterrupted


def test_one_token_steps_equal_one_step(worker: drive.Probe) -> None:
    expected = alone(worker, PROMPT)
    driver = drive.Driver(worker, 1024)
    driver.enter(0, PROMPT)
    for position in range(len(PROMPT)):
        logits = worker.probe(driver.plan({0: 1}))[0]
        difference = (logits - expected[position]).abs().max().item()
        assert difference == 0, f"position {position} differs by {difference}"


@pytest.mark.parametrize("block_size", [2, 8, 24, 32, 48])
def test_block_size_changes_no_bit(folder: Path, sdpa: bool, block_size: int) -> None:
    expected = alone(drive.worker(folder, num_blocks=1024, sdpa=sdpa), PROMPT)
    if block_size % 16 and not sdpa:
        pytest.skip("the kernel keeps groups of 16 tokens")
    worker = drive.worker(folder, num_blocks=1024, block_size=block_size, sdpa=sdpa)
    assert torch.equal(alone(worker, PROMPT), expected)
    driver = drive.Driver(worker, 1024)
    driver.enter(0, PROMPT)
    for position in range(len(PROMPT)):
        assert torch.equal(worker.probe(driver.plan({0: 1}))[0], expected[position]), f"position {position}"
