"""A producer process for chaos: submits its jobs, some of them twice, and writes down what it was told.

    python -m tests.chaos.producer --redis URL --lane NAME --name P --jobs N --history FILE [--poison-every K]

History, a JSON line each: {"try": [ids]} before a call, {"ok": [ids]} for what the server said it has.
A call whose outcome is unknown is made again, as every producer may.
"""

from __future__ import annotations

import argparse
import random
import sys
import time

import orjson

from headrace.cli.child import die_with_parent
from headrace.connection import connect
from headrace.errors import StoreError
from headrace.ledger import Ledger
from headrace.messages import Job
from headrace.store import Store
from tests.chaos.engine import DEADLY
from tests.chaos.parts import CANARY, job

BATCH = 25


def main() -> int:
    parser = argparse.ArgumentParser()
    for flag in ("--redis", "--lane", "--name", "--history"):
        parser.add_argument(flag, required=True)
    parser.add_argument("--jobs", type=int, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-second", type=float, default=1e9)
    parser.add_argument("--bound", type=int, default=2000)
    parser.add_argument("--poison-every", type=int, default=0)
    args = parser.parse_args()
    die_with_parent()
    rng, ledger = random.Random(args.seed), Ledger(args.lane)
    store = _connected(args.redis)
    with open(args.history, "ab", buffering=0) as history:
        for first in range(0, args.jobs, BATCH):
            began = time.monotonic()
            jobs = [_job(args, rng, i) for i in range(first, min(first + BATCH, args.jobs))]
            jobs += rng.sample(jobs, k=len(jobs) // 10)  # submitted twice
            while jobs:
                history.write(orjson.dumps({"try": [j.id for j in jobs]}) + b"\n")
                try:
                    states = store.run(ledger.submit(jobs, args.bound))
                except StoreError:
                    time.sleep(0.1 * rng.uniform(0.5, 1))
                    continue
                said = [j.id for j, s in zip(jobs, states, strict=True) if s != "full"]
                history.write(orjson.dumps({"ok": said}) + b"\n")
                jobs = [j for j, s in zip(jobs, states, strict=True) if s == "full"]
                if jobs:
                    time.sleep(0.05)
            time.sleep(max(0.0, BATCH / args.per_second - (time.monotonic() - began)))
    return 0


def _job(args: argparse.Namespace, rng: random.Random, i: int) -> Job:
    poison = bool(args.poison_every) and i % args.poison_every == args.poison_every // 2
    return job(
        f"{args.name}-{'poison-' if poison else ''}{i}",
        args.lane,
        steps=rng.randrange(args.steps // 2, args.steps * 2),
        prompt_token_ids=[DEADLY, 1, 2] if poison else None,
        meta={"secret": CANARY},
    )


def _connected(url: str) -> Store:
    while True:
        try:
            return Store(connect(url))
        except StoreError:
            time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
