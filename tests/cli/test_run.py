"""`headrace run`: every row of the input is answered once, and the same command continues."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

import pytest

from headrace.embedded import EmbeddedServer
from tests.cli.trees import Job, children, ended, kill_tree, wait_for


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_every_row_is_answered_once_and_a_second_run_runs_nothing(job: Job) -> None:
    job.write_many(500)
    first = job.run()
    assert first.code == 0, first.err
    assert sorted(job.ids()) == sorted(f"q-{i}" for i in range(500))
    assert "ok                         500" in first.out
    before = job.output.read_bytes()
    second = job.run(engine="--fail-at-start")
    assert second.code == 0, second.err
    assert "nothing was left to run" in second.err
    assert job.output.read_bytes() == before


def test_all_input_forms_run_and_bad_rows_are_answered_beside_good_ones(job: Job) -> None:
    job.write(
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions",
         "body": {"model": "m", "messages": [{"role": "user", "content": "hi a"}]}},
        {"custom_id": "b", "prompt": "hi b"},
        b"{ malformed",
        {"prompt_token_ids": [1, 2]},
        {"kind": "score", "prompt": "1 + 1 =", "continuation": " 2"},
        {"custom_id": "b", "prompt": "again"},
        {"custom_id": "c", "prompt": "FAIL"},
        {"custom_id": "d", "prompt": "x", "colour": "red"},
    )  # fmt: skip
    result = job.run()
    assert result.code == 2, result.err
    rows = job.rows()
    assert len(rows) == 8
    codes = Counter(row["error"]["code"] for row in rows if row["error"])
    assert codes == {"invalid_json": 1, "duplicate_custom_id": 1, "told_to_fail": 1, "unknown_field": 1}
    bodies = {row["custom_id"]: row["response"]["body"] for row in rows if row["response"]}
    assert bodies["a"]["choices"][0]["message"]["content"] == "hi a"
    assert bodies["b"]["choices"][0]["text"] == "hi b"
    assert bodies["row-5"]["score"] == -1.5
    assert job.run().code == 2, "failed rows are remembered, and not run again"
    assert len(job.rows()) == 8


def test_failed_rows_go_to_the_error_file_when_one_is_named(job: Job) -> None:
    job.write({"prompt": "fine"}, {"prompt": "FAIL"}, b"{")
    errors = job.folder / "errors.jsonl"
    assert job.run(f"error_file={errors}").code == 2
    assert [row["custom_id"] for row in job.rows()] == ["row-1"]
    assert sorted(row["custom_id"] for row in job.rows(errors)) == ["row-2", "row-3"]


def test_rows_come_from_standard_input(job: Job) -> None:
    result = ended(job.start(source="-"), '{"prompt": "a"}\n{"prompt": "b"}\n')
    assert result.code == 0, result.err
    assert sorted(job.ids()) == ["row-1", "row-2"]


def test_ctrl_c_ends_a_run_that_waits_for_standard_input(job: Job) -> None:
    process = job.start(source="-")
    wait_for(lambda: job.state.exists() and children(process))
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130


def test_a_text_file_holds_one_prompt_a_line(job: Job) -> None:
    text = job.folder / "in.txt"
    text.write_text("first\n\nsecond\n")
    result = ended(job.start(source=str(text)))
    assert result.code == 0, result.err
    answers = {row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in job.rows()}
    assert answers == {"row-1": "first", "row-3": "second"}


def test_an_empty_input_is_done_at_once(job: Job) -> None:
    job.input.write_bytes(b"\n")
    result = job.run(engine="--fail-at-start")
    assert result.code == 0, result.err
    assert job.output.read_bytes() == b""


def test_an_engine_that_cannot_start_is_reported_in_one_line(job: Job) -> None:
    job.write({"prompt": "a"})
    result = job.run(engine="--fail-at-start")
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith("headrace: error: the model has no weights")
    assert "Traceback" not in result.err


def test_rows_added_to_the_file_are_run_and_the_old_ones_are_not(job: Job) -> None:
    job.write_many(10)
    assert job.run().code == 0
    job.write_many(25)
    assert job.run().code == 0
    assert Counter(job.ids()) == Counter(f"q-{i}" for i in range(25))


def test_a_row_that_changed_is_refused_and_fresh_starts_over(job: Job) -> None:
    job.write({"custom_id": "a", "prompt": "one"}, {"custom_id": "b", "prompt": "two"})
    assert job.run().code == 0
    before = job.output.read_bytes()
    job.write({"custom_id": "a", "prompt": "one"}, {"custom_id": "b", "prompt": "changed"})
    result = job.run()
    assert result.code == 1
    assert "'b' changed" in result.err
    assert "--fresh" in result.err
    assert job.output.read_bytes() == before
    assert job.run("fresh=1").code == 0
    texts = {row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in job.rows()}
    assert texts == {"a": "one", "b": "changed"}


def test_another_model_is_refused(job: Job) -> None:
    job.write({"prompt": "a"})
    assert job.run().code == 0
    result = job.run(model="other")
    assert result.code == 1
    assert "with model m, and this is other: --fresh" in result.err
    assert job.run("fresh=1", model="other").code == 0


def test_after_a_start_that_failed_everything_may_change(job: Job) -> None:
    job.write({"custom_id": "a", "prompt": "one"})
    assert job.run(engine="--fail-at-start", model="broken").code == 1
    job.write({"custom_id": "a", "prompt": "two"})
    result = job.run(model="mended")
    assert result.code == 0, result.err
    assert job.rows()[0]["response"]["body"]["choices"][0]["text"] == "two"


def test_an_output_of_unknown_origin_is_not_overwritten(job: Job) -> None:
    job.write({"prompt": "a"})
    job.output.write_text("precious\n")
    result = job.run()
    assert result.code == 1
    assert "--fresh" in result.err
    assert job.output.read_text() == "precious\n"


def test_two_runs_cannot_write_one_output(job: Job) -> None:
    job.write_many(1000)
    process = job.start(engine="--per-second 20")
    wait_for(job.ids)
    for more in ([], ["fresh=1"]):
        result = job.run(*more)
        assert result.code == 1
        assert "another headrace run writes" in result.err
    kill_tree(process)


def test_a_run_uses_an_outside_server_when_told(job: Job, tmp_path: Path) -> None:
    job.write_many(300)
    with EmbeddedServer(tmp_path / "elsewhere") as server:
        result = job.run(f"redis={server.url}", "run=night")
        assert result.code == 0, result.err
        assert job.run(f"redis={server.url}", "run=night", engine="--fail-at-start").code == 0
        assert job.run(f"redis={server.url}", "run=other").code == 1
        assert job.run(f"redis={server.url}", "run=night", "fresh=1").code == 0
    assert not (job.state / "server").exists()
    assert Counter(job.ids()) == Counter(f"q-{i}" for i in range(300))


def test_a_server_that_cannot_be_reached_is_named(job: Job) -> None:
    job.write({"prompt": "a"})
    result = job.run("redis=redis://:secret@127.0.0.1:1/0")
    assert result.code == 1
    assert "cannot reach Redis" in result.err
    assert "secret" not in result.err
    assert not job.output.exists()
