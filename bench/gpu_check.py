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

from bench import gpu_attention, gpu_engine, gpu_kernels
from bench.gpu_engine import TINY, run, start_engine
from bench.workloads import Row
from engine.engine import Engine


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("gpu_check: torch sees no GPU on this machine, so nothing was checked. "
              "`--device cpu` tries the script itself.", file=sys.stderr)  # fmt: skip
        return 1
    began = time.monotonic()
    lines = [_emit({"environment": environment(device), "seed": args.seed})]
    with tempfile.TemporaryDirectory() as folder:
        checks = [
            gpu_attention.checks(device, args.seed), gpu_kernels.checks(device, args.seed),
            model_checks(Path(folder), device),
        ]  # fmt: skip
        timings = [
            gpu_attention.timings(device, args.quick),
            gpu_engine.timings(Path(folder), device, args.quick, began + 60 * args.minutes),
        ]
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
    engine, _ = start_engine(path, device, "float32", max_model_len=1024)
    try:
        batch = _generate(engine, prompts)
        wanted = [reference_ids(reference, p, device) for p in prompts]
        yield {"check": "greedy ids equal transformers'", "rows": len(prompts), "ok": batch == wanted}
        sampled = _generate(engine, prompts, 1.0)
        for temperature, together in ((0.0, batch), (1.0, sampled)):
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
    if device.type == "cuda":
        engine, _ = start_engine(path, device, "float32", max_model_len=1024, enforce_eager=True)
        eager = [_generate(engine, prompts, temperature) for temperature in (0.0, 1.0)]
        engine.stop()
        yield {"check": "CUDA graphs give the ids of ordinary launches", "ok": eager == [batch, sampled]}


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
    parser.add_argument("--checks-only", action="store_true", help="no timings")
    parser.add_argument("--quick", action="store_true", help="small shapes: tries the timings, means nothing")
    parser.add_argument("--minutes", type=float, default=8, help="timings that would end later are skipped")
    parser.add_argument("--seed", type=int, default=secrets.randbits(31), help="of the checks' inputs")
    parser.add_argument("--output", metavar="FILE", help="write the lines there too (bench/results/...)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
