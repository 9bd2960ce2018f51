"""What a run shows while it goes on and when it ends: numbers of the last seconds, not of all time."""

from __future__ import annotations

import io

from headrace.cli.progress import WINDOW_S, Progress, Rates, Snapshot, summary


def at(done: int, total: int | None = 1000, state: str = "") -> Snapshot:
    return Snapshot(
        done, 2, total, prompt_tokens=10, cached_tokens=4, completion_tokens=done * 5, state=state
    )


def test_rates_forget_what_lies_behind_the_window() -> None:
    rates = Rates()
    for second in range(100):
        rates.add(float(second), at(0 if second < 50 else (second - 50) * 10))
    assert round(rates.rows, 3) == 10
    assert round(rates.tokens, 3) == 50
    assert rates.left(at(490)) == (1000 - 490) / rates.rows
    for second in range(100, 100 + int(WINDOW_S) + 1):
        rates.add(float(second), at(490))
    assert rates.rows == 0
    assert rates.left(at(490)) is None


def test_the_time_left_is_unknown_until_the_input_was_read() -> None:
    rates = Rates()
    rates.add(0.0, at(0))
    rates.add(1.0, at(10))
    assert rates.left(at(10, total=None)) is None


def test_without_a_terminal_a_line_says_everything() -> None:
    out = io.StringIO()
    progress = Progress(out)
    progress.show(at(10))
    progress.show(at(20))  # too soon for another line
    progress.close()
    (line,) = out.getvalue().splitlines()
    for part in ("10 of 1,000 rows", "rows/s", "tok/s", "2 failed", "40% prefix hits"):
        assert part in line


def test_a_run_that_waits_says_for_what() -> None:
    out = io.StringIO()
    Progress(out).show(at(0, total=None, state="engine starting"))
    assert out.getvalue() == "0 of ? rows, engine starting\n"


def test_the_summary_counts_rows_by_status() -> None:
    text = summary({"error": 2, "ok": 8}, at(10), made=40, seconds=4.0)
    words = [line.split() for line in text.splitlines()]
    assert words[:3] == [["ok", "8"], ["error", "2"], ["rows", "10"]]
    assert "(10 a second)" in text
    assert "(40.0% prefix hits)" in text
