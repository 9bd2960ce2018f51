"""Times the queue alone: a producer, one engine that echoes, a sink that counts; three processes, one server.

    python bench/queue.py [--jobs 20000] [--rows 256] [--redis URL]

Prints one JSON line. `jobs_s` is end to end, from the first submit to the last acknowledged completion, with
every state change made by the ledger's scripts and the embedded server's default fsync rule.
"""

from __future__ import annotations

import sys
from pathlib import Path

# otherwise this file stands where everybody else looks for the standard library's `queue`
sys.path[0] = str(Path(__file__).parents[1])

import argparse
import json
import multiprocessing
import tempfile
import time
from contextlib import ExitStack
from queue import SimpleQueue
from threading import Semaphore, Thread

from headrace.connection import connect
from headrace.embedded import EmbeddedServer
from headrace.ledger import BATCH, Leased, Ledger
from headrace.messages import Choice, Completion, Job, Kind, Status, Timings, Usage
from headrace.store import Store

LANE, RUN, GROUP = "bench", "bench", "sink"


def produce(url: str, jobs: int, bound: int) -> None:
    store, ledger = Store(connect(url)), Ledger(LANE)
    for start in range(0, jobs, 200):
        batch = [
            Job.build({
                "id": f"job-{i}", "run": RUN, "lane": LANE, "kind": "completion", "reply_to": RUN,
                "prompt": f"question {i}: how many are there?", "params": {"max_tokens": 8},
                "enqueued": time.time(),
            })
            for i in range(start, min(start + 200, jobs))
        ]  # fmt: skip
        while batch:
            states = store.run(ledger.submit(batch, bound))
            batch = [job for job, state in zip(batch, states, strict=True) if state == "full"]
            if batch:
                time.sleep(0.002)


def echo(url: str, rows: int) -> None:
    """An engine whose model answers at once, until it is ended. As in the service, one thread leases as many
    jobs as there are free rows and a quarter more, and another finishes what is done, up to 200 in a call."""
    store, ledger = Store(connect(url)), Ledger(LANE)
    done: SimpleQueue[list[tuple[Leased, Completion]]] = SimpleQueue()
    most, free = rows + rows // 4, Semaphore(0)

    def commit() -> None:
        while True:
            items = done.get()
            while not done.empty() and len(items) < BATCH:
                items += done.get()
            store.run(ledger.finish("echo", items))
            free.release(len(items))

    Thread(target=commit, daemon=True).start()
    room = most
    while True:
        if room < most // 8:
            free.acquire()
            room += 1
        while free.acquire(blocking=False):
            room += 1
        if room >= most // 8:
            leased = store.run(ledger.lease("echo", room)) or store.run(
                ledger.wait_for_jobs("echo", room, 1000)
            )
            room -= len(leased)
            if leased:
                done.put([(one, _answer(Job.parse(one.raw))) for one in leased])


def _answer(job: Job) -> Completion:
    return Completion(
        id=job.id,
        run=job.run,
        lane=job.lane,
        kind=Kind.COMPLETION,
        status=Status.OK,
        choices=[Choice(text=job.prompt or "", finish_reason="stop")],
        usage=Usage(prompt_tokens=8, completion_tokens=8),
        timings=Timings(enqueued=job.enqueued, finished=time.time()),
        reply_to=job.reply_to,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--redis", metavar="URL", help="use this server (default: an embedded one)")
    parser.add_argument("--bound", type=int, default=2_000, help="jobs that may wait or be leased at once")
    parser.add_argument("--rows", type=int, default=256, help="rows of the engine (--max-num-seqs)")
    args = parser.parse_args()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        url = args.redis or stack.enter_context(EmbeddedServer(folder)).url
        store, ledger = Store(connect(url)), Ledger(LANE)
        store.run(ledger.ensure_sink(RUN, GROUP))
        engine = multiprocessing.Process(target=echo, args=(url, args.rows), daemon=True)
        producer = multiprocessing.Process(target=produce, args=(url, args.jobs, args.bound), daemon=True)
        engine.start()
        time.sleep(0.5)
        began = time.perf_counter()
        producer.start()
        latencies: list[float] = []
        while len(latencies) < args.jobs:
            if not engine.is_alive() or producer.exitcode:
                raise SystemExit("the echo engine or the producer died; its error stands above")
            delivered = store.run(ledger.read_results(RUN, GROUP, "sink", 500, 1000))
            for one in delivered:
                timings = Completion.parse(one.raw).timings
                latencies.append((timings.finished or 0) - (timings.enqueued or 0))
            if delivered:
                store.run(ledger.ack_results(RUN, GROUP, [one.entry_id for one in delivered]))
        seconds = time.perf_counter() - began
        engine.terminate()
        progress = store.run(ledger.progress(RUN))
        if progress.ok != args.jobs or store.run(ledger.jobs_waiting()):
            raise SystemExit(f"the ledger does not add up: {progress}")
        latencies.sort()
        print(json.dumps({
            "bench": "queue",
            "jobs": args.jobs,
            "rows": args.rows,
            "seconds": round(seconds, 3),
            "jobs_s": round(args.jobs / seconds),
            "latency_p50_ms": round(latencies[len(latencies) // 2] * 1000, 1),
            "latency_p99_ms": round(latencies[len(latencies) * 99 // 100] * 1000, 1),
            "server": "embedded, appendfsync always" if args.redis is None else "external",
        }))  # fmt: skip


if __name__ == "__main__":
    main()
