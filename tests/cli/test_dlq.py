"""`headrace dlq`: what was given up can be seen, run again and dropped, and no prompt is shown unasked."""

from __future__ import annotations

import json

import pytest

from headrace.cli.main import main
from headrace.messages import Job, Status
from tests.headrace.servers import LANE, Lane, answer, embedded

SECRET = "the prompt that nobody should see"


@pytest.fixture(scope="module")
def server():
    with embedded() as url:
        yield url


@pytest.fixture
def lane(server: str):
    lane = Lane(server)
    lane.redis.flushall()
    yield lane
    lane.store.close()


def bury(lane: Lane, job_id: str, run: str = "r") -> str:
    """A job that killed its engine; returns its letter's name."""
    lane.submit(job_id, run=run, prompt=SECRET, deadline=4e9)
    for rank in (0, 1):
        lane.run(lane.ledger.crashed("e", lane.lease("e"), {"rank": rank, "error": "Traceback ..."}))
    (leased,) = lane.lease("e")
    letter = {"id": job_id, "run": run, "code": "crashes_engine", "at": 1_764_000_000.0}
    done = answer(leased, Status.DEAD)
    assert lane.run(lane.ledger.finish("e", [(leased, done)], {leased.entry_id: letter})) == ["done"]
    return lane.run(lane.ledger.dead_letters())[-1].letter_id


def dlq(lane: Lane, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["dlq", *words, "--redis", lane.url, "--lane", LANE])
    out, err = capsys.readouterr()
    return code, out, err


def test_letters_are_listed_and_shown_without_their_prompts(
    lane: Lane, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = bury(lane, "a"), bury(lane, "b", run="s")
    code, out, err = dlq(lane, capsys, "ls")
    assert code == 0
    assert out.splitlines() == [
        f"{first}  2025-11-24T16:00:00Z  run=r job=a crashes_engine crashes=2 errors=0 bytes=129",
        f"{second}  2025-11-24T16:00:00Z  run=s job=b crashes_engine crashes=2 errors=0 bytes=129",
    ]
    assert "2 dead letters" in err
    assert dlq(lane, capsys, "ls", "--run", "s")[1].startswith(second)
    code, out, _ = dlq(lane, capsys, "show", first)
    shown = json.loads(out)
    assert shown["evidence"] == {"rank": 1, "error": "Traceback ..."}
    assert shown["attempts"]["crashes"] == 2
    assert SECRET not in out
    assert json.loads(dlq(lane, capsys, "show", first, "--raw")[1])["prompt"] == SECRET


def test_a_redriven_job_is_queued_again_under_its_id(lane: Lane, capsys: pytest.CaptureFixture[str]) -> None:
    letter = bury(lane, "a")
    code, out, _ = dlq(lane, capsys, "redrive", letter, "--results", "again")
    assert (code, out) == (0, f"{letter}  job=a new\n")
    (leased,) = lane.lease("e")
    assert leased.failed == 0
    assert b"deadline" not in leased.raw
    assert lane.finish([leased], "e") == ["done"]
    assert [c.id for c in lane.results("again")] == ["a"]
    progress = lane.run(lane.ledger.progress("r"))
    assert (progress.submitted, progress.ok, progress.dead) == (1, 1, 0)
    assert lane.run(lane.ledger.dead_letters()) == []


def test_a_redrive_that_was_cut_can_be_done_again(lane: Lane) -> None:
    bury(lane, "a")
    (letter,) = lane.run(lane.ledger.dead_letters())
    flow = lane.ledger.redrive(letter, Job.parse(letter.raw), 10)
    lane.store.run(next(flow))  # the mark is taken back, and then the command dies
    assert lane.run(lane.ledger.progress("r")).submitted == 0
    assert lane.run(lane.ledger.redrive(letter, Job.parse(letter.raw), 10)) == "new"
    assert lane.run(lane.ledger.progress("r")).submitted == 1


def test_letters_are_dropped_by_name_by_run_or_all(lane: Lane, capsys: pytest.CaptureFixture[str]) -> None:
    first = bury(lane, "a")
    for job_id, run in (("b", "s"), ("c", "s"), ("d", "t")):
        bury(lane, job_id, run)
    assert dlq(lane, capsys, "purge", first)[1] == "1 dead letters dropped\n"
    assert dlq(lane, capsys, "purge", "--run", "s")[1] == "2 dead letters dropped\n"
    assert dlq(lane, capsys, "purge", "--all")[1] == "1 dead letters dropped\n"
    assert lane.redis.xlen(lane.ledger.keys.dead) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["purge"], "exactly one of the three"),
        (["redrive", "1-1", "--all"], "exactly one of the three"),
        (["redrive", "1-1"], "has no letter 1-1"),
        (["show", "1-1"], "has no letter 1-1"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    lane: Lane, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    code, _, err = dlq(lane, capsys, *words)
    assert code == 1
    assert said in err


@pytest.mark.parametrize("words", [[], ["ls"], ["show"], ["redrive"], ["purge"]])
def test_every_verb_has_help_with_examples(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["dlq", *words, "--help"])
    assert "headrace dlq" in capsys.readouterr().out.split("examples:")[1]
