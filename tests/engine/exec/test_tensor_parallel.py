"""A real model over two Ray ranks answers as one rank in this process does, for greedy and for drawn rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import CheckpointError
from engine.exec.inproc import InprocExecutor
from engine.exec.ray import RayExecutor
from engine.models.registry import read_spec
from engine.request import Request, Sampling
from tests.engine.model import tiny


def _requests() -> list[Request]:
    return [
        Request(f"r{i}", tiny.prompt(5 + 9 * i, seed=i), Sampling(max_tokens=12, temperature=i % 2, seed=i))
        for i in range(6)
    ]


def _tokens(folder: Path, **settings: Any) -> list[list[int]]:
    config = EngineConfig(
        model=str(folder), device="cpu", dtype="float32", num_kv_blocks=100, max_num_batched_tokens=32,
        num_threads=1, **settings,
    )  # fmt: skip
    spec = read_spec(str(folder))
    engine = Engine(config, spec, (RayExecutor if settings else InprocExecutor)(config, spec))
    try:
        engine.start()
        requests = _requests()
        for request in requests:
            engine.add(request)
        engine.drain()
        return [request.output for request in requests]
    finally:
        engine.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3")
    tiny.build(folder, "qwen3")
    return folder


def test_two_ray_ranks_draw_the_tokens_of_one_rank_here(folder: Path) -> None:
    alone = _tokens(folder)
    for depth in (0, 1):
        assert _tokens(folder, executor="ray", tensor_parallel_size=2, overlap_depth=depth) == alone
    assert len({tuple(tokens) for tokens in alone}) == 6


def test_a_broken_checkpoint_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    tiny.build(tmp_path, "qwen3")
    (tmp_path / "config.json").write_text(
        (folder / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\."):
        _tokens(tmp_path, executor="ray", tensor_parallel_size=2)
