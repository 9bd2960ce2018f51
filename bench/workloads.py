"""The three workloads as token ids. The same name, vocabulary and seed give the same ids everywhere.

W1 is bulk generation (64 prompts of 32 to 256 tokens, 64 out), W2 is decode-heavy (64 prompts of 32, 128
out), W3 is an eval (64 prompts that share their first 512 tokens, 8 out). Knows nothing of engines.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("W1", "W2", "W3")
ROWS = 64
#: The seed of the timed run, and the one whose prompts warm an engine up.
TIMED, WARM = 1234, 99


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt, and how to sample after it (fields of `engine.request.Sampling`)."""

    prompt: list[int]
    sampling: dict[str, Any] = field(default_factory=dict)
    ignore_eos: bool = True


def named(name: str, vocab: int, seed: int = TIMED) -> list[Row]:
    """W1, W2 or W3 for a vocabulary of `vocab` ids, greedy. Raises ValueError for another name."""
    rng = random.Random(f"{name}-{seed}")
    if name == "W1":
        lengths = [random.Random(f"len-{seed}-{i}").randint(32, 256) for i in range(ROWS)]
        prompts, out = [_ids(rng, n, vocab) for n in lengths], 64
    elif name == "W2":
        prompts, out = [_ids(rng, 32, vocab) for _ in range(ROWS)], 128
    elif name == "W3":
        shared = _ids(rng, 512, vocab)
        prompts, out = [shared + _ids(rng, 32, vocab) for _ in range(ROWS)], 8
    else:
        raise ValueError(f"workload {name!r} is not one of {', '.join(NAMES)}")
    return [Row(p, {"temperature": 0.0, "max_tokens": out}) for p in prompts]


def warm_up(name: str, vocab: int, tokens: int = 4) -> list[Row]:
    """Other prompts of the same shape, a few tokens each."""
    return [Row(r.prompt, r.sampling | {"max_tokens": tokens}) for r in named(name, vocab, WARM)]


def from_file(path: str | Path) -> list[Row]:
    """A JSON list of {"prompt_token_ids": [...], "max_tokens": n, "ignore_eos": true, ...sampling fields}.

    Greedy unless a row says otherwise.
    """
    rows = []
    for raw in json.loads(Path(path).read_text()):
        prompt, ignore = raw.pop("prompt_token_ids"), raw.pop("ignore_eos", False)
        rows.append(Row(prompt, {"temperature": 0.0} | raw, ignore))
    return rows


def reversed_prompts(rows: list[Row], tokens: int = 4) -> list[Row]:
    """The warm-up for a workload file: its prompts backwards, a few tokens each."""
    return [
        Row(r.prompt[::-1], r.sampling | {"max_tokens": min(tokens, r.sampling.get("max_tokens", tokens))})
        for r in rows
    ]


def _ids(rng: random.Random, count: int, vocab: int) -> list[int]:
    # Clear of low ids, which are special tokens in most vocabularies, and inside every test vocabulary.
    return [rng.randrange(100, min(vocab, 31000)) for _ in range(count)]
