"""Kernels are built once into a private folder; where that fails, the engine says why and uses torch."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.attn.base import AttnShape, choose
from engine.cpu import build, kernels, ops

SHAPE = AttnShape(4, 2, 64, 16, (None,), torch.float32, torch.device("cpu"))
needs_compiler = pytest.mark.skipif(build.library()[0] is None, reason=f"no kernels: {build.library()[1]}")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """An empty cache folder, and no library loaded yet; the process's own comes back afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    kernels.kernel.cache_clear()
    yield
    build.library.cache_clear()
    kernels.kernel.cache_clear()


@needs_compiler
def test_the_library_is_private_built_once_and_then_found(tmp_path):
    assert build.library()[0] is not None
    folder = tmp_path / "headrace"
    assert folder.stat().st_mode & 0o777 == 0o700
    (made,) = folder.iterdir()
    before = made.stat().st_mtime_ns
    build.library.cache_clear()
    assert build.library()[0] is not None
    assert [p.stat().st_mtime_ns for p in folder.iterdir()] == [before]


def test_without_a_compiler_the_reason_is_logged_and_torch_does_the_work(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        backend, reason = choose(SHAPE)
    assert backend.name == "sdpa"
    assert "no C++ compiler 'no-such-compiler'" in reason
    assert "cpu_kernels_unavailable" in caplog.text
    assert ops.rms_norm(torch.randn(2, 64), torch.ones(64), 1e-6) is None


def test_a_compiler_that_fails_is_named_with_its_message(monkeypatch, tmp_path):
    broken = tmp_path / "broken-cxx"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo broken 1.0 && exit\necho no such flag >&2; exit 1\n'
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    built, reason = build.library()
    assert built is None
    assert "broken-cxx" in reason
    assert reason.endswith("failed: no such flag")
    assert list((tmp_path / "headrace").iterdir()) == []


def test_a_folder_that_others_may_write_is_refused(tmp_path):
    (tmp_path / "headrace").mkdir(mode=0o777)
    (tmp_path / "headrace").chmod(0o777)
    built, reason = build.library()
    assert built is None
    assert "could be written by others" in reason


@needs_compiler
def test_processes_that_build_at_once_all_get_a_whole_library(tmp_path):
    code = "from engine.cpu.build import library; assert library()[0] is not None, library()[1]"
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    jobs = [subprocess.Popen([sys.executable, "-c", code], env=env) for _ in range(2)]
    assert [job.wait(timeout=200) for job in jobs] == [0, 0]
    assert len(list((tmp_path / "headrace").iterdir())) == 1
