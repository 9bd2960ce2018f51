"""All GPU code together, in Triton's interpreter: recorded passes over paged Triton attention, fused
kernels and one-pass sampling give the ids of the CPU's own path. And `bench/gpu_check.py`'s kernel checks,
which are to run on a GPU first of all, pass where the kernels are right and fail where they are not.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from tests.engine.gpu.interpreter import DEVICE  # isort: skip
from bench import gpu_kernels
from engine.attn.triton_paged import TritonBackend
from engine.gpu import draw, elementwise
from engine.gpu import ops as gpu_ops
from engine.worker.graphs import DecodeGraphs
from tests.engine.gpu.test_graphs import Recorder, play
from tests.engine.model import drive, tiny

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="bench/gpu_check.py does this there")


def test_recorded_passes_over_triton_give_the_ids_of_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.build(tmp_path, "qwen3")
    expected = play(drive.Driver(drive.worker(tmp_path, sdpa=True, max_num_seqs=6), 64))

    monkeypatch.setattr(
        gpu_ops, "_kernels", lambda module, _: importlib.import_module(f"engine.gpu.{module}")
    )
    w = drive.worker(tmp_path, sdpa=True, max_num_seqs=6)
    w.attention = TritonBackend(w.attention.shape)
    w.allocate(64)
    for cache in (*w.attention.cache.k, *w.attention.cache.v):
        cache.fill_(float("nan"))
    recorder = Recorder()
    w.graphs = DecodeGraphs(w.model, w.attention, w.rows, w.config.block_size, recorder)
    assert play(drive.Driver(w, 64)) == expected
    assert len(recorder.replayed) == 30


def test_gpu_checks_kernel_checks_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter cuts bfloat16 off instead of rounding it.
    monkeypatch.setitem(gpu_kernels.TOLERANCE, torch.bfloat16, 3e-2)
    lines = list(gpu_kernels.checks(DEVICE, seed=5))
    assert len(lines) == 10
    assert all(line["ok"] for line in lines), lines


def test_gpu_checks_kernel_checks_fail_where_a_kernel_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = elementwise.silu_mul, draw.draw
    monkeypatch.setattr(gpu_kernels, "TOLERANCE", {torch.float32: 2e-6})
    monkeypatch.setattr(elementwise, "silu_mul", lambda gate, up: right[0](gate, up) * 1.0001)
    monkeypatch.setattr(draw, "draw", lambda logits, seeds, *rest: right[1](logits, seeds + 1, *rest))
    bad = [line["check"] for line in gpu_kernels.checks(DEVICE, seed=5) if not line["ok"]]
    assert bad == ["swiglu", "one-pass sampling draws the formula's ids"]
