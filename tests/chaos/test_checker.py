"""The checker finds planted violations of each kind, and only those."""

from __future__ import annotations

import dataclasses

from tests.chaos.checker import History, check


def whole() -> History:
    ids = {f"j{i}" for i in range(5)}
    return History(
        attempted=ids | {"unheard"},
        acknowledged=set(ids),
        sinks={"a": [*sorted(ids), "unheard"], "b": sorted(ids)},
        ends=dict.fromkeys(ids, "ok"),
    )


def test_a_whole_history_is_valid_and_what_nobody_heard_of_is_recovered() -> None:
    verdict = check(whole())
    assert verdict.valid
    assert verdict.sinks["a"].recovered == ["unheard"]
    assert verdict.figures()["lost"] == 0


def test_a_missing_row_of_one_sink_is_lost_there() -> None:
    h = whole()
    h.sinks["b"].remove("j3")
    verdict = check(h)
    assert (verdict.valid, verdict.sinks["b"].lost, verdict.sinks["a"].lost) == (False, ["j3"], [])


def test_a_row_written_twice_is_duplicated() -> None:
    h = whole()
    h.sinks["a"].append("j0")
    verdict = check(h)
    assert (verdict.valid, verdict.sinks["a"].duplicated) == (False, ["j0"])


def test_a_row_that_nobody_submitted_is_unexpected() -> None:
    h = whole()
    h.sinks["a"].append("ghost")
    verdict = check(h)
    assert (verdict.valid, verdict.sinks["a"].unexpected) == (False, ["ghost"])


def test_an_innocent_job_that_was_condemned_and_poison_that_passed_are_found() -> None:
    h = whole()
    h.poison = {"j1", "j2"}
    h.ends |= {"j0": "dead", "j1": "dead"}
    verdict = check(h)
    assert (verdict.condemned, verdict.spared, verdict.valid) == (["j0"], ["j2"], False)


def test_a_history_without_a_sink_proves_nothing() -> None:
    assert not check(dataclasses.replace(whole(), sinks={})).valid


def test_figures_count_over_all_sinks() -> None:
    h = whole()
    h.recovery_s, h.runs_again = [4.0, 3.0], {"j0": 1, "j1": 2}
    for ids in h.sinks.values():
        ids.remove("j4")
    figures = check(h).figures()
    assert (figures["lost"], figures["re_executions"], figures["recovery_p99_s"]) == (2, 3, 4.0)
