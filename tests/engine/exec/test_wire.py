"""Plans and results come out of their frames as they went in: the ranks append to what they are given."""

from __future__ import annotations

from engine.exec.wire import (
    NewRow,
    RowStep,
    StepPlan,
    StepResult,
    pack_plan,
    pack_result,
    unpack_plan,
    unpack_result,
)
from engine.request import Sampling, TokenLogprobs


def test_a_plan_survives_its_frame() -> None:
    sampling = Sampling(max_tokens=5, stop_token_ids=(2, 3), logit_bias={7: -1.5}, seed=1 << 62)
    new = NewRow(1, [5, 6, 7], 2, 0, [3, 4], sampling)
    steps = [RowStep(0, 4, 1, True), RowStep(1, 0, 3, False, [9]), RowStep(2, 5, 1, True, [8])]
    plan = StepPlan(7, steps, [new], [4, 5])
    found = unpack_plan(pack_plan(plan))
    assert (found.step, found.new, found.finished) == (7, [new], [4, 5])
    assert [(*s[:4], list(s.new_blocks)) for s in found.steps] == [
        (*s[:4], list(s.new_blocks)) for s in steps
    ]
    assert all(type(s) is RowStep for s in found.steps)
    assert found.tokens == 5
    found.new[0].tokens.append(1)
    found.new[0].blocks.extend(found.steps[1].new_blocks)


def test_a_result_survives_its_frame() -> None:
    entry = TokenLogprobs(5, -0.25, 2, ((6, -0.125), (5, -0.25)))
    result = StepResult(7, [(0, 11), (2, 12)], [(0, entry)], [(1, 4, entry)], [(2, "nan")], 0.5, 3)
    assert unpack_result(pack_result(result)) == result
