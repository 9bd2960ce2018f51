"""vLLM as a contender: its offline `LLM` class, token ids in, token ids out, with the settings that its
documentation advises for CPUs (cores bound by `--bind`, tcmalloc and Intel's OpenMP preloaded)."""

from __future__ import annotations

import argparse
import glob
import os
import sys

from serve import Rows, own_stdout, serve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--bind", default=_cores(), help="VLLM_CPU_OMP_THREADS_BIND")
    args = parser.parse_args()
    _preload()
    out = own_stdout()
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = args.bind
    for name, value in (("CPU_KVCACHE_SPACE", "4"), ("LOGGING_LEVEL", "WARNING"), ("NO_USAGE_STATS", "1")):
        os.environ.setdefault(f"VLLM_{name}", value)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import vllm

    llm = vllm.LLM(
        model=args.model,
        skip_tokenizer_init=True,
        dtype=args.dtype,
        max_model_len=1024,
        max_num_seqs=args.max_num_seqs,
        tensor_parallel_size=args.tensor_parallel_size,
        seed=0,
    )

    def run(rows: Rows) -> list[list[int]]:
        sampling = [
            vllm.SamplingParams(
                temperature=0.0, max_tokens=r["max_tokens"], ignore_eos=True, detokenize=False
            )
            for r in rows
        ]
        done = llm.generate([{"prompt_token_ids": r["prompt"]} for r in rows], sampling, use_tqdm=False)
        return [list(d.outputs[0].token_ids) for d in done]

    about = {"name": "vllm", "version": vllm.__version__, "bind": args.bind, "preload": os.environ[PRELOADED]}
    serve(out, about, run, llm.reset_prefix_cache)


PRELOADED = "CONTENDER_PRELOADED"


def _cores() -> str:
    return ",".join(map(str, sorted(os.sched_getaffinity(0))))


def _preload() -> None:
    """Start again with the libraries preloaded, once."""
    if PRELOADED in os.environ:
        return
    patterns = ("/usr/lib/*/libtcmalloc_minimal.so.4", os.path.join(sys.prefix, "lib", "libiomp5.so"))
    found = [path for pattern in patterns for path in glob.glob(pattern)[:1]]
    os.environ.update(
        {"LD_PRELOAD": ":".join(found), PRELOADED: "+".join(map(os.path.basename, found)) or "none"}
    )
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    main()
