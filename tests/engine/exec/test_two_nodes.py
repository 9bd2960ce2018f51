"""Ranks on two nodes of a cluster that others started: joined with its token, one rank each, and watched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

from tests.engine.exec import toy

#: A driver in a process of its own, as a process has one Ray session; two Ray nodes stand for two machines.
PROGRAM = textwrap.dedent("""
    import json, os, signal, time
    import psutil, ray
    from ray.cluster_utils import Cluster
    from engine.errors import WorkerDied
    from tests.engine.exec import toy

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ranks = toy.executor(ray_address=cluster.address)
    pids = [r.pid for r in ranks.start()]
    told = {"nodes": len({p.node for p in ranks._places}), "answer": toy.answer(ranks, 3)}
    ranks.submit(toy.plan(toy.SLOW))
    os.kill(pids[1], signal.SIGSTOP)
    began = time.monotonic()
    try:
        ranks.result()
    except WorkerDied as death:
        told |= {"rank": death.rank, "evidence": death.evidence, "seconds": time.monotonic() - began}
    psutil.Process(pids[1]).parent().kill()  # its node's raylet
    told["orphans"] = len(toy.left_of({pids[1]}, 10))
    ranks.stop()
    told["left"] = len(toy.left_of(set(pids), 10))
    print(json.dumps(told), flush=True)
    ray.shutdown()
    cluster.shutdown()
""")


def test_ranks_on_two_nodes_answer_a_silent_one_is_named_and_none_outlives_its_node() -> None:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "ab" * 32}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | token, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("{")]  # Ray speaks up as well here
    told = json.loads(line)
    assert (told["nodes"], told["answer"]) == (2, toy.expected(3))
    assert told["rank"] == 1
    assert "no sign of life" in told["evidence"]
    assert told["seconds"] < 10
    assert (told["orphans"], told["left"]) == (0, 0)
