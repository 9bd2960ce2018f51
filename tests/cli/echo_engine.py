"""An engine for tests of what surrounds engines: it leases jobs and answers each with its own prompt.

    python echo_engine.py [--fail-at-start] [--crash-after N] [--per-second N] --redis URL --lane NAME

A prompt that holds FAIL ends as an error; one that holds CRASH kills the process. Uses the ledger as the
real service does and knows no model.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
import time
import uuid

from headrace.cli.child import die_with_parent
from headrace.connection import connect
from headrace.errors import InvalidJob
from headrace.ledger import Leased, Ledger
from headrace.messages import Choice, Completion, ErrorInfo, Job, Kind, Status, Timings, Usage
from headrace.store import Store


def answer(job: Job, one: Leased) -> Completion:
    prompt = job.messages[-1].text if job.messages else job.prompt or str(job.prompt_token_ids)
    if "CRASH" in prompt:
        os.kill(os.getpid(), signal.SIGKILL)
    out = Completion(
        id=job.id,
        run=job.run,
        lane=job.lane,
        kind=job.kind,
        status=Status.OK,
        attempts=one.failed + 1,
        timings=Timings(enqueued=job.enqueued, finished=time.time()),
        model="echo",
        reply_to=job.reply_to,
        meta=job.meta,
    )
    if "FAIL" in prompt:
        error = ErrorInfo(code="told_to_fail", message="the prompt says so")
        return out.model_copy(update={"status": Status.ERROR, "error": error})
    words = len(prompt.split())
    choice = Choice(text=prompt, finish_reason="stop")
    if job.kind is Kind.SCORE:
        choice = Choice(score=-1.5, is_greedy=True)
    usage = Usage(prompt_tokens=words, cached_tokens=words // 2, completion_tokens=1)
    return out.model_copy(update={"choices": [choice], "usage": usage})


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--redis", required=True)
    parser.add_argument("--lane", required=True)
    parser.add_argument("--fail-at-start", action="store_true")
    parser.add_argument("--crash-after", type=int, default=None)
    parser.add_argument("--per-second", type=float, default=None)
    args = parser.parse_args()
    die_with_parent()
    if args.fail_at_start:
        print("headrace: error: the model has no weights", file=sys.stderr)
        return 1
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    store, ledger = Store(connect(args.redis)), Ledger(args.lane)
    me = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    store.run(ledger.heartbeat(me, {"state": "ready"}))
    done = 0
    while not stop.is_set():
        leased = store.run(ledger.lease(me, 64))
        if not leased:
            stop.wait(0.02)
            continue
        if args.per_second:
            stop.wait(len(leased) / args.per_second)
        items = []
        for one in leased:
            try:
                items.append((one, answer(Job.parse(one.raw), one)))
            except InvalidJob as e:
                print(f"unreadable job {e}", file=sys.stderr)
        done += len(items)
        if args.crash_after is not None and done >= args.crash_after:  # these are leased and unfinished
            os.kill(os.getpid(), signal.SIGKILL)
        store.run(ledger.finish(me, items))
    store.run(ledger.leave(me))
    return 0


if __name__ == "__main__":
    sys.exit(main())
