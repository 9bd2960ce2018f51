"""Every rope rule equals transformers' own, or for Qwen-1 its published formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.config import EngineConfig
from engine.engine import Engine
from engine.exec.inproc import InprocExecutor
from engine.models.registry import read_spec
from engine.models.rope import Rope, rotate
from engine.request import Request, Sampling
from tests.engine.model import drive, qwen1, tiny

CPU = torch.device("cpu")
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-mscale": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7,
                    "mscale_all_dim": 0.3, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    "yarn-factor": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
                    "attention_factor": 1.3},
}  # fmt: skip


@pytest.mark.parametrize("theta", [10_000.0, 1e6])
@pytest.mark.parametrize("name", SCALINGS)
def test_static_rules_equal_transformers(tmp_path: Path, name: str, theta: float) -> None:
    config = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=256,
        architectures=["LlamaForCausalLM"],
        rope_parameters={"rope_theta": theta, **SCALINGS[name]},
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    positions = torch.arange(256)
    cos, sin = Rope(read_spec(tmp_path), 256, CPU).angles(positions, torch.ones_like(positions))
    expected_cos, expected_sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    torch.testing.assert_close(cos[:, 0], expected_cos[0, :, :32], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(sin[:, 0], expected_sin[0, :, :32], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("prompt_len", [20, 64, 65, 130])
def test_dynamic_ntk_equals_transformers_generate(tmp_path: Path, prompt_len: int) -> None:
    """One forward pass for the prompt, then one token at a time past the trained length."""
    model = tiny.build(
        tmp_path, "llama", max_position_embeddings=64,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    )  # fmt: skip
    prompt = tiny.prompt(prompt_len)
    with torch.no_grad():
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=60, do_sample=False, eos_token_id=None
        )
    driver = drive.Driver(drive.worker(tmp_path), 64)
    driver.enter(0, prompt)
    assert driver.generate(0, 16, 60) == expected[0, prompt_len:].tolist()


@pytest.mark.parametrize("prompt_len", [5, 32, 33, 64, 65, 129])
def test_qwen1_ntk_follows_the_prompts_length(tmp_path: Path, prompt_len: int) -> None:
    reference = tiny.build_qwen1(tmp_path, seed=2)
    alpha = reference.ntk_alpha(prompt_len)
    assert alpha == {5: 1, 32: 1, 33: 3, 64: 3, 65: 7, 129: 15}[prompt_len]
    base = qwen1.CONFIG["rotary_emb_base"] * alpha ** (16 / 14)
    angles = torch.outer(torch.arange(200).float(), 1.0 / base ** (torch.arange(0, 16, 2).float() / 16))
    cos, sin = Rope(read_spec(tmp_path), 512, CPU).angles(torch.arange(200), torch.full((200,), prompt_len))
    torch.testing.assert_close(cos[:, 0], angles.cos(), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(sin[:, 0], angles.sin(), rtol=1e-5, atol=2e-5)


def test_qwen1_rows_of_different_length_share_a_batch(tmp_path: Path) -> None:
    """Each keeps its own alpha while it decodes, also across its trained length and after preemption."""
    reference = tiny.build_qwen1(tmp_path)
    prompts = {0: tiny.prompt(28), 1: tiny.prompt(40, seed=3), 2: tiny.prompt(70, seed=4)}
    driver = drive.Driver(drive.worker(tmp_path), 64)
    for row, prompt in prompts.items():
        driver.enter(row, prompt)
    driver.run({0: 28, 1: 10, 2: 64})
    driver.run({0: 1, 1: 30, 2: 6})
    for _ in range(6):
        driver.run({0: 1, 1: 1, 2: 1})
    preempted = driver.leave(0)
    assert len(preempted) > qwen1.CONFIG["seq_length"] >= 28
    driver.enter(0, preempted, prompt_len=28)
    driver.run({0: len(preempted), 1: 1, 2: 1})
    for _ in range(5):
        driver.run({0: 1, 1: 1, 2: 1})
    for row, prompt in prompts.items():
        got = driver.tokens[row][len(prompt) :]
        assert got == reference.generate(prompt, len(got)), f"row {row}"


def test_the_prefix_cache_never_mixes_rotations(tmp_path: Path) -> None:
    """Prompts with a common beginning on both sides of the trained length, one after the other."""
    reference = tiny.build_qwen1(tmp_path)
    config = EngineConfig(str(tmp_path), num_kv_blocks=64, block_size=4, num_threads=1)
    engine = Engine(config, read_spec(tmp_path), InprocExecutor(config, read_spec(tmp_path)))
    engine.start()
    long = tiny.prompt(70)
    for i, length in enumerate((28, 50, 70, 30, 60)):
        request = Request(f"r{i}", long[:length], Sampling(max_tokens=6, temperature=0.0))
        engine.add(request)
        while engine.has_work:
            engine.step()
        assert request.output == reference.generate(long[:length], 6), f"prompt of {length}"
    assert request.cached >= 48, "prompts of equal rotation still share"
    engine.stop()


def test_partial_rotation_leaves_the_other_dimensions_alone() -> None:
    x = torch.randn(3, 2, 16)
    angle = torch.randn(3, 1, 4)
    y = rotate(x, angle.cos(), angle.sin())
    assert torch.equal(y[..., 8:], x[..., 8:])
    pairs = torch.complex(x[..., :4], x[..., 4:8]) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(y[..., :8], torch.cat([pairs.real, pairs.imag], -1))
