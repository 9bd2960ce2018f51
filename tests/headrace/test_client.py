"""Applications: ask and await, submit in bulk, ask again later; against an engine that echoes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from headrace import Client, InvalidJob, LaneFull, ResultExpired, SyncClient
from headrace.cancels import cancelled
from headrace.messages import Choice, Completion, Job, Status
from tests.headrace.servers import LANE, Lane


@pytest.fixture
def echo(lane: Lane) -> Iterator[Lane]:
    """The lane, with an engine on it."""
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            for one in lane.run(lane.ledger.wait_for_jobs("echo", 50, 50)) or lane.lease("echo"):
                asked = Job.parse(one.raw)
                said = asked.messages[-1].text if asked.messages else asked.prompt or "?"
                done = Completion(
                    id=asked.id, run=asked.run, lane=LANE, status=Status.OK, reply_to=asked.reply_to,
                    choices=[Choice(text=said, score=-1.5)],
                )  # fmt: skip
                lane.run(lane.ledger.finish("echo", [(one, done)]))

    thread = threading.Thread(target=serve)
    thread.start()
    yield lane
    stop.set()
    thread.join()


def test_many_questions_at_once_get_their_own_answers(echo: Lane) -> None:
    async def main() -> None:
        async with Client(echo.url, LANE) as client:
            texts = [f"question {i}" for i in range(100)]
            answers = await asyncio.gather(*(client.generate(t, max_tokens=3) for t in texts))
            assert [a.choices[0].text for a in answers] == texts
            said = await client.chat([{"role": "user", "content": "hello"}], temperature=0)
            assert said.choices[0].text == "hello"
            assert (await client.score("1 + 1 =", " 2")).choices[0].score == -1.5

    asyncio.run(main())


def test_an_answer_can_be_fetched_again_by_id(echo: Lane) -> None:
    async def main() -> None:
        async with Client(echo.url, LANE) as client:
            first = await client.generate("x", id="job-1")
            again = await client.generate("x", id="job-1")
            assert first == again
        async with Client(echo.url, LANE) as other:
            assert (await other.result("job-1", timeout=5)).choices[0].text == "x"
            with pytest.raises(TimeoutError, match="nobody"):
                await other.result("nobody", timeout=0.1)

    asyncio.run(main())


def test_the_same_question_asked_twice_is_two_jobs(echo: Lane) -> None:
    with SyncClient(echo.url, LANE) as client:
        assert client.generate("x").id != client.generate("x").id


def test_one_unreadable_answer_does_not_hold_the_others_up(echo: Lane) -> None:
    with SyncClient(echo.url, LANE) as client:
        client.generate("x")
        echo.redis.xadd(echo.ledger.keys.results(client.reply_to), {"m": b"\xff"})
        echo.redis.xadd(echo.ledger.keys.results(client.reply_to), {"other": b"x"})
        assert client._client._reader is not None
        assert client.generate("y").choices[0].text == "y"
        assert not client._client._reader.done()


def test_a_job_that_was_only_submitted_can_be_fetched(echo: Lane) -> None:
    with SyncClient(echo.url, LANE) as client:
        job = {"kind": "completion", "prompt": "later", "reply_to": client.reply_to}
        assert client.result(client.submit(job), timeout=20).choices[0].text == "later"


def test_an_answer_that_is_no_longer_kept_is_told_apart_from_one_that_never_came(echo: Lane) -> None:
    with SyncClient(echo.url, LANE) as client:
        client.generate("x", id="old")
        echo.redis.delete(echo.ledger.keys.kept("old"))
        with pytest.raises(ResultExpired, match="ended ok"):
            client.generate("x", id="old")


def test_bulk_submits_wait_while_the_lane_is_full(echo: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_LANE_BOUND", "20")
    rows = ({"id": f"j{i}", "run": "bulk", "kind": "completion", "prompt": "x"} for i in range(500))
    with SyncClient(echo.url, LANE) as client:
        assert client.submit_many(rows) == {"new": 500}
        assert client.submit({"id": "j7", "run": "bulk", "kind": "completion", "prompt": "x"}) == "j7"
    assert len(echo.results()) <= 500


def test_a_lane_that_stays_full_is_an_error(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_LANE_BOUND", "1")
    with SyncClient(lane.url, LANE, timeout=0.2) as client:
        client.submit({"kind": "completion", "prompt": "a"})
        with pytest.raises(LaneFull, match="held 1 jobs"):
            client.submit({"kind": "completion", "prompt": "b"})
        runs = lane.redis.execute_command("ZRANGE", lane.ledger.keys.runs, 0, -1)
        assert [client.progress(run.decode()).submitted for run in runs] == [1]


def test_a_bad_job_is_refused_before_it_is_sent(lane: Lane) -> None:
    with SyncClient(lane.url, LANE) as client:
        with pytest.raises(InvalidJob, match="temperature"):
            client.generate("x", temperature=-1)
        with pytest.raises(InvalidJob, match="unknown field"):
            client.generate("x", colour="red")
    assert lane.run(lane.ledger.jobs_waiting()) == 0


def test_a_question_can_be_cancelled_and_its_asker_is_told(lane: Lane) -> None:
    lane.submit("other")

    def engine() -> None:
        one = next(iter(wait_for_cancel(lane)))
        lane.run(lane.ledger.finish("e", [(one, cancelled(Job.parse(one.raw), one))]))

    async def ask() -> tuple[Completion, str]:
        async with Client(lane.url, LANE) as client:
            asked = asyncio.create_task(client.generate("long", id="mine", run="r"))
            while await client.cancel("mine") != "cancelling":
                await asyncio.sleep(0.01)
            thread = threading.Thread(target=engine)
            thread.start()
            done = await asked
            thread.join()
            return done, await client.cancel("mine", "r")

    done, after = asyncio.run(ask())
    assert (done.status, after) == (Status.CANCELLED, "cancelled")


def wait_for_cancel(lane: Lane) -> list:
    return [one for one in lane.lease("e") if one.cancelled]


def test_a_cancelled_run_takes_what_comes_later_with_it(lane: Lane) -> None:
    lane.submit("a", "b")
    lane.submit("c", run="s")
    with SyncClient(lane.url, LANE) as client:
        client.cancel_run("r")
        assert client.cancel("nobody") == "unknown"
        assert client.cancel("c") == "cancelling"
    lane.submit("late")
    assert {Job.parse(one.raw).id for one in lane.lease("e") if one.cancelled} == {"a", "b", "c", "late"}
