"""`headrace run`: a file of prompts in, a file of answers out, in one command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from headrace.cli.common import (
    INTERRUPTED,
    OK,
    ROWS_FAILED,
    add_engine_flags,
    check_model,
    engine_argv,
    engine_config,
    given_engine_flags,
)

_EPILOG = """input forms:
  .jsonl   OpenAI batch lines: {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {...}}
           or bare rows:       {"prompt": "...", "max_tokens": 20}   {"messages": [...], "temperature": 0}
                               {"prompt_token_ids": [1, 2]}
                               {"kind": "score", "prompt": "2 + 2 =", "continuation": " 4"}
  .txt     one prompt a line
  -        JSON lines from standard input

The output has one OpenAI batch output line for each row, in the order they finish; match them by
custom_id (row-N, the line's number, where a row has none). The same command again continues where the
last one stopped, after Ctrl-C and after a power cut; its state is in OUTPUT.headrace/.

exit code: 0 every row ended ok, 2 some rows failed, 1 the run could not be done, 130 interrupted

examples:
  headrace run prompts.txt -o answers.jsonl --model ./my-model
  headrace run batch.jsonl -o out.jsonl --error-file errors.jsonl --model ./my-model --tensor-parallel-size 2
  zcat rows.jsonl.gz | headrace run - -o out.jsonl --model ./my-model --redis redis://queue:6379"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "run",
        help="run a file of prompts through a model",
        description="Run every row of INPUT through a model and write the answers to OUTPUT.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", metavar="INPUT", help=".jsonl or .txt file, or - for standard input")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="OUTPUT", help="file to write")
    parser.add_argument("--model", required=True, metavar="DIR", help="folder with the model's files")
    parser.add_argument("--error-file", type=Path, metavar="FILE", help="write failed rows here instead")
    parser.add_argument("--fresh", action="store_true", help="start over: overwrite what is there")
    queue = parser.add_argument_group("queue")
    queue.add_argument(
        "--redis", metavar="URL", help="use this server (default: an embedded one for the run)"
    )
    queue.add_argument("--run", metavar="NAME", help="name of the run (default: made from OUTPUT)")
    queue.add_argument(
        "--lane", metavar="NAME", help="lane, shared with other engines (default: the run's own)"
    )
    queue.add_argument("--allow-volatile", action="store_true", help="take a server without append-only file")
    add_engine_flags(parser)
    parser.set_defaults(command=command)


def command(args: argparse.Namespace) -> int:
    return run_file(
        args.input,
        args.output,
        args.model,
        given_engine_flags(args),
        error_file=args.error_file,
        redis=args.redis,
        run=args.run,
        lane=args.lane,
        allow_volatile=args.allow_volatile,
        fresh=args.fresh,
    )


def run_file(
    source: str,
    output: Path,
    model: str,
    engine_flags: dict[str, object],
    *,
    error_file: Path | None = None,
    redis: str | None = None,
    run: str | None = None,
    lane: str | None = None,
    allow_volatile: bool = False,
    fresh: bool = False,
) -> int:
    """Check everything that can be checked without starting anything, then run. Returns the exit code."""
    from headrace.cli.pipeline import RunPlan, execute
    from headrace.cli.workdir import Workdir, fingerprint
    from producer.lines import open_input

    with open_input(source):
        pass
    Workdir(output).check()
    check_model(engine_config(model, engine_flags))
    plan = RunPlan(
        input=source,
        output=output,
        model=str(Path(model).resolve()),
        fingerprint=fingerprint(model),
        engine=[sys.executable, "-m", "headrace.cli.main", "engine", *engine_argv(model, engine_flags)],
        error_file=error_file,
        redis=redis,
        run=run,
        lane=lane,
        allow_volatile=allow_volatile,
        fresh=fresh,
    )
    outcome = execute(plan)
    if not outcome.complete:
        return INTERRUPTED
    return ROWS_FAILED if outcome.failed else OK
