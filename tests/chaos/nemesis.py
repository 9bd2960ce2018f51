"""The faults, by their numbers in the matrix: each breaks a world until it is told to stop, then heals it."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import redis

from headrace.messages import Priority
from tests.chaos.engine import DIE_AT
from tests.chaos.proxy import MODES
from tests.chaos.world import World

Fault = Callable[[World, threading.Event], None]


@dataclass(frozen=True, slots=True)
class Cell:
    """One fault and the load it is made under. `wipes`: the server forgets, so producers submit again."""

    number: str
    what: str
    fault: Fault
    network: bool = False
    wipes: bool = False
    poison_every: int = 0
    slots: int = 64
    share: float = 1.0  # of the jobs that a run is asked for
    per_second: float = 120.0  # with the load's steps, engines are about half busy
    drain_s: float = 90.0


def nothing(world: World, stop: threading.Event) -> None:
    stop.wait()


def kill_engines(world: World, stop: threading.Event) -> None:
    while not stop.wait(world.rng.uniform(2, 5)):
        world.kill_engine(world.rng.choice(world.engines))


def die_at_each_step(world: World, stop: threading.Event) -> None:
    """Each engine start takes the next point; a sink dies once before and once after its commit."""
    points, sinks = list(DIE_AT), ["before-commit", "after-commit"]
    world.rng.shuffle(points)
    engine = world.engines[0]
    while not stop.wait(0.5) and (points or sinks):
        if points:
            point = points.pop()
            world.kill_engine(engine)
            engine.flags = (*world.flags, "--die-at", point)
            world.tend()
            until = time.monotonic() + 6
            while engine.alive and time.monotonic() < until and not stop.wait(0.05):
                pass
            world.kills += not engine.alive
            engine.flags = world.flags
        if sinks:
            world.sink_flags = ["--die-at", sinks.pop()]
            world.sinks["chaos"].kill()
            world.sinks["chaos"].wait()
    engine.flags = world.flags
    if points or sinks:
        raise AssertionError(f"the load ended before every step was tried: {points} {sinks} are left")
    stop.wait()


def stop_and_continue_engines(world: World, stop: threading.Event) -> None:
    while not stop.wait(1):
        engine = world.rng.choice(world.engines)
        engine.signal(signal.SIGSTOP)
        stop.wait(3 * world.lease_s)
        engine.signal(signal.SIGCONT)


def restart_server(world: World, stop: threading.Event) -> None:
    while not stop.wait(world.rng.uniform(3, 6)):
        world.server.kill()
        time.sleep(world.rng.uniform(0.1, 2))
        world.server.start()


def wipe_server(world: World, stop: threading.Event) -> None:
    keys, turn = world.ledger.keys, 0
    while not stop.wait(world.rng.uniform(3, 5)):
        client = world.server.client
        with contextlib.suppress(redis.ResponseError):
            if turn % 3 == 0:
                client.flushall()
            elif turn % 3 == 1:
                client.delete(keys.jobs(Priority.NORMAL), keys.results(None))
            else:
                client.xgroup_destroy(keys.jobs(Priority.NORMAL), "engines")
                client.xgroup_destroy(keys.results(None), "jsonl")
        turn += 1


def break_lines(world: World, stop: threading.Event) -> None:
    while not stop.wait(world.rng.uniform(0.5, 1.5)):
        proxy = world.proxies[world.rng.choice(list(world.proxies))]
        proxy.mode = world.rng.choice(MODES)
        stop.wait(world.rng.uniform(1, 3))
        proxy.mode = "pass"
    for proxy in world.proxies.values():
        proxy.mode = "pass"


def kill_and_pause_clients(world: World, stop: threading.Event) -> None:
    client = world.server.client
    for _ in range(5):
        if stop.wait(1):
            return
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    client.execute_command("CLIENT", "PAUSE", "10000", "ALL")
    stop.wait()


def fill_memory(world: World, stop: threading.Event) -> None:
    client = world.server.client
    while not stop.wait(2):
        client.config_set("maxmemory", client.info("memory")["used_memory"])
        stop.wait(3)
        client.config_set("maxmemory", 0)
    client.config_set("maxmemory", 0)


def replace_engines(world: World, stop: threading.Event) -> None:
    """A rolling restart, over and over; every other time the second SIGTERM follows."""
    turn = 0
    while not stop.wait(1.5):
        engine = world.engines[turn % len(world.engines)]
        engine.signal(signal.SIGTERM)
        if turn % 4 > 1:
            stop.wait(0.5)
            engine.signal(signal.SIGTERM)
        until = time.monotonic() + 10
        while engine.alive and time.monotonic() < until and not stop.wait(0.05):
            pass
        turn += 1


def stop_sinks(world: World, stop: threading.Event) -> None:
    world.sinks_stopped.set()
    for sink in world.sinks.values():
        sink.kill()
        sink.wait()
    stop.wait(15)
    world.sinks_stopped.clear()
    stop.wait()


CELLS = {
    cell.number: cell
    for cell in (
        Cell("F1", "no fault", nothing),
        Cell("F2", "SIGKILL of an engine every 2 to 5 s", kill_engines),
        Cell("F3", "SIGKILL at each step of a job and of a sink's commit", die_at_each_step, per_second=80),
        Cell("F4", "SIGSTOP of an engine for three leases, then SIGCONT", stop_and_continue_engines),
        Cell("F6", "SIGKILL and restart of the server, appendfsync always", restart_server),
        Cell("F9", "FLUSHALL, DEL of streams, XGROUP DESTROY", wipe_server, wipes=True),
        Cell("F10", "latency, reset, lost replies, silence, slices on each link", break_lines, network=True),
        Cell("F11", "CLIENT KILL each second, then CLIENT PAUSE for 10 s", kill_and_pause_clients),
        Cell("F12", "maxmemory reached", fill_memory),
        Cell(
            "F14", "poison: prompts that kill their engine", nothing,
            poison_every=250, slots=8, share=0.33, drain_s=150,
        ),
        Cell("F18", "rolling restarts by SIGTERM", replace_engines),
        Cell("F23", "all sinks stopped for 15 s", stop_sinks),
    )
}  # fmt: skip
#: The five-minute lane; F5 is the real engine's (`tests.chaos.real`).
LANE_CELLS = ("F2", "F3", "F6", "F9", "F10", "F14", "F18")
