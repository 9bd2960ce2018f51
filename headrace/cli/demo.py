"""`headrace demo`: the shipped model answers the shipped questions; prints the share that it got right."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path

from headrace.cli.common import CommandError
from headrace.cli.run import run_file

_EXAMPLES = Path(__file__).parents[2] / "examples"

_EPILOG = """The model is small and made for these questions (examples/demo_model/README.md); the rest of the
line is what serves a large one: an embedded Valkey, tensor-parallel ranks placed by Ray, the JSONL sink.

example:
  headrace demo -o demo.jsonl"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "demo",
        help="run 200 shipped questions on the shipped model and check the answers",
        description="Run 200 questions through a small model on two Ray ranks and check the answers.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="keep the answers in this file")
    parser.add_argument("--tensor-parallel-size", type=int, default=2, metavar="N", help="ranks (default: 2)")
    parser.set_defaults(command=command)


def command(args: argparse.Namespace) -> int:
    questions, answers = _EXAMPLES / "questions.jsonl", _EXAMPLES / "answers.jsonl"
    model = _EXAMPLES / "demo_model"
    for needed in (questions, answers, model):
        if not needed.exists():
            raise CommandError(f"{needed} is missing: headrace demo runs from a checkout of the repository")
    with tempfile.TemporaryDirectory(prefix="headrace-demo-") as folder:
        output = args.output or Path(folder) / "answers.jsonl"
        flags: dict[str, object] = {"tensor_parallel_size": args.tensor_parallel_size, "dtype": "float32"}
        code = run_file(str(questions), output, str(model), flags, fresh=True)
        if output.exists():
            print(table(output.read_text("utf-8"), answers.read_text("utf-8")))
    return code


def table(output: str, answers: str) -> str:
    """Rows answered exactly, by task. A row that failed or is missing counts as wrong."""
    wanted = {row["custom_id"]: row for row in map(json.loads, answers.splitlines())}
    asked = Counter(row["task"] for row in wanted.values())
    right: Counter[str] = Counter()
    for line in map(json.loads, output.splitlines()):
        if line["response"] is not None and line["custom_id"] in wanted:
            question = wanted[line["custom_id"]]
            said = line["response"]["body"]["choices"][0]["message"]["content"]
            right[question["task"]] += said.strip() == question["answer"]
    rows = [
        f"{task:<18}{right[task]:>5} of {asked[task]:>4}{right[task] / asked[task]:>9.1%}"
        for task in sorted(asked)
    ]
    total, correct = asked.total(), right.total()
    rows.append(f"{'answered exactly':<18}{correct:>5} of {total:>4}{correct / total:>9.1%}")
    return "\n".join(rows)
