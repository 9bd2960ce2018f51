"""A whole model on the Triton kernels computes what it does on torch and SDPA."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from tests.engine.gpu.interpreter import DEVICE  # isort: skip
from engine.attn.triton_paged import TritonBackend
from engine.cpu import ops as cpu_ops
from engine.gpu import ops as gpu_ops
from tests.engine.model import drive, tiny

pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda", reason="bench/gpu_check.py compares whole models there"
)


@pytest.mark.parametrize("family", ["qwen3", "llama", "mistral", "qwen1"])
def test_logits_equal_torch_on_sdpa(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and decoding rows side by side, past Qwen-1's trained length and Mistral's window."""
    if family == "qwen1":
        tiny.build_qwen1(tmp_path)
    else:
        tiny.build(tmp_path, family)
    results = []
    for kernels in (False, True):
        w = drive.worker(tmp_path, sdpa=True)
        if kernels:
            for name in ("rms_norm", "rotate", "silu_mul"):
                monkeypatch.setattr(cpu_ops, name, lambda *_: None)
            monkeypatch.setattr(
                gpu_ops, "_kernels", lambda module, device: importlib.import_module(f"engine.gpu.{module}")
            )
            w.attention = TritonBackend(w.attention.shape)
            w.allocate(64)
        driver = drive.Driver(w, 64)
        driver.enter(0, tiny.prompt(40))
        driver.enter(1, tiny.prompt(9, seed=2))
        logits = [w.probe(driver.plan({0: 21, 1: 8})), w.probe(driver.plan({0: 19, 1: 1}))]
        for row in (0, 1):
            driver.tokens[row].append(7)
        logits.append(w.probe(driver.plan({0: 1, 1: 1})))
        results.append(torch.cat(logits))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)
