"""Times the engine core on one workload, from the first submit to the last completion; one JSON line.

Token ids in, token ids out: no queue, no text. The engine is warmed up with other prompts of the same
shape, and its prefix cache is emptied before the clock starts.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# A script's own folder leads sys.path, and there this file would pass for the package `engine`.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench.contenders.serve import peak_rss_mb
from bench.workloads import NAMES, Row, from_file, named, reversed_prompts, warm_up
from engine.config import EngineConfig, ModelSpec
from engine.engine import Engine
from engine.errors import EngineError
from engine.models.registry import read_spec
from engine.request import Request, Sampling
from engine.service import build_executor


def main() -> None:
    args = _arguments()
    try:
        config, spec = _config(args), read_spec(args.model)
        engine = Engine(config, spec, build_executor(config, spec))
        reports = engine.start()
    except EngineError as error:
        raise SystemExit(f"bench/engine.py: {error}") from error
    try:
        if args.workload:
            rows, warm = named(args.workload, spec.vocab_size), warm_up(args.workload, spec.vocab_size)
        else:
            rows = from_file(args.workload_file)
            warm = reversed_prompts(rows)
        run(engine, spec, warm)
        for _ in range(args.repeat):
            engine.reset_prefix_cache()
            print(
                json.dumps(_timed(engine, spec, rows, args) | {"attention": reports[0].attention}), flush=True
            )
    finally:
        engine.stop()


def run(engine: Engine, spec: ModelSpec, rows: list[Row]) -> list[list[int]]:
    """The output ids of each row, all submitted at once. Raises SystemExit when a row fails."""
    requests = [
        Request(
            str(i),
            r.prompt,
            Sampling(stop_token_ids=() if r.ignore_eos else spec.eos_token_ids, **r.sampling),
        )
        for i, r in enumerate(rows)
    ]
    for request in requests:
        engine.add(request)
    engine.drain()
    failed = next((r for r in requests if r.error), None)
    if failed is not None:
        raise SystemExit(f"bench/engine.py: row {failed.id} failed: {failed.error}")
    return [r.output for r in requests]


def _timed(engine: Engine, spec: ModelSpec, rows: list[Row], args: argparse.Namespace) -> dict[str, Any]:
    before = engine.stats.to_dict()
    began = time.perf_counter()
    ids = run(engine, spec, rows)
    seconds = time.perf_counter() - began
    after = engine.stats.to_dict()
    if args.dump:
        Path(args.dump).write_text(json.dumps(ids))

    def done(name: str) -> float:
        return after[name] - before[name]

    out, prompt = sum(map(len, ids)), sum(len(r.prompt) for r in rows)
    asked = done("prefix_query_tokens")
    return {
        "engine": "headrace",
        "model": os.path.basename(os.path.normpath(args.model)),
        "workload": args.workload or os.path.basename(args.workload_file),
        "dtype": args.dtype,
        "quantization": args.quantization,
        "tensor_parallel_size": args.tensor_parallel_size,
        "executor": engine.config.executor,
        "seconds": round(seconds, 3),
        "out_tok_s": round(out / seconds, 1),
        "total_tok_s": round((out + prompt) / seconds, 1),
        "peak_rss_mb": round(peak_rss_mb()),
        "steps": int(done("steps")),
        "prefix_hit_rate": round(done("prefix_hit_tokens") / asked, 4) if asked else 0.0,
        "preemptions": int(done("preemptions")),
        "scheduling_s": round(done("scheduling_s"), 3),
    }


def _config(args: argparse.Namespace) -> EngineConfig:
    executor = args.executor or ("inproc" if args.tensor_parallel_size == 1 else "ray")
    return EngineConfig(
        model=args.model,
        dtype=args.dtype,
        quantization=args.quantization,
        executor=executor,
        tensor_parallel_size=args.tensor_parallel_size,
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        kv_cache_memory=args.kv_cache_memory,
        lookahead=args.lookahead,
        enable_prefix_caching=not args.no_enable_prefix_caching,
        device=args.device,
        load_format=args.load_format,
        num_threads=args.num_threads,
    )


def _arguments() -> argparse.Namespace:
    defaults = EngineConfig(model="")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, metavar="DIR")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--workload", choices=NAMES)
    what.add_argument("--workload-file", metavar="FILE")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N")
    parser.add_argument("--executor", choices=("inproc", "ray"), help="default: ray above one rank")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", choices=("int8",))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--load-format", default="safetensors", choices=("safetensors", "dummy"))
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--max-num-seqs", type=int, default=defaults.max_num_seqs)
    parser.add_argument("--max-num-batched-tokens", type=int, default=defaults.max_num_batched_tokens)
    parser.add_argument("--lookahead", type=int, default=defaults.lookahead, metavar="N")
    parser.add_argument("--kv-cache-memory", type=float, default=4.0, metavar="GIB")
    parser.add_argument("--no-enable-prefix-caching", action="store_true")
    parser.add_argument("--num-threads", type=int, help="CPU threads per rank")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="time it N times, a line each")
    parser.add_argument("--dump", metavar="FILE", help="write the output ids, a JSON list of lists")
    return parser.parse_args()


if __name__ == "__main__":
    main()
