"""The same file gives the same tokens on one rank and on two, greedy and sampled with a seed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.tree import DEMO, headrace, read_rows, write_rows


@pytest.mark.slow
def test_one_rank_and_two_ray_ranks_give_the_same_tokens(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    write_rows(source, [
        {"custom_id": f"r-{i}", "prompt": f"What is {i} + {i}?", "max_tokens": 12, "return_token_ids": True,
         "temperature": float(i % 2), "seed": i, "ignore_eos": True}
        for i in range(64)
    ])  # fmt: skip
    found = []
    for ranks in ("1", "2"):
        output = tmp_path / f"out-{ranks}.jsonl"
        result = headrace(
            "run", source, "-o", output, "--model", DEMO, "--dtype", "float32", "--max-model-len", "128",
            "--tensor-parallel-size", ranks,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        rows = read_rows(output)
        found.append({k: row["response"]["body"]["choices"][0]["token_ids"] for k, row in rows.items()})
    assert len(found[0]) == 64
    assert all(len(ids) == 12 for ids in found[0].values())
    assert found[0] == found[1]
