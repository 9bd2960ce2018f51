"""One rank: room for KV, refusals, scores of prompt tokens, and rows that come and go."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import CapacityError, ConfigError
from engine.exec.wire import StepPlan
from engine.models.registry import read_spec
from engine.request import Sampling
from engine.worker import worker as module
from engine.worker.worker import Worker
from tests.engine.model import drive, tiny

PROMPT = tiny.prompt(37)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("worker")
    tiny.build(path, "qwen3")
    return path


def loaded(folder: Path, **settings: Any) -> tuple[Worker, module.RankReport]:
    w = Worker(EngineConfig(str(folder), num_threads=1, **settings), read_spec(folder), 0, 1, None)
    w.init_device()
    return w, w.load()


# 2 (k, v) * 2 layers * 16 tokens * 2 heads * 24 dimensions * 4 bytes
BLOCK_GIB = 12288 / 2**30


def test_kv_memory_becomes_blocks(folder: Path) -> None:
    assert loaded(folder, kv_cache_memory=10.5 * BLOCK_GIB)[1].kv_blocks == 10
    assert loaded(folder, kv_cache_memory=1.0, num_kv_blocks=7)[1].kv_blocks == 7
    report = loaded(folder, max_num_seqs=3)[1]
    assert report.kv_blocks == 3 * 512 // 16 + 1, "a CPU takes no more than its rows can use"
    assert report.kv_gib == pytest.approx(report.kv_blocks * BLOCK_GIB)


@pytest.mark.parametrize("settings", [{"kv_cache_memory": 1.9 * BLOCK_GIB}, {"num_kv_blocks": 1}])
def test_no_room_for_one_block_names_the_fix(folder: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(CapacityError, match=r"no room for one KV block .* Give it at least 0\.0000\d+ GiB"):
        loaded(folder, **settings)


def test_the_log_says_weights_seconds_and_kv_tokens(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "engine.worker.worker"):
        loaded(folder, num_kv_blocks=11)
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("rank_loaded")]
    for part in ("rank=0", "weights_gib=0.0", "seconds=", "kv_tokens=160", "kv_gib=", "attention='sdpa"):
        assert part in line


def test_devices_and_dtypes_that_cannot_be_had_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--device tpu is not one of"):
        loaded(folder, device="tpu")
    with pytest.raises(ConfigError, match="float16 is for GPUs only"):
        loaded(folder, device="cpu", dtype="float16")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="sees no GPU"):
            loaded(folder, device="cuda")


def test_the_group_is_joined_before_anyone_measures_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers of the group must not be counted as free; Ray's NCCL variable goes before the group."""
    order = []
    connect, kv_blocks = module.connect, module.kv_blocks

    def noted(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            order.append((name, "NCCL_ASYNC_ERROR_HANDLING" in module.os.environ))
            return function(*args)

        return call

    monkeypatch.setenv("NCCL_ASYNC_ERROR_HANDLING", "1")
    monkeypatch.setattr(module, "connect", noted("connect", connect))
    monkeypatch.setattr(module, "kv_blocks", noted("measure", kv_blocks))
    loaded(folder)
    assert order == [("connect", False), ("measure", False)]


def test_prompt_logprobs_and_scores_equal_log_softmax(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks, in slices of 8 positions, and side by side with rows that only decode."""
    monkeypatch.setattr(module, "SCORE_BYTES", 8 * 4 * tiny.VOCAB)
    w = drive.worker(folder)
    driver = drive.Driver(w, 64)
    driver.enter(0, PROMPT)
    expected = w.probe(driver.plan({0: 37})).log_softmax(-1)
    driver.leave(0)

    driver.enter(1, PROMPT[:5])
    driver.enter(2, PROMPT, sampling=Sampling(temperature=0.0, prompt_logprobs=3))
    driver.enter(3, PROMPT, sampling=Sampling(score_from=30))
    driver.enter(4, PROMPT, sampling=Sampling(temperature=0.0, prompt_logprobs=0, logprobs=2))
    found = []
    sampled = []
    for counts in ({1: 5, 2: 20, 3: 29, 4: 37}, {1: 1, 2: 17, 3: 7}):
        result = w.run(driver.plan(counts))
        assert result is not None
        for row, token in result.sampled:
            driver.tokens[row].append(token)
        found += result.prompt_logprobs
        sampled += result.logprobs
    by_row = {row: {p: e for r, p, e in found if r == row} for row in (1, 2, 3, 4)}
    assert [sorted(entries) for entries in by_row.values()] == [
        [], list(range(1, 37)), list(range(30, 37)), list(range(1, 37)),
    ]  # fmt: skip
    for row, top in ((2, 3), (3, 0), (4, 0)):
        for position, entry in by_row[row].items():
            row_logprobs = expected[position - 1]
            assert entry.token_id == PROMPT[position]
            assert entry.logprob == pytest.approx(row_logprobs[entry.token_id].item(), abs=1e-4)
            assert entry.rank == 1 + int((row_logprobs > row_logprobs[entry.token_id]).sum())
            assert [i for i, _ in entry.top] == row_logprobs.topk(top).indices.tolist()
    (entry,) = [e for row, e in sampled if row == 4]
    assert entry.token_id == int(expected[-1].argmax())


def test_a_row_is_clean_for_its_next_request(folder: Path) -> None:
    w = drive.worker(folder)
    driver = drive.Driver(w, 64)
    driver.enter(0, PROMPT, sampling=Sampling(temperature=0.0, prompt_logprobs=1))
    driver.run({0: 37})
    expected = driver.generate(0, 1, 5)
    driver.leave(0)
    driver.enter(0, PROMPT[:9])
    result = driver.run({0: 9})
    assert result is not None
    assert result.prompt_logprobs == []
    driver.leave(0)
    driver.enter(0, PROMPT)
    driver.run({0: 37})
    assert driver.generate(0, 1, 5) == expected


def test_the_largest_step_runs_before_there_is_a_pool_and_leaves_nothing_behind(folder: Path) -> None:
    """On GPUs it runs during load, so that activations are not counted as room for KV."""
    expected = drive.Driver(drive.worker(folder), 64)
    expected.enter(0, PROMPT)
    w, report = loaded(folder, num_kv_blocks=64, max_num_batched_tokens=700)
    w.run_largest_step()  # more tokens than the context of 512 has positions
    w.allocate(report.kv_blocks)
    driver = drive.Driver(w, 64)
    driver.enter(0, PROMPT)
    assert driver.generate(0, 16, 8) == expected.generate(0, 16, 8)


def test_a_plan_without_steps_only_frees_rows(folder: Path) -> None:
    w = drive.worker(folder)
    driver = drive.Driver(w, 64)
    driver.enter(0, PROMPT)
    driver.run({0: 37})
    result = w.run(StepPlan(9, [], finished=[0]))
    assert result is not None
    assert (result.step, result.sampled) == (9, [])
    assert w.rows.tokens[0] is None


def test_a_row_with_bad_weights_is_reported_and_hurts_no_other(folder: Path) -> None:
    """An embedding row of NaN stands for whatever makes one request's activations overflow."""
    clean = drive.worker(folder)
    driver = drive.Driver(clean, 64)
    driver.enter(1, PROMPT[:20])
    driver.run({1: 20})
    expected = driver.generate(1, 1, 6)

    w = drive.worker(folder)
    table = w.model.embed._rows(torch.arange(tiny.VOCAB)).clone()  # tied: the head keeps its own
    table[999] = float("nan")
    w.model.embed.weight_VD = table
    driver = drive.Driver(w, 64)
    driver.enter(0, [5, 999, 7])
    driver.enter(1, PROMPT[:20])
    result = driver.run({0: 3, 1: 20})
    assert result is not None
    assert [row for row, _ in result.bad_rows] == [0]
    driver.leave(0)
    driver.enter(2, PROMPT)  # takes the blocks that hold NaN
    driver.run({2: 37, 1: 1})
    while len(driver.tokens[1]) < 27:
        driver.run({2: 1, 1: 1})
    assert driver.tokens[1][-6:] == expected
    assert torch.isfinite(torch.tensor([float(t) for t in driver.tokens[2]])).all()
