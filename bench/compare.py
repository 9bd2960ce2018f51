"""Times headrace's engine and others on the same prompts, alternately in one run, and prints the ratios.

    python bench/compare.py --model DIR --workload W1 W2 W3 --peer vllm_cpu=/venv/bin/python
    python bench/compare.py --model DIR --workload W1 --variant tp2='--tensor-parallel-size 2'

Every contender (bench/contenders/) loads its model once; then each workload runs `--rounds` times, the
contenders taking turns, so that a slow minute of the machine hits all of them. A peer runs in the Python
that is named for it; a variant is headrace with other flags. Medians and ratios; greedy ids of peers may
differ in bfloat16, so the share of equal first tokens is shown, not demanded.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench.workloads import NAMES, Row, from_file, named, reversed_prompts, warm_up

HERE = Path(__file__).resolve().parent / "contenders"
OURS = "headrace"


class Contender:
    """A contender's process. Raises SystemExit when it dies."""

    def __init__(self, label: str, command: list[str]) -> None:
        self.label = label
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._read()

    def run(self, warm: list[Row], rows: list[Row]) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps({"warm": _wire(warm), "rows": _wire(rows)}), file=self.process.stdin, flush=True)
        return self._read()

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"bench/compare.py: {self.label} ended with status {self.process.wait()}")
        return json.loads(line)


def main() -> None:
    args = _arguments()
    vocab = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
    contenders: list[Contender] = []
    try:
        for label, command in _commands(args):
            print(f"loading {label}", file=sys.stderr)
            contenders.append(Contender(label, command))
        report = {
            "model": os.path.basename(os.path.normpath(args.model)), "dtype": args.dtype, "seed": args.seed,
            "rounds": args.rounds, "cores": len(os.sched_getaffinity(0)), "cpu": _cpu(),
            "contenders": {c.label: c.about for c in contenders}, "results": [],
        }  # fmt: skip
        for name in args.workload or [args.workload_file]:
            report["results"] += _compare(contenders, *_rows(name, vocab, args), args.rounds, name)
    finally:
        for contender in contenders:
            contender.stop()
    print(json.dumps(report))
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")


def _compare(
    contenders: list[Contender], warm: list[Row], rows: list[Row], rounds: int, name: str
) -> list[dict[str, Any]]:
    runs: dict[str, list[dict[str, Any]]] = {c.label: [] for c in contenders}
    for turn in range(rounds):
        # Every second round backwards: nobody always runs after the same neighbour.
        for contender in contenders if turn % 2 == 0 else contenders[::-1]:
            runs[contender.label].append(contender.run(warm, rows))
            print(f"{name} {contender.label}: {runs[contender.label][-1]['seconds']:.2f} s", file=sys.stderr)
    ours = statistics.median(r["seconds"] for r in runs[OURS])
    first = [ids[0] for ids in runs[OURS][0]["ids"]]
    lines = []
    for label, done in runs.items():
        seconds = [r["seconds"] for r in done]
        median, tokens = statistics.median(seconds), sum(map(len, done[0]["ids"]))
        wrong = sum(
            len(ids) != row.sampling["max_tokens"] for ids, row in zip(done[0]["ids"], rows, strict=True)
        )
        if wrong:
            raise SystemExit(f"bench/compare.py: {label} gave {wrong} rows of the wrong length on {name}")
        lines.append({
            "workload": os.path.basename(name), "contender": label, "seconds": [round(s, 3) for s in seconds],
            "median_s": round(median, 3), "out_tok_s": round(tokens / median, 1),
            "headrace_is_faster_by": round(median / ours, 3), "peak_rss_mb": done[-1]["peak_rss_mb"],
            "equal_first_tokens": round(
                sum(a == ids[0] for a, ids in zip(first, done[0]["ids"], strict=True)) / len(rows), 3
            ),
        })  # fmt: skip
    return lines


def _rows(name: str, vocab: int, args: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    if args.workload:
        return warm_up(name, vocab), named(name, vocab, args.seed)
    rows = from_file(name)
    return reversed_prompts(rows), rows


def _wire(rows: list[Row]) -> list[dict[str, Any]]:
    return [{"prompt": r.prompt, "max_tokens": r.sampling["max_tokens"]} for r in rows]


def _commands(args: argparse.Namespace) -> list[tuple[str, list[str]]]:
    common = ["--model", str(Path(args.model).resolve()), "--dtype", args.dtype]
    ours = [sys.executable, str(HERE / "ours.py"), *common]
    commands = [(OURS, ours + shlex.split(args.flags))]
    for variant in args.variant:
        label, _, flags = variant.partition("=")
        commands.append((label, ours + shlex.split(flags)))
    for peer in args.peer:
        label, _, python = peer.partition("=")
        script = HERE / f"{label}.py"
        if not script.exists() or not python:
            raise SystemExit(
                f"bench/compare.py: --peer {peer} is not NAME=PYTHON with NAME one of "
                + ", ".join(sorted(p.stem for p in HERE.glob("*.py") if p.stem not in ("ours", "serve")))
            )
        commands.append((label, [*shlex.split(python), str(script), *common]))
    return commands


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--workload", choices=NAMES, nargs="+")
    what.add_argument("--workload-file", metavar="FILE", help="see bench/workloads.py")
    parser.add_argument("--seed", type=int, default=1234, help="of the workload's prompts")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--variant", action="append", default=[], metavar="LABEL=FLAGS")
    parser.add_argument("--flags", default="", help="flags of headrace itself (see bench/contenders/ours.py)")
    parser.add_argument("--output", metavar="FILE", help="write the JSON there too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
