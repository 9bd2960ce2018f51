"""The Ray executor: one actor per rank, placed and watched by Ray, fed by the step channel.

A dead, failed or silent rank is noticed by a watcher thread within seconds; from then on every verb raises
WorkerDied with that rank's own evidence. The object is used once: a new one, on the same Ray session,
replaces it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from typing import Any

from engine.config import EngineConfig, ModelSpec
from engine.errors import EngineError, WorkerDied
from engine.exec import cluster
from engine.exec.base import RankReport
from engine.exec.channel import STOP, DriverChannel, require_curve
from engine.exec.environment import for_ranks
from engine.exec.rank import USER_ERRORS, RankProcess, Refused
from engine.exec.wire import StepPlan, StepResult, pack_plan, unpack_result

log = logging.getLogger(__name__)

WORKER = "engine.worker.worker:Worker"
#: Seconds of silence after which a rank counts as hung; it shows a sign of life every half second.
SILENCE_S = 5.0
#: After the first rank ended, how long to look for the one that it may only have suffered from.
CULPRIT_S = 0.5
#: Seconds for all ranks to join the step channel, and to end after a stop.
JOIN_S, END_S = 60.0, 5.0


class RayExecutor:
    """Implements `engine.exec.base.Executor`. `worker` names the class that ranks build."""

    def __init__(self, config: EngineConfig, spec: ModelSpec, worker: str = WORKER) -> None:
        self.config, self.spec, self._worker = config, spec, worker
        self._actors: list[Any] = []
        self._group: Any = None
        self._channel: DriverChannel | None = None
        self._watcher: threading.Thread | None = None
        self._stopping = threading.Event()
        self._death: WorkerDied | None = None
        self._sent: deque[float] = deque()
        self._reports: list[RankReport] = []
        self.load_intervals: list[tuple[float, float]] = []

    # -- start -----------------------------------------------------------------------------------

    def start(self) -> list[RankReport]:
        import ray

        require_curve()
        world = self.config.tensor_parallel_size
        host, local = cluster.join(self.config.ray_address)
        gpus = self.config.device != "cpu" and cluster.has_gpus()
        self._group = cluster.reserve(world, gpus)
        self._actors = self._create(world, gpus)
        order = cluster.driver_first([p.node for p in self._all("place")])
        self._actors = [self._actors[i] for i in order]
        environment = for_ranks(os.environ)
        log.info("rank_environment names=%s", ",".join(environment) or "none")
        init_method = None
        if world > 1:
            address = host if local else self._get([self._actors[0].address.remote()])[0]
            init_method = self._get([self._actors[0].rendezvous.remote(address, world)])[0]
        spec = self.spec.to_wire()
        self._get([
            actor.prepare.remote(self.config, spec, rank, world, init_method, environment)
            for rank, actor in enumerate(self._actors)
        ])  # fmt: skip
        self._reports = self._load()
        self._get([actor.allocate.remote(self.num_kv_blocks) for actor in self._actors])
        self._channel = DriverChannel(host, world)
        runs = [actor.run.remote(self._channel.endpoint) for actor in self._actors]
        if missing := self._channel.wait_for_ranks(JOIN_S):
            raise WorkerDied(missing[0], f"it did not join the step channel within {JOIN_S:.0f} s")
        self._watcher = threading.Thread(
            target=self._watch, args=(ray, runs, self._channel), name="rank-watcher", daemon=True
        )
        self._watcher.start()
        return self._reports

    def _create(self, world: int, gpus: bool) -> list[Any]:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        remote = ray.remote(RankProcess)
        return [
            remote.options(
                num_cpus=0 if gpus else 1,
                num_gpus=1 if gpus else 0,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=self._group, placement_group_bundle_index=i
                ),
            ).remote(self._worker)
            for i in range(world)
        ]

    def _load(self) -> list[RankReport]:
        """At most `max_parallel_loading_workers` ranks read the checkpoint at once."""
        import ray

        world = len(self._actors)
        waiting = deque(range(world))
        limit = self.config.max_parallel_loading_workers or world
        loading: dict[Any, int] = {}
        done: dict[int, RankReport] = {}
        while waiting or loading:
            while waiting and len(loading) < limit:
                rank = waiting.popleft()
                loading[self._actors[rank].load.remote()] = rank
            ready, _ = ray.wait(list(loading))
            rank = loading.pop(ready[0])
            report, began, ended = self._get(ready, [rank])[0]
            self.load_intervals.append((began, ended))
            done[rank] = report
        return [done[rank] for rank in range(world)]

    def _all(self, verb: str) -> list[Any]:
        return self._get([getattr(actor, verb).remote() for actor in self._actors])

    def _get(self, refs: list[Any], ranks: list[int] | None = None) -> list[Any]:
        """The values of calls, in order. Raises a user's error as itself, a rank's death as WorkerDied."""
        import ray

        values = []
        for rank, ref in zip(ranks or range(len(refs)), refs, strict=True):
            try:
                value = ray.get(ref)
            except ray.exceptions.RayError as e:
                raise WorkerDied(rank, _evidence(e)) from None
            if isinstance(value, Refused):
                raise USER_ERRORS[value.kind](value.message)
            values.append(value)
        return values

    # -- steps -----------------------------------------------------------------------------------

    def submit(self, plan: StepPlan) -> None:
        self._check()
        self._sent.append(time.monotonic())
        self._running().send(pack_plan(plan))

    def result(self) -> StepResult:
        channel = self._running()
        while True:
            self._check()
            frame = channel.receive(0.1)
            if frame is not None:
                self._sent.popleft()
                return unpack_result(frame)
            if time.monotonic() - self._sent[0] > self.config.step_timeout_s:
                self._death = self._death or WorkerDied(
                    0, f"a step took longer than {self.config.step_timeout_s:g} s (step_timeout_s)"
                )

    @property
    def num_kv_blocks(self) -> int:
        if not self._reports:
            raise EngineError("the ranks have not been loaded yet: call start() first")
        return min(report.kv_blocks for report in self._reports)

    @property
    def overlap_depth(self) -> int:
        if self.config.overlap_depth is not None:
            return self.config.overlap_depth
        return int(bool(self._reports) and self._reports[0].device.startswith("cuda"))

    def _check(self) -> None:
        if self._death is not None:
            raise self._death

    def _running(self) -> DriverChannel:
        if self._channel is None:
            raise WorkerDied(0, "the executor was stopped, or never started")
        return self._channel

    # -- watch and end ---------------------------------------------------------------------------

    def _watch(self, ray: Any, runs: list[Any], channel: DriverChannel) -> None:
        """Until a rank dies, fails or falls silent, or the executor stops."""
        seen = dict.fromkeys(range(len(runs)), time.monotonic())
        while not self._stopping.is_set():
            now = time.monotonic()
            for rank in channel.beats(0.1):
                seen[rank] = now
            ended, _ = ray.wait(runs, num_returns=len(runs), timeout=0)
            if ended and not self._stopping.is_set():
                self._death = self._death or _culprit(ray, runs, seen)
                return
            silent = [rank for rank, at in seen.items() if now - at > SILENCE_S]
            if silent:
                self._death = self._death or WorkerDied(
                    silent[0], f"it is hung: no sign of life for {SILENCE_S:g} s"
                )
                return

    def stop(self) -> None:
        if self._stopping.is_set():
            return
        self._stopping.set()
        import ray

        if self._watcher is not None:
            self._watcher.join()
        if self._channel is not None:
            if self._death is None:
                self._channel.send(STOP)
                time.sleep(0.05)
            self._channel.close()
            self._channel = None
        for actor in self._actors:
            ray.kill(actor)
        if self._group is not None:
            ray.util.remove_placement_group(self._group)


def _culprit(ray: Any, runs: list[Any], seen: dict[int, float]) -> WorkerDied:
    """Who died first. A rank whose peer is gone fails in its next collective, perhaps before Ray reports
    the peer: a dead process goes before an exception, an exception of its own before one of the group."""
    time.sleep(CULPRIT_S)
    ended, _ = ray.wait(runs, num_returns=len(runs), timeout=0)
    found = []
    for ref in ended:
        rank = runs.index(ref)
        try:
            ray.get(ref)
            found.append((1, rank, "its step loop ended by itself"))
        except ray.exceptions.RayActorError as e:
            found.append((0, rank, _evidence(e)))
        except ray.exceptions.RayError as e:
            evidence = _evidence(e)
            found.append((3 if _in_collective(evidence) else 2, rank, evidence))
    _, rank, evidence = min(found)
    return WorkerDied(rank, evidence)


def _in_collective(evidence: str) -> bool:
    return "torch/distributed" in evidence or "gloo" in evidence or "NCCL" in evidence


def _evidence(e: Exception) -> str:
    """A rank's own traceback, or how its process ended."""
    lines = [line.rstrip() for line in str(e).splitlines() if line.strip()]
    return "\n".join(lines[-30:]) or type(e).__name__
