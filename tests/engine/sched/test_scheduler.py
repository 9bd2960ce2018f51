"""The policy, plan by plan: who is served, who waits, who is preempted, and what overlap does to it."""

from __future__ import annotations

import pytest

from engine.errors import EngineError
from engine.exec.wire import StepPlan, StepResult
from engine.request import FinishReason, Request
from engine.sched.admission import Limits
from engine.sched.scheduler import Scheduler
from engine.sched.sharing import PATIENCE
from engine.stats import EngineStats
from tests.engine.core.build import STOP, prompt, request

SIZE = 4


def scheduler(*requests: Request, blocks: int = 64, rows: int = 4, budget: int = 32) -> Scheduler:
    made = Scheduler(Limits(64, 512, SIZE, blocks), rows, budget, EngineStats())
    for req in requests:
        made.check(req)
        made.add(req)
    return made


def plan_of(sched: Scheduler) -> StepPlan:
    plan = sched.schedule()
    assert plan is not None
    return plan


def answer(sched: Scheduler, plan: StepPlan, token: int = 5) -> list[Request]:
    ended = sched.update(plan, StepResult(plan.step, [(s.row, token) for s in plan.steps if s.sample]))
    sched.check_integrity()
    return ended


def step(sched: Scheduler, token: int = 5) -> list[tuple[int, int, int]]:
    """One step without overlap; what it computed as (row, start, count)."""
    plan = plan_of(sched)
    answer(sched, plan, token)
    return [(s.row, s.start, s.count) for s in plan.steps]


def test_a_long_prompt_is_computed_in_chunks_beside_decoding_rows() -> None:
    sched = scheduler(request(prompt(3, 1), max_tokens=9), request(prompt(20, 2), max_tokens=9), budget=8)
    assert step(sched) == [(0, 0, 3), (1, 0, 5)]
    assert step(sched) == [(0, 3, 1), (1, 5, 7)]
    assert step(sched) == [(0, 4, 1), (1, 12, 7)]
    assert step(sched) == [(0, 5, 1), (1, 19, 1)]
    assert step(sched) == [(0, 6, 1), (1, 20, 1)]


def test_a_chunk_that_does_not_end_the_prompt_draws_no_token() -> None:
    sched = scheduler(request(prompt(20), max_tokens=2), budget=8)
    samples = []
    for _ in range(4):
        plan = plan_of(sched)
        samples += [s.sample for s in plan.steps]
        answer(sched, plan)
    assert samples == [False, False, True, True]


def test_rows_are_lowest_first_and_stay_with_their_request() -> None:
    first, second, third = (request(prompt(2, i), max_tokens=n) for i, n in enumerate((1, 4, 4)))
    sched = scheduler(first, second, third, rows=2)
    step(sched)
    assert (first.row, second.row, third.row) == (-1, 1, -1)
    plan = plan_of(sched)
    assert plan.finished == [0]
    assert [(n.row, n.tokens) for n in plan.new] == [(0, third.prompt)]
    assert [s.row for s in plan.steps] == [1, 0]


def test_requests_are_admitted_by_priority_and_arrival() -> None:
    late, early, urgent = (request(prompt(2, i), priority=p) for i, p in enumerate((1, 1, 0)))
    sched = scheduler(early, late, urgent, rows=2)
    step(sched)
    assert [r is not None and r.row >= 0 for r in (urgent, early, late)] == [True, True, False]


def test_one_that_does_not_fit_yet_is_not_overtaken_by_smaller_ones() -> None:
    running, large, small = request(prompt(20, 1)), request(prompt(20, 2)), request(prompt(1, 3))
    sched = scheduler(running, large, small, blocks=10)
    step(sched)
    assert step(sched) == [(0, 20, 1)]
    assert (large.row, small.row) == (-1, -1)


def test_a_block_per_running_row_is_left_free_at_admission() -> None:
    """Without that watermark the new row would be preempted as soon as the older one grows."""
    sched = scheduler(request(prompt(8, 1)), request(prompt(13, 2), max_tokens=4), blocks=6)
    assert step(sched) == [(0, 0, 8)], "4 blocks are free and 4 are wanted, but one is for row 0"
    sched = scheduler(request(prompt(8, 1)), request(prompt(12, 2), max_tokens=4), blocks=6)
    assert step(sched) == [(0, 0, 8), (1, 0, 12)]


def test_the_newest_row_is_preempted_and_resumed_first_with_its_output() -> None:
    old, new, waiting = (request(prompt(4, i), max_tokens=10) for i in range(3))
    sched = scheduler(old, new, blocks=4, rows=2)
    step(sched)  # one block each, both full
    sched.add(waiting)
    step(sched)  # each grows by one block
    for _ in range(3):
        step(sched)
    assert (len(old.output), len(new.output)) == (5, 5)
    plan = plan_of(sched)  # both want a third block
    assert [(s.row, s.start) for s in plan.steps] == [(0, 8)]
    assert plan.finished == [1]
    answer(sched, plan)
    assert (new.row, new.preemptions, len(new.output)) == (-1, 1, 5)
    assert list(sched.waiting) == [new, waiting]
    while old.finish is None:
        answer(sched, plan_of(sched))
    plan = plan_of(sched)
    assert plan.new[0].tokens == new.prompt + new.output, "output is kept and computed anew"
    assert plan.new[0].prompt_len == 4


def test_a_row_of_worse_priority_is_preempted_before_a_newer_one() -> None:
    worse, better = (request(prompt(4, p), priority=p, max_tokens=10) for p in (1, 0))
    sched = scheduler(worse, blocks=4)
    step(sched)
    sched.add(better)
    while not sched.stats.preemptions:
        step(sched)
    assert (worse.preemptions, better.preemptions) == (1, 0)


def test_equal_prompts_that_arrive_together_are_computed_once() -> None:
    requests = [request(prompt(17), max_tokens=1) for _ in range(4)]
    sched = scheduler(*requests, budget=64)
    assert step(sched) == [(0, 0, 17)]
    assert step(sched) == [(i, 16, 1) for i in range(3)]
    assert [r.cached for r in requests] == [0, 16, 16, 16]


def test_one_that_waits_for_a_prefix_lets_others_pass() -> None:
    same = [request(prompt(9), max_tokens=1) for _ in range(2)]
    other = request(prompt(5, 3), max_tokens=1)
    sched = scheduler(same[0], same[1], other)
    assert step(sched) == [(0, 0, 9), (1, 0, 5)]
    assert other.finish is FinishReason.LENGTH
    assert step(sched) == [(0, 8, 1)]


def test_a_prefix_in_chunks_is_awaited_to_its_end() -> None:
    first, second = request(prompt(17), max_tokens=1), request(prompt(17), max_tokens=1)
    sched = scheduler(first, second, budget=6)
    computed = [chunk for _ in range(4) for chunk in step(sched)]
    assert computed == [(0, 0, 6), (0, 6, 6), (0, 12, 5), (0, 16, 1)]


def test_the_wait_for_a_prefix_ends_when_its_leader_does_not_get_there() -> None:
    """The result of the leader's step never comes; the budget would allow more."""
    first, second = request(prompt(9)), request(prompt(9))
    sched = scheduler(first, second)
    plan_of(sched)
    plan_of(sched)  # the leader's first decode step, on top
    waited = 1  # in the first of these plans
    while second.row < 0:
        sched.schedule()
        waited += 1
        assert waited < 10 * PATIENCE
    assert waited >= PATIENCE


def test_a_prefix_is_not_shared_before_the_result_that_computes_it() -> None:
    first, second = request(prompt(9), max_tokens=1), request(prompt(9), max_tokens=1)
    sched = scheduler(first)
    plan = plan_of(sched)
    sched.add(second)
    assert sched.schedule() is None
    answer(sched, plan)
    plan = plan_of(sched)
    assert [(n.computed, len(n.blocks)) for n in plan.new] == [(8, 3)]


def test_a_failed_row_publishes_nothing() -> None:
    first, second = request(prompt(9), max_tokens=1), request(prompt(9), max_tokens=1)
    sched = scheduler(first, second)
    plan = plan_of(sched)
    ended = sched.update(plan, StepResult(plan.step, [(0, 5)], bad_rows=[(0, "nan")]))
    assert ended == [first]
    assert first.error == ("non_finite_logits", "the model's logits were not finite: nan")
    assert step(sched) == [(0, 0, 9)]
    assert second.finish is FinishReason.LENGTH


def test_results_come_in_the_order_of_their_plans() -> None:
    sched = scheduler(request(prompt(3)))
    first, second = plan_of(sched), plan_of(sched)
    with pytest.raises(EngineError, match="step 1 is not the oldest on its way: 0 is"):
        answer(sched, second)
    sched = scheduler(request(prompt(3)))
    first = plan_of(sched)
    with pytest.raises(EngineError, match="answered step 7 where step 0 was due"):
        sched.update(first, StepResult(7, [(0, 1)]))
    sched = scheduler(request(prompt(3)))
    first = plan_of(sched)
    with pytest.raises(EngineError, match="step 0: the ranks drew no token for row 0"):
        sched.update(first, StepResult(0, []))


# -- overlap ---------------------------------------------------------------------------------------


def test_the_next_plan_is_made_before_the_token_is_known() -> None:
    req = request(prompt(3), max_tokens=3)
    sched = scheduler(req)
    plans = [plan_of(sched), plan_of(sched), plan_of(sched)]
    assert [(s.start, s.count, s.sample) for p in plans for s in p.steps] == [
        (0, 3, True), (3, 1, True), (4, 1, True)
    ]  # fmt: skip
    assert sched.schedule() is None, "the third token will surely end the row"
    assert [answer(sched, p, token) for p, token in zip(plans, (7, 8, 9), strict=True)] == [[], [], [req]]
    assert req.output == [7, 8, 9]


def test_a_stop_is_applied_one_step_late_and_the_extra_token_dropped() -> None:
    req = request(prompt(3), max_tokens=30, stop_token_ids=(STOP,))
    sched = scheduler(req, rows=1)
    plan, late = plan_of(sched), plan_of(sched)
    assert answer(sched, plan, STOP) == [req]
    following = request(prompt(3, 2), max_tokens=1)
    sched.add(following)
    after = plan_of(sched)
    assert (after.finished, after.new[0].row) == ([0], 0), "the row goes to the next request at once"
    assert answer(sched, late, 9) == []
    assert (req.output, req.finish, following.output) == ([STOP], FinishReason.STOP, [])
    assert answer(sched, after, 8) == [following]
    assert following.output == [8]


def test_blocks_of_an_ended_row_are_held_until_its_last_step_has_landed() -> None:
    req = request(prompt(4), max_tokens=30, stop_token_ids=(STOP,))
    sched = scheduler(req, blocks=12)
    plan, late = plan_of(sched), plan_of(sched)
    assert answer(sched, plan, STOP) == [req]
    assert sched.pool.available == 10
    assert answer(sched, late) == []
    assert sched.pool.available == 12


def test_blocks_on_their_way_are_waited_for_before_another_row_is_preempted() -> None:
    rows = [request(prompt(4, i), max_tokens=12) for i in range(3)]
    sched = scheduler(*rows, blocks=9)
    plans = [plan_of(sched)]
    while not sched.stats.preemptions:  # all want a fourth block at the same time
        if len(plans) == 2:
            answer(sched, plans.pop(0))
        if (plan := sched.schedule()) is not None:
            plans.append(plan)
    assert [r.preemptions for r in rows] == [0, 0, 1]
    assert sched.pool.available == 0, "what the preempted row held is still being written"
    for plan in plans:
        answer(sched, plan)
    assert sched.pool.available == 3
    while any(r.finish is None for r in rows):
        answer(sched, plan_of(sched))
    assert [r.preemptions for r in rows] == [0, 0, 1]
    assert [len(r.output) for r in rows] == [12, 12, 12]


@pytest.mark.parametrize("cancel_after", [0, 1, 2])
def test_a_cancelled_row_with_steps_on_their_way_takes_no_more_tokens(cancel_after: int) -> None:
    req, other = request(prompt(3, 1), max_tokens=9), request(prompt(3, 2), max_tokens=9)
    sched = scheduler(req, other)
    plans = [plan_of(sched), plan_of(sched)]
    for plan in plans[:cancel_after]:
        answer(sched, plan)
    sched.cancel(req)
    sched.check_integrity()
    for plan in plans[cancel_after:]:
        answer(sched, plan)
    assert (len(req.output), req.finish, req.row) == (cancel_after, FinishReason.CANCELLED, -1)
    assert len(other.output) == 2
    assert plan_of(sched).finished == [0]
