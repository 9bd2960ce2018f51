"""The driver: runs cells of the fault matrix, checks each history, prints one JSON line a cell.

    python -m tests.chaos.run [--cells F2,F6 | --full] [--jobs 1500] [--seeds 1]
                               [--server valkey-9] [--out FILE]

`--server`: valkey-9 (embedded), redis-7.0 (Debian's), or a path. Exit status 0 only if every
cell is valid: per sink lost 0, duplicated 0, unexpected 0; every innocent job ok, no poison ok; drained.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests.chaos.checker import check
from tests.chaos.nemesis import CELLS, LANE_CELLS, Cell
from tests.chaos.world import World

#: Simulated decode steps of a job, about, and milliseconds of one.
STEPS, STEP_MS = 20, 8.0


def run_cell(
    cell: Cell, jobs: int, seed: int, server: str, folder: Path, keep: bool = False
) -> dict[str, object]:
    """One cell from its start to its verdict, as plain numbers."""
    world = World(folder, server=server, slots=cell.slots, step_ms=STEP_MS, network=cell.network, seed=seed)
    stop, failures = threading.Event(), list[BaseException]()

    def harass() -> None:
        try:
            cell.fault(world, stop)
        except BaseException as e:
            failures.append(e)

    try:
        began = time.monotonic()
        world.start(
            int(jobs * cell.share), per_second=cell.per_second, steps=STEPS, poison_every=cell.poison_every
        )
        nemesis = threading.Thread(target=harass, name="nemesis")
        nemesis.start()
        while world.producing and time.monotonic() - began < 300:
            world.tend()
            time.sleep(0.1)
        stop.set()
        nemesis.join(60)
        loaded = time.monotonic()
        drained = world.drain(cell.drain_s, cell.wipes)
        history = world.history()
        verdict = check(history)
        left = world.left_over()
        figures: dict[str, object] = {
            "cell": cell.number, "what": cell.what, "server": Path(server).name, "seed": seed,
            "valid": verdict.valid and drained and not failures and not left["logs_with_payload"],
            "submitted": len(history.acknowledged), "unknown": len(history.attempted - history.acknowledged),
            **verdict.figures(), "engine_kills": world.kills,
            "engine_starts": sum(e.starts for e in world.engines), "engine_faults": world.deaths,
            "drained": drained, "load_s": round(loaded - began, 1),
            "drain_s": round(time.monotonic() - loaded, 1),
            **left,
        }  # fmt: skip
        if failures:
            figures["nemesis_failed"] = repr(failures[0])
        if not figures["valid"]:
            for name, sink in verdict.sinks.items():
                figures[f"lost_{name}"] = sink.lost[:5]
                figures[f"duplicated_{name}"] = sink.duplicated[:5]
            figures["condemned_ids"], figures["spared_ids"] = verdict.condemned[:5], verdict.spared[:5]
            figures["folder"] = str(folder)
        return figures
    finally:
        stop.set()
        world.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", help=f"comma-separated; default {','.join(LANE_CELLS)}")
    parser.add_argument("--full", action="store_true", help="every cell")
    parser.add_argument("--jobs", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1, help="the first")
    parser.add_argument("--server", default="valkey-9")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file as well")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended as well
    cells = args.cells.split(",") if args.cells else (list(CELLS) if args.full else list(LANE_CELLS))
    bad = 0
    for seed in range(args.seed, args.seed + args.seeds):
        for number in cells:
            folder = Path(tempfile.mkdtemp(prefix=f"hr-chaos-{number}-"))
            figures = run_cell(CELLS[number], args.jobs, seed, args.server, folder)
            line = json.dumps(figures)
            print(line, flush=True)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                with open(args.out, "a") as f:
                    f.write(line + "\n")
            bad += not figures["valid"]
    print(f"{bad} of {len(cells) * args.seeds} cells invalid", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
