"""`headrace run` on the real engine and the shipped model: nothing lost, nothing twice, whatever dies."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests.cli.trees import kill_tree, wait_for
from tests.e2e.tree import DEMO, headrace, lines, mixed, read_rows, start, write_rows

#: A dead rank must be reported within this many seconds.
NOTICED_S = 10.0


@pytest.mark.slow
def test_the_demo_answers_at_least_80_percent_exactly_over_two_ray_ranks(tmp_path: Path) -> None:
    output = tmp_path / "demo.jsonl"
    result = headrace("demo", "-o", output)
    assert result.returncode == 0, result.stderr
    rows = read_rows(output)
    assert len(rows) == 200
    found = re.search(r"answered exactly +(\d+) of +200", result.stdout)
    assert found, result.stdout
    assert int(found[1]) >= 160, result.stdout
    log = (tmp_path / "demo.jsonl.headrace" / "engine.log").read_text()
    assert "state=ready" in log


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_5000_mixed_rows_survive_five_kills_of_the_whole_tree(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_rows(source, mixed(5000))
    rng = random.Random(5)
    words = ("run", source, "-o", output, "--model", DEMO, "--dtype", "float32", "--max-model-len", "256")
    for _ in range(5):
        process = start(*words)
        goal = lines(output) + rng.randint(50, 700)
        wait_for(partial(_reached, process, output, goal), 120)
        time.sleep(rng.random() / 2)
        if process.poll() is None:
            kill_tree(process)
    result = headrace(*words, timeout=400)
    assert result.returncode == 0, result.stderr
    rows = read_rows(output)
    assert sorted(rows) == sorted(f"r-{i}" for i in range(5000))
    assert all(row["error"] is None for row in rows.values())


@pytest.mark.slow
def test_a_killed_rank_is_reported_and_replaced_and_every_row_is_answered_once(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_rows(source, [
        {"custom_id": f"r-{i}", "prompt": f"What is {i} + 1?", "max_tokens": 60, "ignore_eos": True}
        for i in range(400)
    ])  # fmt: skip
    process = start(
        "run", source, "-o", output, "--model", DEMO, "--dtype", "float32", "--max-model-len", "256",
        "--tensor-parallel-size", "2",
    )  # fmt: skip
    wait_for(lambda: lines(output) >= 20 or process.poll() is not None, 120)
    assert process.poll() is None, process.communicate()[1]
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if _is_rank(p)]
    assert len(ranks) == 2
    os.kill(ranks[0].pid, signal.SIGKILL)
    killed = time.monotonic()
    log = tmp_path / "out.jsonl.headrace" / "engine.log"
    wait_for(lambda: "rank_died" in log.read_text(), 30)
    assert time.monotonic() - killed < NOTICED_S
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    rows = read_rows(output)
    assert sorted(rows) == sorted(f"r-{i}" for i in range(400))
    assert all(row["response"]["body"]["usage"]["completion_tokens"] == 60 for row in rows.values())


def _reached(process: subprocess.Popen[str], output: Path, goal: int) -> bool:
    return lines(output) >= goal or process.poll() is not None


def _is_rank(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[:1] == ["ray::RankProcess.run"]
    except psutil.NoSuchProcess:
        return False
