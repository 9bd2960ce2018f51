"""The audit finds what was planted, and balances what is whole: as a pure function, and on real servers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from headrace.audit import Evidence, balance, gather
from headrace.cli.main import main
from headrace.keys import GROUP
from headrace.messages import Priority
from headrace.runs import RunProgress
from sink.base import Consumer
from sink.jsonl import JsonlTarget
from tests.headrace.servers import LANE, Lane, answer


def whole(n: int = 3) -> Evidence:
    ids = [f"j{i}" for i in range(n)]
    return Evidence(RunProgress(submitted=n, ok=n), dict.fromkeys(ids, "ok"), written=Counter(ids))


def test_a_whole_run_balances() -> None:
    report = balance(whole())
    assert report.balanced
    assert report.lines() == [
        "submitted 3 = 3 ok + 0 error + 0 expired + 0 cancelled + 0 dead", "lost 0, doubled 0"
    ]  # fmt: skip


def test_a_row_that_its_output_lacks_is_lost() -> None:
    e = whole()
    assert e.written is not None
    del e.written["j1"]
    report = balance(e)
    assert (report.lost, report.balanced) == (["j1"], False)
    assert "  lost: j1" in report.lines()
    e.results["j1"] = 1
    assert balance(e).balanced, "its sink has yet to take it"


def test_a_queued_job_that_stands_in_no_stream_is_lost() -> None:
    e = Evidence(RunProgress(submitted=2), {"a": "q", "b": "q"}, Counter(["a"]))
    report = balance(e)
    assert (report.lost, report.waiting, report.balanced) == (["b"], 1, False)


def test_a_row_of_the_manifest_that_nobody_knows_is_lost() -> None:
    """After FLUSHALL the server's own books are as empty as its streams."""
    e = Evidence(RunProgress(), manifest={"a", "b"}, written=Counter(["a"]))
    assert balance(e).lost == ["b"]
    assert not balance(e).balanced


def test_what_stands_twice_is_doubled_wherever_it_does() -> None:
    for place in ("waiting", "results", "written"):
        e = whole()
        getattr(e, place)["j0"] = 2
        assert balance(e).doubled == ["j0"], place
        assert not balance(e).balanced
    e = whole()
    e.results["j0"] = 1
    assert balance(e).balanced, "written and not yet acknowledged is once"


def test_marks_that_a_sink_dropped_are_proven_by_its_output() -> None:
    e = whole()
    e.marks.clear()
    assert balance(e).balanced
    e.written = None
    assert (balance(e).unproven, balance(e).balanced) == (3, False)


def test_counters_that_do_not_add_up_do_not_balance() -> None:
    e = whole()
    e.counters = RunProgress(submitted=4, ok=3)
    assert not balance(e).balanced
    assert balance(e).lines()[0].startswith("submitted 4 !=")


def test_a_long_list_is_cut() -> None:
    e = Evidence(RunProgress(submitted=9), {f"j{i}": "q" for i in range(9)})
    assert [line for line in balance(e).lines() if "more" in line] == ["  lost: and 4 more"]


def written(lane: Lane, path: Path, acknowledge: bool = True) -> None:
    target = JsonlTarget(path, path.with_suffix(".index"))
    target.recover()
    consumer = Consumer(lane.store, lane.ledger, None, "sink", target)
    while consumer.step(1):
        pass
    target.close()


def audit(lane: Lane, *words: str | Path) -> int:
    return main(["audit", "r", "--redis", lane.url, "--lane", LANE, *map(str, words)])


def test_a_run_on_a_server_is_audited_from_submit_to_output(
    lane: Lane, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lane.submit("a", "b", "c")
    lane.submit("d", priority="bulk")
    assert audit(lane) == 1
    assert "4 jobs wait or run" in capsys.readouterr().out
    lane.finish(lane.lease())
    assert audit(lane) == 0
    out = tmp_path / "out.jsonl"
    out.touch()
    assert audit(lane, "--output", out) == 0, "they lie in the result stream"
    written(lane, out)
    assert audit(lane, "--output", out) == 0
    capsys.readouterr()
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[1:] + lines[-1:]))
    assert audit(lane, "--output", out) == 1
    said = capsys.readouterr().out
    assert "lost 1, doubled 1" in said
    assert "  lost: a" in said
    assert "  doubled: d" in said


def test_an_entry_that_vanished_is_named(lane: Lane, capsys: pytest.CaptureFixture[str]) -> None:
    lane.submit("a", "b", "c")
    stream = lane.ledger.keys.jobs(Priority.NORMAL)
    entry = lane.redis.xrange(stream)[1][0]
    lane.redis.xdel(stream, entry)
    assert audit(lane) == 1
    assert "  lost: b" in capsys.readouterr().out


def test_a_job_that_was_put_in_twice_is_named(lane: Lane, capsys: pytest.CaptureFixture[str]) -> None:
    lane.submit("a", "b")
    stream = lane.ledger.keys.jobs(Priority.NORMAL)
    lane.redis.xadd(stream, lane.redis.xrange(stream)[0][1])
    assert audit(lane) == 1
    assert "  doubled: a" in capsys.readouterr().out
    lane.finish(lane.lease())
    assert audit(lane) == 0, "the second was fenced by the mark"


def test_other_runs_and_unreadable_entries_are_left_out(lane: Lane) -> None:
    lane.submit("a")
    lane.submit("b", run="other")
    lane.redis.xadd(lane.ledger.keys.jobs(Priority.NORMAL), {"m": b"{"})
    lane.redis.xadd(lane.ledger.keys.jobs(Priority.NORMAL), {"n": b"1"})
    (a,) = (one for one in lane.lease() if b'"id":"a"' in one.raw)
    lane.run(lane.ledger.finish("a", [(a, answer(a))]))
    assert audit(lane) == 0
    evidence = lane.run(gather(lane.ledger, "r"))
    assert (evidence.marks, evidence.waiting.total(), evidence.results) == ({"a": "ok"}, 0, Counter("a"))


def test_a_job_too_large_for_its_entry_is_seen_waiting(lane: Lane) -> None:
    lane.submit("large", prompt="x" * 100_000)
    assert lane.run(gather(lane.ledger, "r")).waiting == Counter({"large": 1})


def test_many_jobs_are_read_page_by_page(lane: Lane) -> None:
    ids = [f"j{i}" for i in range(2500)]
    lane.submit(*ids)
    for _ in range(3):
        lane.finish(lane.lease(count=500))
    evidence = lane.run(gather(lane.ledger, "r"))
    assert (len(evidence.marks), evidence.waiting.total(), evidence.results.total()) == (2500, 1000, 1500)
    assert lane.redis.xpending(lane.ledger.keys.jobs(Priority.NORMAL), GROUP)["pending"] == 0


def test_an_unknown_run_is_said_to_be_unknown(lane: Lane, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit(lane) == 1
    assert "knows no run r" in capsys.readouterr().err
