"""Expected output lengths: max_tokens until a run has shown otherwise, and each run for itself."""

from __future__ import annotations

from typing import Any

from engine.request import FinishReason, Request, Sampling
from engine.sched.lengths import RUNS, Lengths


def request(run: str, max_tokens: int = 100, output: int = 0, **fields: Any) -> Request:
    made = Request("r", [1], Sampling(max_tokens=max_tokens, **fields), run=run)
    made.output = [5] * output
    made.finish = FinishReason.STOP
    return made


def test_an_unknown_run_is_expected_to_use_its_max_tokens() -> None:
    assert Lengths().expected(request("a", 100)) == 100


def test_a_run_shows_how_long_its_outputs_are() -> None:
    lengths = Lengths()
    for _ in range(200):
        lengths.learn(request("a", output=10))
    assert 10 <= lengths.expected(request("a")) <= 14
    assert lengths.expected(request("b")) == 100
    assert lengths.expected(request("a", 20)) == 20, "another max_tokens is another task"


def test_a_few_outputs_say_little() -> None:
    lengths = Lengths()
    lengths.learn(request("a", output=1))
    assert 80 < lengths.expected(request("a")) < 100


def test_a_run_that_changes_is_followed() -> None:
    lengths = Lengths()
    for output in [10] * 1000 + [90] * 1000:
        lengths.learn(request("a", output=output))
    assert lengths.expected(request("a")) > 80


def test_min_tokens_and_scores() -> None:
    lengths = Lengths()
    for _ in range(200):
        lengths.learn(request("a", output=1))
    assert lengths.expected(request("a", min_tokens=50)) == 50
    assert lengths.expected(request("a", 100, score_from=1)) == 1


def test_what_did_not_end_by_itself_teaches_nothing() -> None:
    lengths = Lengths()
    for finish in (FinishReason.CANCELLED, FinishReason.ERROR):
        ended = request("a")
        ended.finish = finish
        lengths.learn(ended)
    lengths.learn(request("a", score_from=1))
    assert lengths.expected(request("a")) == 100


def test_memory_is_bounded_and_the_latest_runs_are_kept() -> None:
    lengths = Lengths()
    for i in range(RUNS + 10):
        lengths.learn(request(f"run{i}", output=1))
    assert lengths.expected(request("run0")) == 100
    assert lengths.expected(request(f"run{RUNS}")) < 100
