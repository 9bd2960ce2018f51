"""Checks the GPU code against its oracles, then times it; one JSON line per check and per timing.

Runs on a bare machine: torch, triton, transformers, safetensors and msgpack, without Ray, Redis or an
installed headrace. Checks come first: kernels against torch in float32, greedy ids against transformers,
each row alone against the batch; inputs are drawn from a fresh seed, which the first line names. A check
that fails ends with exit status 1, after the others have run. `--device cpu` runs the same script without
a GPU, on the attention of CPUs, to try the script itself.
"""

from __future__ import annotations

import argparse
import json
import platform
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # A script's own folder leads sys.path, and there its neighbour would pass for the package `engine`.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from bench import gpu_attention
from bench.workloads import Row, named, warm_up
from engine.config import EngineConfig, ModelSpec
from engine.engine import Engine
from engine.exec.inproc import InprocExecutor
from engine.models.registry import read_spec
from engine.request import Request, Sampling

#: Qwen3-0.6B's shape, for timings with random weights.
QWEN3_06B = {
    "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
    "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "eos_token_id": 151645,
}  # fmt: skip
TINY = QWEN3_06B | {
    "vocab_size": 4003, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "eos_token_id": 2,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("gpu_check: torch sees no GPU on this machine, so nothing was checked. "
              "`--device cpu` tries the script itself.", file=sys.stderr)  # fmt: skip
        return 1
    lines = [_emit({"environment": environment(device), "seed": args.seed})]
    with tempfile.TemporaryDirectory() as folder:
        checks = [gpu_attention.checks(device, args.seed), model_checks(Path(folder), device)]
        timings = [gpu_attention.timings(device, args.quick), engine_timings(Path(folder), device, args)]
        for part in checks if args.checks_only else checks + timings:
            lines += map(_emit, part)
    failed = [line["check"] for line in lines if line.get("ok") is False]
    lines.append(_emit({"checks": sum("ok" in line for line in lines), "failed": failed}))
    if args.output:
        Path(args.output).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return int(bool(failed))


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    return {
        "device": name, "torch": torch.__version__, "triton": triton_version, "cuda": torch.version.cuda,
    }  # fmt: skip


def model_checks(folder: Path, device: torch.device) -> Iterator[dict[str, Any]]:
    """Greedy ids in float32 against transformers; each row alone against the batch, greedy and seeded."""
    import transformers

    path = folder / "tiny"
    torch.manual_seed(0)
    reference = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TINY)).eval().to(device)
    with torch.no_grad():
        for parameter in reference.parameters():  # large enough that greedy ids vary
            parameter.normal_(float(parameter.dim() == 1), 0.3 if parameter.dim() == 1 else 0.15)
    reference.save_pretrained(path)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 4003, (n,), generator=generator).tolist() for n in (1, 7, 16, 40, 97, 200)]
    engine, _ = start_engine(path, device, "float32")
    try:
        batch = _generate(engine, prompts)
        wanted = [reference_ids(reference, p, device) for p in prompts]
        yield {"check": "greedy ids equal transformers'", "rows": len(prompts), "ok": batch == wanted}
        for temperature in (0.0, 1.0):
            together = _generate(engine, prompts, temperature)
            alone = [_generate(engine, [p], temperature, first=i)[0] for i, p in enumerate(prompts)]
            equal = sum(a == b for a, b in zip(alone, together, strict=True))
            line = {
                "check": f"alone or in a batch, temperature {temperature}",
                "equal rows": equal, "of": len(prompts),
            }  # fmt: skip
            # Promised on CPUs; on GPUs a product's order of summing may depend on its rows.
            yield line | ({"ok": equal == len(prompts)} if device.type == "cpu" else {})
    finally:
        engine.stop()


def engine_timings(folder: Path, device: torch.device, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """W1, W2 and W3 through the engine core, with random weights."""
    import transformers

    path = Path(args.model) if args.model else folder / "shape"
    if not args.model:
        config = transformers.Qwen3Config(**(TINY if args.quick else QWEN3_06B))
        config.architectures = ["Qwen3ForCausalLM"]
        config.save_pretrained(path)
    load_format = "safetensors" if args.model else "dummy"
    engine, spec = start_engine(path, device, "bfloat16", load_format=load_format)
    try:
        for workload in ("W1", "W2", "W3"):
            run(engine, warm_up(workload, spec.vocab_size))
            engine.reset_prefix_cache()
            rows = named(workload, spec.vocab_size)[: 8 if args.quick else None]
            steps, began = engine.stats.to_dict()["steps"], time.perf_counter()
            out = run(engine, rows)
            seconds = time.perf_counter() - began
            tokens = sum(map(len, out))
            yield {
                "timing": "engine", "workload": workload, "model": args.model or "dummy weights",
                "seconds": round(seconds, 3), "out_tok_s": round(tokens / seconds, 1),
                "total_tok_s": round((tokens + sum(len(r.prompt) for r in rows)) / seconds, 1),
                "steps": int(engine.stats.to_dict()["steps"] - steps),
                "overlap_depth": engine.executor.overlap_depth,
            }  # fmt: skip
    finally:
        engine.stop()


def start_engine(folder: Path, device: torch.device, dtype: str, **settings: Any) -> tuple[Engine, ModelSpec]:
    """An engine of one rank in this process, with room for 1,024 tokens a row."""
    spec = read_spec(str(folder))
    config = EngineConfig(
        str(folder), dtype=dtype, device=device.type, max_model_len=1024, kv_cache_memory=4.0, **settings
    )
    engine = Engine(config, spec, InprocExecutor(config, spec))
    engine.start()
    return engine, spec


def run(engine: Engine, rows: Sequence[Row]) -> list[list[int]]:
    """The output ids of each row, all submitted at once. Raises SystemExit when a row fails."""
    requests = [Request(str(i), r.prompt, Sampling(**r.sampling)) for i, r in enumerate(rows)]
    for request in requests:
        engine.add(request)
    engine.drain()
    failed = next((r for r in requests if r.error), None)
    if failed is not None:
        raise SystemExit(f"gpu_check: row {failed.id} failed: {failed.error}")
    return [r.output for r in requests]


def reference_ids(model: Any, prompt: list[int], device: torch.device) -> list[int]:
    """The 24 ids that transformers appends to a prompt, greedy."""
    ids = torch.tensor([prompt], device=device)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, min_new_tokens=24, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def _generate(
    engine: Engine, prompts: Sequence[list[int]], temperature: float = 0.0, first: int = 0
) -> list[list[int]]:
    """24 ids for each prompt; row i has seed first + i."""
    sampling = {"max_tokens": 24, "temperature": temperature}
    return run(engine, [Row(p, sampling | {"seed": first + i}) for i, p in enumerate(prompts)])


def _emit(line: dict[str, Any]) -> dict[str, Any]:
    print(json.dumps(line), flush=True)
    return line


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--model", metavar="DIR", help="time this checkpoint instead of random weights")
    parser.add_argument("--checks-only", action="store_true", help="no timings")
    parser.add_argument("--quick", action="store_true", help="small shapes: tries the timings, means nothing")
    parser.add_argument("--seed", type=int, default=secrets.randbits(31), help="of the checks' inputs")
    parser.add_argument("--output", metavar="FILE", help="write the lines there too (bench/results/...)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
