"""`headrace run` with the echo engine in place of a model: the same code, another engine command.

python echo_run.py INPUT OUTPUT [MODEL] [engine flags, comma-separated] [run flags as KEY=VALUE ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

from headrace.cli.common import OK, ROWS_FAILED
from headrace.cli.main import report
from headrace.cli.pipeline import RunPlan, execute

ECHO = str(Path(__file__).with_name("echo_engine.py"))


def main(argv: list[str]) -> int:
    source, output, model, flags, *more = argv
    given = dict(word.split("=", 1) for word in more)
    plan = RunPlan(
        input=source,
        output=Path(output),
        model=model,
        fingerprint=f"of {model}",
        engine=[sys.executable, ECHO, *flags.split()],
        error_file=Path(given["error_file"]) if "error_file" in given else None,
        redis=given.get("redis"),
        run=given.get("run"),
        lane=given.get("lane"),
        fresh="fresh" in given,
    )
    outcome = execute(plan)
    if not outcome.complete:
        return 130
    return ROWS_FAILED if outcome.failed else OK


if __name__ == "__main__":
    sys.exit(report(lambda: main(sys.argv[1:])))
