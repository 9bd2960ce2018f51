"""Ranks over a real Ray cluster and a real gloo group: placed, loaded, answering, and gone after a stop."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest

from engine.errors import CapacityError, CheckpointError, EngineError, WorkerDied
from engine.exec import cluster
from engine.exec.ray import RayExecutor
from tests.engine.exec import toy


@pytest.fixture(scope="module")
def ranks() -> Iterator[RayExecutor]:
    """Two that run, for the tests that do them no harm."""
    cluster.join(None, 2)  # before: Ray's own processes inherit all that is set now
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HEADRACE_TEST_FLAG", "on")
        environment.setenv("UNRELATED_TEST_FLAG", "on")
        ranks = toy.executor()
        ranks.start()
    yield ranks
    ranks.stop()


def _together(ranks: RayExecutor) -> bool:
    (_, first_end), (second_begin, _) = sorted(ranks.load_intervals)
    return second_begin < first_end


def test_ranks_add_up_and_the_smallest_pool_decides(ranks: RayExecutor) -> None:
    assert ranks.num_kv_blocks == 8
    for step in range(20):
        assert toy.answer(ranks, step) == toy.expected(step)


def test_plans_in_flight_are_answered_in_order(ranks: RayExecutor) -> None:
    ranks.submit(toy.plan(0))
    for step in range(1, 20):
        ranks.submit(toy.plan(step))
        assert ranks.result().step == step - 1
    assert ranks.result().step == 19
    with pytest.raises(EngineError, match="no step is outstanding"):
        ranks.result()


def test_ranks_get_the_allowed_environment_only(ranks: RayExecutor) -> None:
    assert toy.answer(ranks, toy.ENVIRONMENT) == 1


def test_a_local_cluster_listens_on_the_loopback_interface_only(ranks: RayExecutor) -> None:
    heard = {
        (process.name(), connection.laddr.ip.removeprefix("::ffff:"))
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {name for name, _ in heard} >= {"raylet", "gcs_server"}
    assert {address for _, address in heard} == {"127.0.0.1"}, heard


def test_all_ranks_load_at_once(ranks: RayExecutor) -> None:
    assert _together(ranks)


def test_max_parallel_loading_workers_bounds_how_many_load_at_once() -> None:
    one_by_one = toy.executor(max_parallel_loading_workers=1)
    try:
        one_by_one.start()
        assert not _together(one_by_one)
    finally:
        one_by_one.stop()


def test_a_stop_leaves_no_rank_and_no_place_behind_and_may_come_twice() -> None:
    import ray

    def places() -> set[str]:
        groups = ray.util.placement_group_table().items()
        return {name for name, group in groups if group["state"] != "REMOVED"}

    ended = toy.executor()
    before = places()
    pids = {r.pid for r in ended.start()}
    assert len(places() - before) == 1
    ended.stop()
    ended.stop()
    assert not toy.left_of(pids, 0)
    assert places() == before
    with pytest.raises(WorkerDied, match="stopped"):
        ended.submit(toy.plan(0))
    toy.executor().stop()  # one that never started


def test_a_ranks_user_error_arrives_as_itself() -> None:
    with pytest.raises(CheckpointError, match=r"^tensor model\.norm\.weight is missing$"):
        toy.executor("BrokenWorker").start()


def test_ranks_on_the_drivers_node_come_first_and_neighbours_share_a_node() -> None:
    assert cluster.driver_first(["b", "a", "here", "b", "a", "here"], "here") == [2, 5, 0, 3, 1, 4]
    assert cluster.driver_first(["b", "a", "b"], "here") == [0, 2, 1]


def test_more_ranks_than_places_are_refused_at_once() -> None:
    with pytest.raises(CapacityError, match=r"has 0 free GPUs, and --tensor-parallel-size 2 needs 2"):
        cluster.reserve(2, gpus=True, cpus=1, wait=False)
