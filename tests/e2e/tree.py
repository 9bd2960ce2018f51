"""`headrace` as a user starts it, on the shipped demo model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import orjson

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo_model"
HEADRACE = [sys.executable, "-m", "headrace.cli.main"]


def start(*words: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*HEADRACE, *map(str, words)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,
    )


def headrace(*words: str | Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    process = start(*words)
    out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def write_rows(path: Path, rows: list[dict[str, object] | bytes]) -> None:
    lines = (row if isinstance(row, bytes) else orjson.dumps(row) for row in rows)
    path.write_bytes(b"\n".join(lines) + b"\n")


def read_rows(path: Path) -> dict[str, dict]:
    """By custom_id; a row that is there twice fails the test."""
    rows: dict[str, dict] = {}
    for line in path.read_bytes().splitlines():
        row = orjson.loads(line)
        assert row["custom_id"] not in rows, f"{row['custom_id']} is there twice"
        rows[row["custom_id"]] = row
    return rows


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def mixed(n: int) -> list[dict[str, object] | bytes]:
    """Chats, completions, token ids and scores; greedy and sampled; short and long."""
    rows: list[dict[str, object] | bytes] = []
    for i in range(n):
        question = f"What is {i % 90} + {i % 7}?"
        row: dict[str, object] = {"custom_id": f"r-{i}", "max_tokens": 1 + i % 9, "temperature": float(i % 2)}
        if i % 4 == 0:
            row["messages"] = [{"role": "user", "content": question}]
        elif i % 4 == 1:
            row["prompt"] = question
        elif i % 4 == 2:
            row["prompt_token_ids"] = [1 + i % 1000, 5, 9]
        else:
            row = {"custom_id": f"r-{i}", "kind": "score", "prompt": question, "continuation": f" {i}"}
        rows.append(row)
    return rows
