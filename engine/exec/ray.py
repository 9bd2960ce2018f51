"""The Ray executor: one actor per rank, placed by Ray, fed by the step channel, watched by
`engine.exec.watch`.

From the first death on every verb raises WorkerDied with the culprit's own evidence. The object is used
once: a new one, on the same Ray session, replaces it.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import deque
from typing import Any

import psutil

from engine.config import EngineConfig, ModelSpec
from engine.errors import EngineError, WorkerDied
from engine.exec import cluster
from engine.exec.base import RankReport
from engine.exec.channel import STOP, DriverChannel
from engine.exec.environment import for_ranks
from engine.exec.rank import Place, RankProcess
from engine.exec.watch import Watch, cause_of, first_cause, process
from engine.exec.wire import StepPlan, StepResult, pack_plan, unpack_result

log = logging.getLogger(__name__)

WORKER = "engine.worker.worker:Worker"
#: Seconds for all actors to start, and for all ranks to join the step channel.
PLACE_S, JOIN_S = 300.0, 60.0
#: Seconds for ranks to end by themselves after a stop, and for their processes to be gone after a kill.
GRACE_S, END_S = 2.0, 5.0


class RayExecutor:
    """Implements `engine.exec.base.Executor`. `worker` names the class that ranks build."""

    def __init__(self, config: EngineConfig, spec: ModelSpec, worker: str = WORKER) -> None:
        self.config, self.spec, self._worker = config, spec, worker
        self._actors: list[Any] = []
        self._places: list[Place] = []
        self._processes: list[psutil.Process] = []  # of the ranks on this node
        self._logs: dict[int, str] = {}  # theirs, by rank
        self._group: Any = None
        self._channel: DriverChannel | None = None
        self._watch: Watch | None = None
        self._loops: dict[Any, int] = {}
        self._outstanding = 0
        self._since: float | None = None  # when the oldest outstanding step could begin
        self._reports: list[RankReport] = []
        self.load_intervals: list[tuple[float, float]] = []

    # -- start -----------------------------------------------------------------------------------

    def start(self) -> list[RankReport]:
        """As the protocol says. Raises EngineError where Ray or the ranks do not start; CapacityError,
        CheckpointError and ConfigError of a rank arrive as themselves."""
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self._reports

    def _start(self) -> None:
        world, address = self.config.tensor_parallel_size, self.config.ray_address
        cpus = self.config.num_threads or 1
        host = cluster.join(address, world * cpus)
        gpus = self.config.device == "cuda" or (self.config.device == "auto" and cluster.has_gpus())
        self._group = cluster.reserve(world, gpus, cpus, wait=address is not None)
        self._actors = self._create(world, gpus, cpus)
        self._place(for_ranks(os.environ), local=address is None)
        init_method = None
        if world > 1:
            first = self._actors[0].rendezvous.remote(
                host if address is None else self._places[0].address, world
            )
            init_method = self._get({first: 0})[0]
        self._channel = DriverChannel(host, world)
        self._watch = Watch(
            self._channel, self._places, cluster.this_node(), self.config.step_timeout_s, lambda: self._since
        )
        spec, endpoint = self.spec.to_wire(), self._channel.endpoint
        self._get({
            actor.prepare.remote(self.config, spec, rank, world, init_method, endpoint): rank
            for rank, actor in enumerate(self._actors)
        })  # fmt: skip
        self._reports = self._load()
        self._all("allocate", self.num_kv_blocks)
        if missing := self._channel.wait_for_ranks(JOIN_S):
            raise WorkerDied(missing[0], f"it did not join the step channel within {JOIN_S:.0f} s")
        self._loops = {actor.run.remote(): rank for rank, actor in enumerate(self._actors)}
        self._watch.follow(self._loops)
        for r in self._reports:
            log.info(
                "rank_ready rank=%d host=%s pid=%d device=%s weights_gib=%.4f seconds=%.2f kv_tokens=%d "
                "kv_gib=%.4f attention=%r",
                r.rank, r.host, r.pid, r.device, r.weights_gib, r.load_seconds,
                (r.kv_blocks - 1) * self.config.block_size, r.kv_gib, r.attention,
            )  # fmt: skip

    def _create(self, world: int, gpus: bool, cpus: int) -> list[Any]:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        remote = ray.remote(RankProcess)
        return [
            remote.options(
                num_cpus=0 if gpus else cpus,
                num_gpus=1 if gpus else 0,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=self._group, placement_group_bundle_index=i
                ),
            ).remote(self._worker)
            for i in range(world)
        ]

    def _place(self, environment: dict[str, str], local: bool) -> None:
        """Actors become ranks, in order; each gets the driver's environment."""
        log.info("rank_environment names=%s", ",".join(environment) or "none")
        if local and sys.platform == "linux":
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo would listen on the node's address
        places = self._all("place", environment, timeout_s=PLACE_S)
        here = cluster.this_node()
        order = cluster.driver_first([p.node for p in places], here)
        self._actors, self._places = [self._actors[i] for i in order], [places[i] for i in order]
        near = {rank: p for rank, p in enumerate(self._places) if p.node == here}
        self._processes = [found for p in near.values() if (found := process(p.pid)) is not None]
        self._logs = {rank: p.log for rank, p in near.items()}
        log.info("ranks_placed %s", " ".join(f"{r}={p.host}:{p.pid}" for r, p in enumerate(self._places)))

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
            ended, _ = ray.wait(list(loading), timeout=0.5)
            self._check()
            for ref in ended:
                rank, answer = loading[ref], self._answer(ref, loading)
                del loading[ref]
                done[rank], began, until = answer
                self.load_intervals.append((began, until))
        return [done[rank] for rank in range(world)]

    def _all(self, verb: str, *args: Any, timeout_s: float | None = None) -> list[Any]:
        refs = {getattr(actor, verb).remote(*args): rank for rank, actor in enumerate(self._actors)}
        return self._get(refs, timeout_s)

    def _get(self, ranks: dict[Any, int], timeout_s: float | None = None) -> list[Any]:
        """The answers of calls (their ranks by reference), in that order. Raises as soon as one fails."""
        import ray

        answers: dict[Any, Any] = {}
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while pending := [ref for ref in ranks if ref not in answers]:
            ended, _ = ray.wait(pending, timeout=0.5)
            self._check()
            for ref in ended:
                answers[ref] = self._answer(ref, ranks)
            if deadline is not None and time.monotonic() > deadline:
                slow = ", ".join(str(ranks[ref]) for ref in pending)
                raise EngineError(f"the actors of ranks {slow} did not start within {timeout_s:.0f} s")
        return [answers[ref] for ref in ranks]

    def _answer(self, ref: Any, ranks: dict[Any, int]) -> Any:
        import ray

        failed = cause_of(ref, ranks[ref], self._logs)
        if failed is not None:
            raise (first_cause(ranks, self._logs) or failed).error
        return ray.get(ref)

    # -- steps -----------------------------------------------------------------------------------

    def submit(self, plan: StepPlan) -> None:
        self._check()
        channel, watch = self._running()
        frame = pack_plan(plan)
        if not self._outstanding:
            self._since = time.monotonic()
        self._outstanding += 1
        gone = channel.send(frame)
        if gone is not None:
            raise watch.verdict(gone)

    def result(self) -> StepResult:
        channel, _ = self._running()
        if not self._outstanding:
            raise EngineError("no step is outstanding: call submit() first")
        while (frame := channel.receive(0.1)) is None:
            self._check()
        self._outstanding -= 1
        self._since = time.monotonic() if self._outstanding else None
        return unpack_result(frame)

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
        if self._watch is not None and self._watch.death is not None:
            raise self._watch.death

    def _running(self) -> tuple[DriverChannel, Watch]:
        if self._channel is None or self._watch is None:
            raise WorkerDied(0, "the executor was stopped, or never started")
        return self._channel, self._watch

    # -- end -------------------------------------------------------------------------------------

    def stop(self) -> None:
        import ray

        actors, self._actors = self._actors, []
        group, self._group = self._group, None
        channel, self._channel = self._channel, None
        if self._watch is not None:
            self._watch.stop()
        if channel is not None:
            if self._loops and self._watch is not None and self._watch.death is None:
                channel.send(STOP)
                ray.wait(list(self._loops), num_returns=len(self._loops), timeout=GRACE_S)
            channel.close()
        if not ray.is_initialized():
            return
        for actor in actors:
            ray.kill(actor)
        if group is not None:
            ray.util.remove_placement_group(group)  # also ends what does not hear a kill: stopped processes
        # Their memory must be free before other ranks load.
        _, alive = psutil.wait_procs(self._processes, timeout=END_S)
        for rank in alive:
            rank.kill()
