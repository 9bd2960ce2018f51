"""headrace's engine core as a contender: no queue, no text. Flags are those of `bench/engine.py`."""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from bench.contenders.serve import Rows, own_stdout, serve
from bench.workloads import Row
from engine.config import EngineConfig
from engine.engine import Engine
from engine.models.registry import read_spec
from engine.request import Request, Sampling
from engine.service import build_executor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--quantization", choices=("int8",))
    parser.add_argument("--max-num-seqs", type=int, default=64)
    args = parser.parse_args()
    out = own_stdout()
    config = EngineConfig(
        model=args.model,
        dtype=args.dtype,
        quantization=args.quantization,
        tensor_parallel_size=args.tensor_parallel_size,
        executor="inproc" if args.tensor_parallel_size == 1 else "ray",
        max_model_len=1024,
        max_num_seqs=args.max_num_seqs,
        kv_cache_memory=2.0,  # 64 rows of W1 to W3 need half of it
    )
    spec = read_spec(args.model)
    engine = Engine(config, spec, build_executor(config, spec))
    report = engine.start()[0]

    def run(rows: Rows) -> list[list[int]]:
        requests = [
            Request(str(i), row.prompt, Sampling(**row.sampling))
            for i, row in enumerate(Row(r["prompt"], _greedy(r["max_tokens"])) for r in rows)
        ]
        for request in requests:
            engine.add(request)
        engine.drain()
        return [r.output for r in requests]

    about = {"name": "headrace", "version": "0.1.0", "attention": report.attention}
    try:
        serve(out, about, run, engine.reset_prefix_cache)
    finally:
        engine.stop()


def _greedy(max_tokens: int) -> dict[str, float | int]:
    return {"temperature": 0.0, "max_tokens": max_tokens}


if __name__ == "__main__":
    main()
