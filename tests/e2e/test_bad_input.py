"""Each bad input gives one clear error row, or one clear line before anything starts; the rest goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.e2e.tree import DEMO, headrace, write_rows

LIMIT = 10 << 20

#: What is wrong -> (a row, code of its error). Rows without custom_id in them are named by their line.
BAD_ROWS: dict[str, tuple[dict[str, object] | bytes, str]] = {
    "malformed JSON": (b'{"custom_id": "x", "prompt": ', "invalid_json"),
    "unknown field": ({"prompt": "a", "colour": 1}, "unknown_field"),
    "wrong type": ({"prompt": "a", "max_tokens": "many"}, "invalid_job"),
    "empty prompt": ({"prompt": ""}, "empty_prompt"),
    "prompt too long": ({"prompt_token_ids": [5] * 3000}, "prompt_too_long"),
    "max_tokens cannot fit": ({"prompt": "a", "max_tokens": 5000}, "max_tokens_too_large"),
    "NaN temperature": (b'{"prompt": "a", "temperature": NaN}', "invalid_json"),
    "negative temperature": ({"prompt": "a", "temperature": -1.0}, "invalid_job"),
    "n = 0": ({"prompt": "a", "n": 0}, "invalid_job"),
    "n = 10,000": ({"prompt": "a", "n": 10_000}, "invalid_job"),
    "100,000 stop strings": ({"prompt": "a", "stop": ["s"] * 100_000}, "invalid_job"),
    "lone surrogate": (b'{"prompt": "a\\ud800b"}', "invalid_json"),
    "token id out of range": ({"prompt_token_ids": [1, 10**6]}, "token_out_of_range"),
    "negative token id": ({"prompt_token_ids": [-1]}, "invalid_job"),
    "10 MB of one character": ({"prompt": "a" * LIMIT}, "line_too_long"),
}


def test_bad_rows_end_as_one_error_each_and_good_rows_are_answered(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows: list[dict[str, object] | bytes] = [row for row, _ in BAD_ROWS.values()]
    good: list[dict[str, object] | bytes] = [
        {"custom_id": "good", "prompt": "What is 1 + 2?", "max_tokens": 4},
        {"custom_id": "nul", "prompt": "a\0b", "max_tokens": 4},
        {"custom_id": "good", "prompt": "the same custom_id again"},
    ]
    write_rows(source, [*rows, *good])
    result = headrace("run", source, "-o", output, "--model", DEMO)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    found: dict[str, list[str]] = {}
    lines = output.read_bytes().splitlines()
    for row in map(json.loads, lines):
        found.setdefault(row["custom_id"], []).append(row["error"]["code"] if row["error"] else "ok")
    assert sorted(found.pop("good")) == ["duplicate_custom_id", "ok"]
    assert found.pop("nul") == ["ok"]
    wanted = {f"row-{i}": [code] for i, (_, code) in enumerate(BAD_ROWS.values(), start=1)}
    assert found == wanted
    assert len(lines) == len(rows) + len(good)


def _copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


def _edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def _tensors(folder: Path, change: str) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        tensors["model.layers.1.mlp.fourth_proj.weight"] = tensors[name].clone()
    else:
        tensors[name] = tensors[name][:, 1:].contiguous()
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("no folder", ["there is no such folder"]),
        ("missing tensor", ["model.layers.1.mlp.up_proj.weight"]),
        ("extra tensor", ["model.layers.1.mlp.fourth_proj.weight"]),
        ("wrong shape", ["model.layers.1.mlp.up_proj.weight"]),
        ("pickle only", ["safetensors"]),
        ("heads", ["Total number of attention heads (4) must be divisible by tensor parallel size (3)."]),
        ("no KV room", ["--kv-cache-memory"]),
        ("unknown architecture", ["MambaForCausalLM"]),
        ("no redis", ["cannot reach Redis"]),
        ("no output folder", ["does not exist"]),
    ],
)
def test_a_run_that_cannot_be_done_says_why_in_one_line(
    tmp_path: Path, change: str, words: list[str]
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_rows(source, [{"prompt": "a"}])
    model, more = _copy(tmp_path), []
    if change == "no folder":
        model = tmp_path / "nowhere"
    elif change.endswith("tensor") or change == "wrong shape":
        _tensors(model, change.split()[0])
    elif change == "pickle only":
        (model / "model.safetensors").rename(model / "pytorch_model.bin")
    elif change == "heads":
        more = ["--tensor-parallel-size", "3"]
    elif change == "no KV room":
        more = ["--kv-cache-memory", "0.000001"]
    elif change == "unknown architecture":
        _edit(model, architectures=["MambaForCausalLM"])
    elif change == "no redis":
        more = ["--redis", "redis://127.0.0.1:1/0"]
    else:
        output = tmp_path / "nowhere" / "out.jsonl"
    result = headrace("run", source, "-o", output, "--model", model, *more)
    assert result.returncode == 1, (result.stdout, result.stderr)
    errors = [line for line in result.stderr.splitlines() if line.startswith("headrace: error: ")]
    assert len(errors) == 1, result.stderr
    for word in words:
        assert word in errors[0]
    assert "Traceback" not in result.stderr
