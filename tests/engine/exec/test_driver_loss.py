"""The driver's end is the end of its local cluster, and Ray takes nothing over that is the driver's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import psutil

from tests.engine.exec import toy


def _driver(program: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_killed_driver_leaves_no_process_not_even_a_stopped_rank() -> None:
    driver = _driver("""
        import time
        from tests.engine.exec import toy
        ranks = toy.executor()
        print(*[r.pid for r in ranks.start()], flush=True)
        time.sleep(600)
    """)
    assert driver.stdout is not None
    pids = [int(pid) for pid in driver.stdout.readline().split()]
    family = {p.pid for p in psutil.Process(driver.pid).children(recursive=True)}
    assert set(pids) < family
    os.kill(pids[1], signal.SIGSTOP)
    driver.kill()
    driver.communicate()
    assert not toy.left_of(family, 20)


def test_ray_keeps_ranks_without_their_starter_leaves_signals_alone_and_says_nothing() -> None:
    driver = _driver("""
        import os, signal, threading, time
        from engine.errors import WorkerDied
        from tests.engine.exec import toy

        mine = lambda *_: None
        signal.signal(signal.SIGTERM, mine)
        ranks = toy.executor()
        pids = []
        starter = threading.Thread(target=lambda: pids.extend(r.pid for r in ranks.start()))
        starter.start()
        starter.join()
        time.sleep(0.5)
        print(toy.answer(ranks, 3), signal.getsignal(signal.SIGTERM) is mine)
        os.kill(pids[1], signal.SIGKILL)
        try:
            toy.answer(ranks, 4)
        except WorkerDied as death:
            print(death.rank)
        ranks.stop()
        time.sleep(1)
    """)
    out, err = driver.communicate(timeout=120)
    assert (out, err) == (f"{toy.expected(3)} True\n1\n", "")
    assert driver.returncode == 0
