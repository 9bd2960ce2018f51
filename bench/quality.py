"""What `--quantization` costs in quality: perplexity on texts, and greedy agreement, against the same model
without it; one JSON line each.

    python bench/quality.py --model DIR README.md docs/*.md engine/engine.py

Texts are cut into pieces of `--length` tokens, each scored from its second token on. Greedy agreement is
the share of `--tokens` continuations of each piece's first half that are equal, token by token, until the
first that differs, and the share of equal next tokens at every position of the texts (teacher forcing).
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

# A script's own folder leads sys.path, and there a neighbour would pass for the package `engine`.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tokenizers import Tokenizer

from engine.config import EngineConfig
from engine.engine import Engine
from engine.exec.inproc import InprocExecutor
from engine.models.registry import read_spec
from engine.request import Request, Sampling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", default="int8")
    parser.add_argument("--length", type=int, default=256, help="tokens of a piece")
    parser.add_argument("--pieces", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48, help="tokens of a greedy continuation")
    parser.add_argument("texts", nargs="+", type=Path)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(Path(args.model) / "tokenizer.json"))
    ids = [i for text in args.texts for i in tokenizer.encode(text.read_text()).ids]
    pieces = [ids[at : at + args.length] for at in range(0, len(ids) - args.length, args.length)]
    pieces = pieces[:: max(1, len(pieces) // args.pieces)][: args.pieces]
    found = {name: measure(args, name, pieces) for name in (None, args.quantization)}
    base, rounded = found[None], found[args.quantization]
    print(json.dumps({
        "model": Path(args.model).name, "dtype": args.dtype, "quantization": args.quantization,
        "tokens": sum(len(p) - 1 for p in pieces),
        "perplexity": round(base["perplexity"], 3), "perplexity_quantized": round(rounded["perplexity"], 3),
        "next_token_agreement": _share(base["best"], rounded["best"]),
        "greedy_tokens_until_different": _until_different(base["greedy"], rounded["greedy"]),
        "greedy_tokens": args.tokens,
    }))  # fmt: skip


def measure(args: argparse.Namespace, quantization: str | None, pieces: list[list[int]]) -> dict[str, Any]:
    """Perplexity, the most likely token at each position, and greedy continuations."""
    spec = read_spec(args.model)
    config = EngineConfig(
        model=args.model, dtype=args.dtype, quantization=quantization, max_model_len=2 * args.length,
        kv_cache_memory=1.0,
    )  # fmt: skip
    engine = Engine(config, spec, InprocExecutor(config, spec))
    engine.start()
    try:
        scored = _run(engine, pieces, Sampling(temperature=0.0, max_tokens=1, prompt_logprobs=1))
        halves = [p[: args.length // 2] for p in pieces]
        greedy = _run(engine, halves, Sampling(temperature=0.0, max_tokens=args.tokens))
    finally:
        engine.stop()
    logprobs = [r.prompt_logprobs[i] for r in scored for i in range(1, len(r.prompt))]
    return {
        "perplexity": math.exp(-sum(t.logprob for t in logprobs) / len(logprobs)),
        "best": [t.top[0][0] for t in logprobs],
        "greedy": [r.output for r in greedy],
    }


def _run(engine: Engine, prompts: list[list[int]], sampling: Sampling) -> list[Request]:
    requests = [Request(str(i), prompt, sampling) for i, prompt in enumerate(prompts)]
    for request in requests:
        engine.add(request)
    engine.drain()
    return requests


def _share(a: list[int], b: list[int]) -> float:
    return round(sum(x == y for x, y in zip(a, b, strict=True)) / len(a), 4)


def _until_different(a: list[list[int]], b: list[list[int]]) -> float:
    """The mean number of equal tokens before the first that differs."""
    equal = [
        next((i for i, pair in enumerate(zip(x, y, strict=True)) if pair[0] != pair[1]), len(x))
        for x, y in zip(a, b, strict=True)
    ]
    return round(sum(equal) / len(equal), 1)


if __name__ == "__main__":
    main()
