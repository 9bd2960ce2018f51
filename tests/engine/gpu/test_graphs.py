"""Decoding by recorded passes gives the ids of ordinary steps, whatever rows come, go and grow.

On a CPU a recorded pass is run again on the same buffers, over gathered SDPA: what is tested is everything
but the recording itself.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.attn.base import AttnStep
from engine.attn.sdpa import SdpaBackend
from engine.exec.wire import RowStep
from engine.request import Sampling
from engine.worker import graphs
from engine.worker.graphs import DecodeGraphs, DecodingBackend, Pass, Staging, sizes
from tests.engine.model import drive, tiny

FREE = Sampling(temperature=1.0, seed=3)


class Recordable(SdpaBackend):
    """The oracle, with the one verb that recording needs."""

    def begin_decoding(
        self, starts_R: torch.Tensor, rows_R1: torch.Tensor, tables_RB: torch.Tensor, slots_R: torch.Tensor
    ) -> None:
        ones = np.ones(len(starts_R), np.int64)
        self.begin(AttnStep(starts_R.numpy(), ones, rows_R1.numpy().astype(np.int64), tables_RB, slots_R))


class Recorder:
    """Passes as they are, and how often each was replayed, by its number of rows."""

    def __init__(self) -> None:
        self.replayed: list[int] = []

    def __call__(self, function: Pass) -> Pass:
        def replay() -> torch.Tensor:
            out = function()
            self.replayed.append(len(out))
            return out

        return replay


@pytest.fixture(scope="module", params=["qwen3", "qwen1"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "qwen1":
        tiny.build_qwen1(path)
    else:
        tiny.build(path, request.param)
    return path


def rank(folder: Path, recorder: Recorder | None, max_num_seqs: int = 6) -> drive.Driver:
    """A worker whose unwritten slots are NaN, the null block's too."""
    w = drive.worker(folder, sdpa=True, max_num_seqs=max_num_seqs)
    w.attention = Recordable(w.attention.shape)
    w.allocate(64)
    for cache in (*w.attention.cache.k, *w.attention.cache.v):
        cache.fill_(float("nan"))
    if recorder is not None:
        assert isinstance(w.attention, DecodingBackend)
        w.graphs = DecodeGraphs(w.model, w.attention, w.rows, w.config.block_size, recorder)
    return drive.Driver(w, 64)


def play(driver: drive.Driver) -> list[list[int]]:
    """Rows of unlike lengths; chunks beside decoding rows; a row leaves, is preempted and comes back."""
    for row, length in enumerate((3, 14, 15, 33, 1)):
        driver.enter(row, tiny.prompt(length, seed=row), sampling=FREE if row % 2 else drive.GREEDY)
    driver.run({0: 3, 1: 14, 2: 15, 3: 20, 4: 1})
    driver.run({0: 1, 1: 1, 2: 1, 3: 13})
    for _ in range(5):
        driver.run({4: 1, 2: 1, 0: 1, 1: 1, 3: 1})
    for _ in range(3):
        driver.run({1: 1, 3: 1})
    done = [driver.leave(2)]
    preempted = driver.leave(3)
    driver.run({0: 1, 1: 1, 4: 1})
    driver.enter(2, preempted, prompt_len=33, sampling=FREE)
    driver.run({2: len(preempted), 0: 1})
    for _ in range(20):
        driver.run({0: 1, 1: 1, 2: 1, 4: 1})
    driver.run({1: 1})
    return done + [driver.leave(row) for row in (0, 1, 2, 4)]


def test_ids_are_those_of_ordinary_steps(folder: Path) -> None:
    recorder = Recorder()
    assert play(rank(folder, recorder)) == play(rank(folder, None))
    assert recorder.replayed == [6] * 5 + [2] * 3 + [4] + [4] * 20 + [1]


def test_bad_rows_are_told_and_disturb_no_other(folder: Path) -> None:
    driver = rank(folder, Recorder())
    driver.enter(0, tiny.prompt(5))
    driver.enter(1, tiny.prompt(9))
    driver.run({0: 5, 1: 9})
    block = driver.blocks[1][0]
    driver.worker.attention.cache.k[0][block, 3] = float("nan")
    result = driver.run({0: 1, 1: 1})
    assert result is not None
    assert [row for row, _ in result.bad_rows] == [1]


@pytest.mark.parametrize(
    ("step", "why"),
    [
        (RowStep(0, 5, 2, True), "two tokens"),
        (RowStep(0, 4, 1, True), "a token that the driver sent"),
        (RowStep(0, 5, 1, False), "nothing is sampled"),
    ],
)
def test_other_steps_have_no_graph(folder: Path, step: RowStep, why: str) -> None:
    recorder = Recorder()
    driver = rank(folder, recorder)
    driver.enter(0, tiny.prompt(5))
    driver.run({0: 5})
    assert driver.worker.graphs is not None
    assert driver.worker.graphs.run([step]) is None, why
    assert driver.worker.graphs.run([RowStep(0, 5, 1, True)]) is not None
    assert recorder.replayed == [1]


def test_every_number_of_rows_has_a_graph_little_larger_than_itself() -> None:
    for most in (1, 2, 3, 7, 8, 64, 100, 256, 1000):
        some = sizes(most)
        assert some == sorted(set(some))
        assert some[-1] == most
        for rows in range(1, most + 1):
            size = min(s for s in some if s >= rows)
            assert size - rows <= max(7, rows // 8), (most, rows)
    assert len(sizes(256)) <= 32


def test_a_set_of_inputs_is_not_rewritten_before_the_device_has_read_it() -> None:
    staging = Staging(4, 3, torch.device("cpu"))
    order = []

    class Read:
        def __init__(self, number: int) -> None:
            self.number = number

        def synchronize(self) -> None:
            order.append(f"wait {self.number}")

        def record(self) -> None:
            order.append(f"read {self.number}")

    staging._read = [Read(i) for i in range(graphs.SETS)]  # type: ignore[misc]
    for value in (1, 2, 3):
        fields, tables = np.full((4, 2), value), np.full((2, 2), 10 * value, np.int32)
        staging.send(fields, tables)
        assert (staging.fields_4R[:, :2] == value).all()
        assert (staging.tables_RB[:2, :2] == 10 * value).all()
        assert (staging.tables_RB[2:] == 0).all()
        assert (staging.tables_RB[:, 2:] == 0).all()
    assert order == ["wait 0", "read 0", "wait 1", "read 1", "wait 0", "read 0"]
