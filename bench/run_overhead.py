"""What the queue costs: `headrace run` on a workload as a job file, against bench/engine.py on the same ids.

Both run in turns, each in a process tree of its own, so that a noisy machine is noisy for both. The run's
seconds go from the moment its engine is ready to its last line on disk: submit, lease, finish, the sink and
the Valkey server share the cores with the model meanwhile. Model loading is the same on both sides and is
counted on neither; `cpu_s` is what each whole tree used, loading included. One JSON line.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from bench.workloads import NAMES, named
from engine.models.registry import read_spec

TARGET = 1.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--workload", choices=NAMES, default="W1")
    parser.add_argument("--repeat", type=int, default=3, metavar="N")
    parser.add_argument(
        "--times", type=int, default=1, metavar="N", help="the workload N times over, with other ids"
    )
    parser.add_argument("engine", nargs="*", metavar="-- FLAGS", help="engine flags for both sides")
    args = parser.parse_args()
    flags = ["--max-model-len", "1024", "--kv-cache-memory", "4", *args.engine]
    vocab = read_spec(args.model).vocab_size
    rows = [
        {"prompt_token_ids": r.prompt, "ignore_eos": True, **r.sampling}
        for i in range(args.times)
        for r in named(args.workload, vocab, 1234 + i)
    ]
    with tempfile.TemporaryDirectory(prefix="run-overhead-") as folder:
        ids, jobs = Path(folder, "ids.json"), Path(folder, "jobs.jsonl")
        ids.write_text(json.dumps(rows))
        jobs.write_text("".join(json.dumps(row) + "\n" for row in rows))
        pairs = [
            (_bench(args.model, ids, flags), _run(args.model, jobs, Path(folder, f"{i}.jsonl"), flags, rows))
            for i in range(args.repeat)
        ]
    ratio = statistics.median(run["seconds"] / bench["seconds"] for bench, run in pairs)
    print(json.dumps({
        "case": "run_overhead", "model": Path(args.model).name, "workload": args.workload, "rows": len(rows),
        "bench_engine": _median([b for b, _ in pairs]), "headrace_run": _median([r for _, r in pairs]),
        "ratio": round(ratio, 4), "target": TARGET,
    }))  # fmt: skip


def _bench(model: str, ids: Path, flags: list[str]) -> dict[str, float]:
    words = ["bench/engine.py", "--model", model, "--workload-file", str(ids), *flags]
    out, cpu = _finished([sys.executable, *words], subprocess.PIPE)
    return {"seconds": json.loads(out)["seconds"], "cpu_s": cpu}


def _run(
    model: str, jobs: Path, output: Path, flags: list[str], rows: list[dict[str, Any]]
) -> dict[str, float]:
    words = ["-m", "headrace.cli.main", "run", str(jobs), "-o", str(output), "--model", model, *flags]
    _, cpu = _finished([sys.executable, *words], subprocess.DEVNULL)
    lines = output.read_text().splitlines()
    made = sum(json.loads(line)["response"]["body"]["usage"]["completion_tokens"] for line in lines)
    if made != sum(row["max_tokens"] for row in rows):
        raise SystemExit(f"bench/run_overhead.py: {made} tokens came back in {len(lines)} lines")
    return {"seconds": os.stat(output).st_mtime - _ready_at(output), "cpu_s": cpu}


def _finished(command: list[str], stdout: int) -> tuple[str, float]:
    """Its output, and the CPU seconds of it and the children that it waited for."""
    process = subprocess.Popen(command, stdout=stdout, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
    out = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"bench/run_overhead.py: {' '.join(command)} ended with {process.returncode}")
    return out, usage.ru_utime + usage.ru_stime


def _ready_at(output: Path) -> float:
    """Unix seconds at which the run's engine was ready, by its log."""
    log = next(Path(f"{output}.headrace").glob("*.log")).read_text()
    line = next(line for line in log.splitlines() if line.endswith("state=ready"))
    return datetime.datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").timestamp()


def _median(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}


if __name__ == "__main__":
    main()
