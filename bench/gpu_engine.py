"""Times the engine on a GPU: nano-vllm's workload on Qwen3's shapes with random weights, with and without
CUDA graphs, against transformers' continuous batching in the same run, and against the roofline.

`bench/gpu_check.py` runs it and says when to stop: what no longer fits is skipped, and a line says so.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import roofline
from bench.workloads import Row
from engine.config import EngineConfig, ModelSpec
from engine.engine import Engine
from engine.exec.inproc import InprocExecutor
from engine.models.registry import read_spec
from engine.request import Request, Sampling

QWEN3_06B = {
    "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
    "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "eos_token_id": 151645,
}  # fmt: skip
QWEN3_8B = QWEN3_06B | {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
    "tie_word_embeddings": False,
}  # fmt: skip
TINY = QWEN3_06B | {
    "vocab_size": 4003, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "eos_token_id": 2,
}  # fmt: skip
#: Rows of the workload, tokens of one step, and tokens that a row may have.
ROWS, STEP_TOKENS, ROW_TOKENS = 256, 8192, 2048


class PeerFailed(RuntimeError):
    """Another engine cannot be had here, or broke; the text says why."""


def nano_vllm(rows: int = ROWS, most: int = 1024, vocab: int = 10001) -> list[Row]:
    """The workload of nano-vllm's bench.py: prompts and outputs of 100 to 1024 tokens, seed 0, temperature
    0.6. In full: 142,827 prompt and 133,966 output tokens."""
    rng = random.Random(0)
    prompts = [[rng.randint(0, vocab - 1) for _ in range(rng.randint(100, most))] for _ in range(rows)]
    return [
        Row(p, {"temperature": 0.6, "seed": i, "max_tokens": rng.randint(100, most)})
        for i, p in enumerate(prompts)
    ]


def timings(folder: Path, device: torch.device, quick: bool, deadline: float) -> Iterator[dict[str, Any]]:
    """Rates of the machine, then each model and engine; `deadline` is of time.monotonic."""
    rates = roofline.measure(device, quick)
    yield {
        "timing": "machine", "copy_gb_per_s": round(rates.bytes / 1e9, 1),
        "gemm_tflop_per_s": round(rates.flop / 1e12, 2),
    }  # fmt: skip
    models = {"tiny": TINY} if quick else {"Qwen3-0.6B": QWEN3_06B, "Qwen3-8B": QWEN3_8B}
    rows = nano_vllm(6, 120, 4003) if quick else nano_vllm()
    for name, config in models.items():
        path = folder / name
        _write_config(path, config)
        best = roofline.seconds(config, [(len(r.prompt), r.sampling["max_tokens"]) for r in rows], rates)
        runs: dict[str, Callable[[], float]] = {
            "headrace": lambda path=path: ours(path, device, rows),
            "transformers continuous batching": lambda path=path: theirs(path, device, rows),
            "headrace without graphs": lambda path=path: ours(path, device, rows, enforce_eager=True),
        }
        took = best
        for engine, run in runs.items():
            line = {"timing": "nano-vllm workload", "model": f"{name} (random weights)", "engine": engine}
            # A run takes a few times the roofline at best, and so does loading.
            if time.monotonic() + 3 * took > deadline:
                yield line | {"skipped": "it would not fit into the time"}
                continue
            try:
                took = seconds = run()
            except PeerFailed as error:
                yield line | {"failed": str(error)}
                continue
            tokens = sum(r.sampling["max_tokens"] for r in rows)
            yield line | {
                "seconds": round(seconds, 3), "out_tok_s": round(tokens / seconds, 1),
                "share_of_roofline": round(best / seconds, 3), "roofline_s": round(best, 3),
            }  # fmt: skip


def ours(path: Path, device: torch.device, rows: Sequence[Row], **settings: Any) -> float:
    """Seconds of the engine core on `rows`, warmed up with other prompts."""
    engine, _ = start_engine(
        path, device, "bfloat16", max_model_len=ROW_TOKENS, load_format="dummy", max_num_seqs=len(rows),
        max_num_batched_tokens=STEP_TOKENS, **settings,
    )  # fmt: skip
    try:
        run(engine, _warm_up(rows))
        engine.reset_prefix_cache()
        began = time.perf_counter()
        run(engine, rows)
        return time.perf_counter() - began
    finally:
        engine.stop()
        del engine
        _free()


def theirs(path: Path, device: torch.device, rows: Sequence[Row]) -> float:
    """The same of transformers: continuous batching over SDPA, greedy (it has no seed of a request)."""
    import transformers

    if not hasattr(transformers, "ContinuousBatchingConfig"):
        raise PeerFailed(f"transformers {transformers.__version__} has no ContinuousBatchingConfig")
    config = transformers.AutoConfig.from_pretrained(path)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
    greedy = transformers.GenerationConfig(
        max_new_tokens=ROW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    batching = transformers.ContinuousBatchingConfig(
        max_batch_tokens=STEP_TOKENS, max_requests_per_batch=len(rows)
    )
    try:
        with model.continuous_batching_context_manager(
            generation_config=greedy, continuous_batching_config=batching
        ) as manager:
            _generate(manager, _warm_up(rows))
            began = time.perf_counter()
            _generate(manager, rows)
            return time.perf_counter() - began
    except (RuntimeError, TypeError, ValueError) as error:
        raise PeerFailed(f"transformers {transformers.__version__}: {error}") from error
    finally:
        del model
        _free()


def _generate(manager: Any, rows: Sequence[Row]) -> None:
    left = {manager.add_request(r.prompt, max_new_tokens=r.sampling["max_tokens"]) for r in rows}
    while left:
        result = manager.get_result(timeout=1)
        if result is not None and result.is_finished():
            if result.error:
                raise PeerFailed(f"transformers: {result.error}")
            left.discard(result.request_id)
        elif result is None and not manager.is_running():
            raise PeerFailed("transformers' generation thread has died")


def start_engine(path: Path, device: torch.device, dtype: str, **settings: Any) -> tuple[Engine, ModelSpec]:
    """An engine of one rank in this process; on a CPU with 1 GiB of KV cache."""
    spec = read_spec(str(path))
    config = EngineConfig(
        str(path), dtype=dtype, device=device.type, kv_cache_memory=1.0, num_threads=torch.get_num_threads(),
        **settings,
    )  # fmt: skip
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


def _warm_up(rows: Sequence[Row]) -> list[Row]:
    return [Row(r.prompt[::-1], r.sampling | {"max_tokens": 8}) for r in rows]


def _write_config(path: Path, config: dict[str, Any]) -> None:
    import transformers

    made = transformers.Qwen3Config(**config)
    made.architectures = ["Qwen3ForCausalLM"]
    made.save_pretrained(path)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
