"""The comparison runs real contenders by turns; the README's table is what its results say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import table

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = ROOT / "examples" / "demo_model"


def test_contenders_take_turns_on_a_workload_file_and_ratios_are_of_medians(tmp_path: Path) -> None:
    rows = [{"prompt_token_ids": [5 + i, 9, 300], "max_tokens": 4 + i, "ignore_eos": True} for i in range(3)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    done = subprocess.run(
        [
            sys.executable, ROOT / "bench" / "compare.py", "--model", MODEL, "--rounds", "2",
            "--workload-file", tmp_path / "rows.json", "--variant", "one row=--max-num-seqs 1",
            "--output", tmp_path / "out.json",
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert json.loads((tmp_path / "out.json").read_text()) == report
    assert list(report["contenders"]) == ["headrace", "one row"]
    turns = [line.split()[1] for line in done.stderr.splitlines() if line.startswith(str(tmp_path))]
    assert turns == ["headrace:", "one", "one", "headrace:"]
    for line in report["results"]:
        assert len(line["seconds"]) == 2
        assert line["equal_first_tokens"] == 1.0
        assert line["out_tok_s"] == pytest.approx((4 + 5 + 6) / line["median_s"], rel=0.2)


def test_a_peer_that_does_not_exist_is_named() -> None:
    done = subprocess.run(
        [
            sys.executable, ROOT / "bench" / "compare.py", "--model", MODEL, "--workload", "W1",
            "--peer", "nobody=/bin/python",
        ],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "--peer nobody=/bin/python is not NAME=PYTHON with NAME one of hf_static, vllm_cpu" in done.stderr


def test_the_readme_shows_the_results() -> None:
    assert table.table() in table.README.read_text(), "run `python bench/table.py`"


def test_the_table_quotes_medians_and_ratios() -> None:
    line = {"workload": "W1", "median_s": 40.0, "out_tok_s": 102.4, "headrace_is_faster_by": 1.0}
    report = {
        "model": "m", "dtype": "bfloat16", "cores": 2, "cpu": "c", "rounds": 3,
        "contenders": {"headrace": {"version": "1"}, "vllm_cpu": {"version": "9"}},
        "results": [
            line | {"contender": "headrace"},
            line | {"contender": "vllm_cpu", "median_s": 50.0, "headrace_is_faster_by": 1.25},
        ],
    }  # fmt: skip
    text = table.comparison(report)
    assert "| workload | headrace | vLLM 9 |" in text
    assert "| 40.0 s, 102 tok/s | 50.0 s: headrace is 1.25 x as fast |" in text
