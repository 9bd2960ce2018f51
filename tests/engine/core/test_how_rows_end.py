"""How rows end: stop tokens, limits, monitors, and failures that stay with their own row."""

from __future__ import annotations

import pytest

from engine.request import FinishReason
from tests.engine.core.build import STOP, echo_engine, expected, prompt, request, run

BOTH = pytest.mark.parametrize("depth", [0, 1])


@BOTH
def test_a_stop_token_ends_the_row_and_stays_in_its_output(depth: int) -> None:
    req = request([1, 2, 3], max_tokens=9, stop_token_ids=(STOP, 40))
    run(echo_engine(depth=depth), [req])
    assert (req.output, req.finish) == ([1, 2, 3, STOP], FinishReason.STOP)


@BOTH
def test_a_stop_token_before_min_tokens_does_not_end_the_row(depth: int) -> None:
    req = request([1, 2, 3], max_tokens=9, stop_token_ids=(STOP, 2), min_tokens=4)
    run(echo_engine(depth=depth), [req])
    assert (req.output, req.finish) == ([1, 2, 3, 1, STOP], FinishReason.STOP)


@BOTH
def test_max_tokens_ends_the_row(depth: int) -> None:
    req = request([1, 2, 3], max_tokens=5)
    run(echo_engine(depth=depth), [req])
    assert (req.output, req.finish) == ([1, 2, 3, 1, 2], FinishReason.LENGTH)


@BOTH
def test_a_full_context_ends_the_row(depth: int) -> None:
    req = request(prompt(12), max_tokens=4)
    run(echo_engine(depth=depth, context=16), [req])
    assert (len(req.output), req.finish) == (4, FinishReason.LENGTH)


class Until:
    """Ends a row at a token; remembers what it was shown."""

    def __init__(self, last: int | None, error: Exception | None = None) -> None:
        self.last, self.error, self.seen = last, error, []  # type: ignore[var-annotated]

    def push(self, token_id: int) -> bool:
        self.seen.append(token_id)
        if token_id == self.last and self.error:
            raise self.error
        return token_id == self.last


@BOTH
def test_a_monitor_ends_the_row(depth: int) -> None:
    monitor = Until(2)
    req = request([1, 2, 3], max_tokens=9, monitor=monitor)
    run(echo_engine(depth=depth), [req])
    assert (req.output, req.finish, monitor.seen) == ([1, 2], FinishReason.STOP, [1, 2])


def test_a_monitor_is_not_shown_the_stop_token_and_a_listener_is() -> None:
    monitor, heard = Until(None), []
    req = request(
        [1, 2], max_tokens=9, stop_token_ids=(STOP,), monitor=monitor,
        on_token=lambda r, token: heard.append((r.id, token)), id="a",
    )  # fmt: skip
    run(echo_engine(), [req])
    assert monitor.seen == [1, 2]
    assert heard == [("a", 1), ("a", 2), ("a", STOP)]


@BOTH
def test_a_monitor_that_raises_ends_its_own_row_only(depth: int) -> None:
    bad = request([1, 2, 3], monitor=Until(2, ValueError("no such character")))
    good = request([1, 2, 3])
    run(echo_engine(depth=depth), [bad, good])
    assert bad.finish is FinishReason.ERROR
    assert bad.error == ("monitor_failed", "the watcher of this row raised ValueError: no such character")
    assert (good.output, good.finish) == expected(good)


@BOTH
def test_logits_that_are_not_finite_end_their_own_row_only(depth: int) -> None:
    bad, good = request([1, 2, 44]), request([1, 2, 3])
    run(echo_engine(depth=depth, poison=44), [bad, good])
    assert bad.finish is FinishReason.ERROR
    assert bad.error == ("non_finite_logits", "the model's logits were not finite: token 44 is poison")
    assert (good.output, good.finish) == expected(good)


@BOTH
def test_every_output_token_has_its_logprobs(depth: int) -> None:
    req = request([1, 2, 3], max_tokens=9, logprobs=0, stop_token_ids=(STOP,))
    run(echo_engine(depth=depth), [req])
    assert [entry.token_id for entry in req.logprobs] == req.output == [1, 2, 3, STOP]
