"""Writes README's table of speeds from the JSON under bench/results/.

    python bench/table.py           # rewrites the part of README.md between the markers
    python bench/table.py --check   # exit status 1 when README.md says something else

`compare-*.json` are outputs of `bench/compare.py`, `queue.json` is a JSON list of `bench/queue.py`'s lines.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "bench" / "results"
BEGIN, END = "<!-- made by bench/table.py: begin -->\n", "<!-- made by bench/table.py: end -->\n"
NAMES = {"vllm_cpu": "vLLM", "hf_static": "transformers"}
WORKLOADS = {
    "W1": "W1, bulk: 64 prompts of 32 to 256 tokens, 64 out",
    "W2": "W2, decode: 64 prompts of 32 tokens, 128 out",
    "W3": "W3, eval: 64 prompts that share 512 tokens, 8 out",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = README.read_text()
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    made = head + BEGIN + table() + END + tail
    if args.check:
        return int(made != text)
    README.write_text(made)
    return 0


def table() -> str:
    """Everything between the markers."""
    parts = [comparison(json.loads(path.read_text())) for path in sorted(RESULTS.glob("compare-*.json"))]
    if (RESULTS / "queue.json").exists():
        parts.append(queue(json.loads((RESULTS / "queue.json").read_text())))
    return "\n".join(parts)


def comparison(report: dict[str, Any]) -> str:
    """One line a workload, one column a contender."""
    labels = list(report["contenders"])
    versions = {label: about["version"] for label, about in report["contenders"].items()}
    titles = [f"{_title(x)} {versions[x]}" if x in NAMES else f"headrace, {x}" for x in labels[1:]]
    lines = [
        f"`{report['model']}`, {report['dtype']}, {report['cores']} cores ({report['cpu']}); medians of "
        f"{report['rounds']} rounds in one run, contenders taking turns:",
        "",
        "| workload | headrace | " + " | ".join(titles) + " |",
        "|---|---" + "|---" * len(titles) + "|",
    ]
    results = {(r["workload"], r["contender"]): r for r in report["results"]}
    for workload in dict.fromkeys(r["workload"] for r in report["results"]):
        ours = results[workload, labels[0]]
        cells = [f"{ours['median_s']:.1f} s, {ours['out_tok_s']:.0f} tok/s"]
        for label in labels[1:]:
            other = results[workload, label]
            ratio = other["headrace_is_faster_by"]
            says = f"headrace is {ratio:.2f} x as fast" if label in NAMES else f"{1 / ratio:.2f} x as fast"
            cells.append(f"{other['median_s']:.1f} s: {says}")
        lines.append(f"| {WORKLOADS.get(workload, workload)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def queue(runs: list[dict[str, Any]]) -> str:
    """Jobs a second, end to end."""
    rates = [f"{statistics.median(r['jobs_s'] for r in runs if r['rows'] == n):,.0f}" for n in (256, 64)]
    return (
        f"Queue, end to end ({runs[0]['server']}): submit, lease, echo engine, finish, result read: "
        f"{rates[0]} jobs/s with 256 rows at once, {rates[1]} with 64 (`python bench/queue.py`).\n"
    )


def _title(label: str) -> str:
    return NAMES.get(label, label)


if __name__ == "__main__":
    sys.exit(main())
