"""The engine on a real model in this process: the scheduler's freedom never shows in the tokens.

A tiny random Qwen3 made by transformers. Whatever the pool, the batch, the chunks and the overlap, rows get
the tokens that they get alone, and greedy rows get transformers' own.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import EngineError, WorkerDied
from engine.exec.inproc import InprocExecutor
from engine.exec.wire import RowStep, StepPlan
from engine.models.registry import read_spec
from engine.request import FinishReason, Request, Sampling
from tests.engine.model import tiny

TOKENS = 24
LENGTHS = [1, 3, 16, 17, 30, 31, 40, 9]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    folder = tmp_path_factory.mktemp("qwen3")
    return folder, tiny.build(folder, "qwen3")


def engine_on(folder: Path, **settings: Any) -> Engine:
    defaults = {"num_kv_blocks": 200, "max_num_batched_tokens": 64, "num_threads": 1}
    fields: dict[str, Any] = defaults | settings
    config = EngineConfig(model=str(folder), device="cpu", dtype="float32", **fields)
    spec = read_spec(str(folder))
    engine = Engine(config, spec, InprocExecutor(config, spec))
    engine.start()
    return engine


def rows(**changes: Any) -> list[Request]:
    """Prompts of many lengths, every second one behind a common prefix."""
    common = tiny.prompt(20, seed=99)
    out = []
    for i, length in enumerate(LENGTHS):
        prompt = (common if i % 2 else []) + tiny.prompt(length, seed=i)
        sampling = dataclasses.replace(Sampling(max_tokens=TOKENS, temperature=0.0, seed=i), **changes)
        out.append(Request(f"r{i}", prompt, sampling))
    return out


def run(engine: Engine, requests: list[Request]) -> list[list[int]]:
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    engine.stop()
    assert {r.finish for r in requests} <= {FinishReason.LENGTH, FinishReason.STOP}
    return [r.output for r in requests]


def alone(folder: Path, requests: list[Request]) -> list[list[int]]:
    engine = engine_on(folder, enable_prefix_caching=False)
    out = []
    for request in requests:
        engine.add(request)
        engine.drain()
        out.append(request.output)
    engine.stop()
    return out


TIGHT = {"num_kv_blocks": 16, "block_size": 8}  # two or three rows at a time: many preemptions
LOADS = [
    {},
    {"overlap_depth": 1},
    {"max_num_batched_tokens": 7},
    {"enable_prefix_caching": False, "block_size": 4},
    TIGHT,
    TIGHT | {"overlap_depth": 1, "max_num_batched_tokens": 11},
]


@pytest.mark.parametrize("settings", LOADS)
def test_greedy_ids_are_transformers_own_under_any_load(
    model: tuple[Path, torch.nn.Module], settings: dict[str, Any]
) -> None:
    folder, reference = model
    requests = rows()
    engine = engine_on(folder, **settings)
    outputs = run(engine, requests)
    for request, output in zip(requests, outputs, strict=True):
        ids = torch.tensor([request.prompt])
        wanted = reference.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
        assert output == wanted[0, len(request.prompt) :].tolist(), request.id
    if "num_kv_blocks" in settings:
        assert engine.stats.preemptions > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 1.0},
        {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    ],
)
def test_sampled_ids_are_the_same_alone_and_under_any_load(
    model: tuple[Path, torch.nn.Module], changes: dict[str, Any]
) -> None:
    folder, _ = model
    wanted = alone(folder, rows(**changes))
    for settings in LOADS:
        assert run(engine_on(folder, **settings), rows(**changes)) == wanted, settings


@pytest.mark.parametrize("settings", [TIGHT, TIGHT | {"overlap_depth": 1}])
def test_logprobs_survive_preemption(model: tuple[Path, torch.nn.Module], settings: dict[str, Any]) -> None:
    folder, _ = model
    fields = {"logprobs": 2, "prompt_logprobs": 1}
    wanted, got = rows(**fields), rows(**fields)
    alone(folder, wanted)
    run(engine_on(folder, **settings), got)
    for one, other in zip(wanted, got, strict=True):
        assert [e.token_id for e in other.logprobs] == other.output == one.output
        assert sorted(other.prompt_logprobs) == list(range(1, len(other.prompt)))
        for a, b in zip(one.logprobs, other.logprobs, strict=True):
            assert b.logprob == pytest.approx(a.logprob, abs=1e-4)
        for position, a in one.prompt_logprobs.items():
            assert other.prompt_logprobs[position].logprob == pytest.approx(a.logprob, abs=1e-4)


def test_scores_do_not_change_behind_a_cached_prefix(model: tuple[Path, torch.nn.Module]) -> None:
    folder, _ = model
    context, continuation = tiny.prompt(40, seed=3), tiny.prompt(5, seed=4)
    engine = engine_on(folder)
    pair = [Request(name, context + continuation, Sampling(score_from=40)) for name in "ab"]
    for request in pair:
        engine.add(request)
        engine.drain()
    engine.stop()
    assert [r.cached for r in pair] == [0, 32]
    for position in range(40, 45):
        first, second = (r.prompt_logprobs[position] for r in pair)
        assert (second.token_id, second.rank) == (first.token_id, first.rank)
        assert second.logprob == pytest.approx(first.logprob, abs=1e-5)


def test_a_cpu_has_nothing_to_overlap_with(model: tuple[Path, torch.nn.Module]) -> None:
    engine = engine_on(model[0])
    assert engine.executor.overlap_depth == 0
    engine.stop()


@pytest.mark.parametrize("depth", [0, 1])
def test_a_step_that_raises_is_reported_as_the_death_of_rank_0(
    model: tuple[Path, torch.nn.Module], depth: int
) -> None:
    executor = engine_on(model[0], overlap_depth=depth).executor

    def compute_a_row_that_is_not_there() -> None:
        executor.submit(StepPlan(0, [RowStep(10_000, 0, 1, True)]))
        executor.result()

    with pytest.raises(WorkerDied, match=r"rank 0 died: Traceback(.|\n)*IndexError"):
        compute_a_row_that_is_not_there()
    executor.stop()
    executor.stop()
    with pytest.raises(WorkerDied, match="it was stopped"):
        executor.submit(StepPlan(0, [RowStep(0, 0, 1, True)]))


def test_an_executor_that_was_not_started_says_so(model: tuple[Path, torch.nn.Module]) -> None:
    config = EngineConfig(model=str(model[0]))
    with pytest.raises(EngineError, match=r"call start\(\) first"):
        _ = InprocExecutor(config, read_spec(str(model[0]))).num_kv_blocks
