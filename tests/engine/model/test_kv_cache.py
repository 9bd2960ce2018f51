"""What stands in the KV cache but belongs to no written token never reaches an output."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.engine.model import drive, tiny

PROMPT = tiny.prompt(37)
BLOCKS = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kv")
    tiny.build(path, "mistral")
    return path


def poison(worker: drive.Probe) -> None:
    """NaN in every block, the null block too, as a row with bad weights or an old use would leave it."""
    for cache in (*worker.attention.cache.k, *worker.attention.cache.v):
        cache.fill_(math.nan)


@pytest.mark.parametrize("sdpa", [False, True], ids=["chosen", "sdpa"])
@pytest.mark.parametrize("block_size", [4, 16, 24])
def test_stale_nan_in_free_blocks_and_the_null_block_does_not_leak(
    folder: Path, block_size: int, sdpa: bool
) -> None:
    def run(poisoned: bool) -> tuple[torch.Tensor, list[int]]:
        worker = drive.worker(folder, num_blocks=BLOCKS, block_size=block_size, sdpa=sdpa)
        if poisoned:
            poison(worker)
        driver = drive.Driver(worker, BLOCKS)
        driver.enter(0, PROMPT)
        driver.enter(1, PROMPT[:5])  # rows of other lengths: their padding is the null block
        driver.enter(2, PROMPT[:1])
        logits = worker.probe(driver.plan({0: 30, 1: 5, 2: 1}))
        driver.run({0: 7})
        for _ in range(10):
            driver.run({0: 1, 1: 1, 2: 1})
        return logits, driver.tokens[0] + driver.tokens[1] + driver.tokens[2]

    clean_logits, clean_ids = run(poisoned=False)
    logits, ids = run(poisoned=True)
    assert torch.isfinite(logits).all()
    assert torch.equal(logits, clean_logits)
    assert ids == clean_ids


def test_padding_tokens_are_not_stored(folder: Path) -> None:
    worker = drive.worker(folder, num_blocks=BLOCKS)
    poison(worker)
    driver = drive.Driver(worker, BLOCKS)
    driver.enter(0, PROMPT)
    worker.probe(driver.plan({0: 37}))  # padded to 40 tokens
    assert torch.isnan(worker.attention.cache.k[0][0]).all(), "padding was written to the null block"
    token = worker.spec.num_kv_heads * worker.spec.head_dim
    assert int(torch.isfinite(worker.attention.cache.k[1]).sum()) == 37 * token


def test_blocks_are_shared_by_rows_that_name_them(folder: Path) -> None:
    """A prefix hit: a second row computes only its last token over the first row's blocks."""
    worker = drive.worker(folder, num_blocks=BLOCKS)
    driver = drive.Driver(worker, BLOCKS)
    driver.enter(0, PROMPT)
    whole = worker.probe(driver.plan({0: 37}))
    driver.enter(1, PROMPT)
    driver.blocks[1], driver.computed[1] = list(driver.blocks[0]), 36
    plan = driver.plan({1: 1})
    plan.new[0].blocks.extend(driver.blocks[0])
    assert torch.equal(worker.probe(plan)[0], whole[36])
