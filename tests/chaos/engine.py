"""An engine process for chaos: the real service (leases, keeper, commit, spool, drain) on the echo core.

    python -m tests.chaos.engine --redis URL --lane NAME [--rows 64] [--step-ms 5] [--lease-s 5] [--drain-s 5]

A step takes `step-ms`, so a row of `max_tokens` takes that many steps. A prompt that holds the token DEADLY
kills the process with SIGKILL when it is first computed; one that holds HANGING never comes back.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from itertools import count
from typing import Any, TypeVar

from engine.config import EngineConfig, ModelSpec
from engine.exec.echo import EchoExecutor, echo_spec
from engine.exec.wire import StepPlan
from engine.service import Service
from headrace.cli.child import die_with_parent
from headrace.cli.common import log_to_stderr
from headrace.settings import Settings
from headrace.store import Call, Store

T = TypeVar("T")

VOCAB = 256
DEADLY, HANGING = 250, 251


class ChaosExecutor(EchoExecutor):
    """The echo model with two bad prompts."""

    die_at: str | None = None
    hang_at: int | None = None

    def submit(self, plan: StepPlan) -> None:
        if self.die_at == "before-first-token" and plan.new and plan.step > 5:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.die_at == "mid-decode" and plan.step > 40:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.hang_at is not None and plan.step >= self.hang_at:
            time.sleep(3600)
        for new in plan.new:
            if DEADLY in new.tokens:
                os.kill(os.getpid(), signal.SIGKILL)
            if HANGING in new.tokens:
                time.sleep(3600)
        super().submit(plan)


def die_around(name: str, after: bool, nth: int = 2) -> None:
    """Kill this process at the nth call of a ledger script that moves jobs: before it is sent, or after its
    reply."""
    send, calls = Store._send, count(1)

    def deadly(self: Store, call: Call[T]) -> T:
        mine = call.script is not None and call.script.name == name
        if mine and not after and next(calls) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        reply: Any = send(self, call)
        moved = reply[3] if name == "lease" and mine else reply
        if mine and after and moved and next(calls) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return reply

    Store._send = deadly  # type: ignore[method-assign]


#: Where an engine can be told to kill itself, once.
DIE_AT = ("after-lease", "before-first-token", "mid-decode", "before-finish", "after-finish")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--redis", required=True)
    parser.add_argument("--lane", required=True)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--lease-s", type=float, default=5.0)
    parser.add_argument("--drain-s", type=float, default=5.0)
    parser.add_argument("--spool", default="")
    parser.add_argument("--max-attempts", type=int, default=5)
    parser.add_argument("--die-at", choices=DIE_AT)
    parser.add_argument("--hang-at", type=int, help="step from which the ranks answer no more")
    args = parser.parse_args()
    die_with_parent()
    if args.die_at in ("after-lease", "before-finish", "after-finish"):
        when, name = args.die_at.split("-")
        die_around(name, after=when == "after")
    log_to_stderr()
    config = EngineConfig(
        model="echo", max_num_seqs=args.rows, max_num_batched_tokens=2048, num_kv_blocks=8192,
        max_model_len=2048, served_model_name="echo", overlap_depth=0,
    )  # fmt: skip
    settings = Settings(
        redis=args.redis, lane=args.lane, lease_s=args.lease_s, drain_s=args.drain_s, spool=args.spool,
        max_attempts=args.max_attempts,
    )  # fmt: skip

    def build(config: EngineConfig, spec: ModelSpec) -> ChaosExecutor:
        executor = ChaosExecutor(config, step_seconds=args.step_ms / 1000)
        executor.die_at, executor.hang_at = args.die_at, args.hang_at
        return executor

    service = Service(config, echo_spec(VOCAB, 4096), settings, build)
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, lambda *_: service.drain())
    service.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
