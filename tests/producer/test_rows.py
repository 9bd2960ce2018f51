"""Promises of the input side that need no server: every line ends as one job or one error, in flat memory."""

from __future__ import annotations

import io
import resource
from pathlib import Path

import orjson
import pytest

from headrace.messages import Completion, Job, Kind, Status
from producer.lines import MAX_LINE_BYTES, InputError, is_text, open_input, read_lines
from producer.rows import Row, RowParser

PARSER = RowParser(run="run", lane="lane", reply_to="run")
USER = [{"role": "user", "content": "hi"}]


def rows(*lines: bytes, parser: RowParser = PARSER) -> list[Row]:
    return [parser.parse(line) for line in read_lines(io.BytesIO(b"\n".join(lines)))]


def row(value: object) -> Row:
    (only,) = rows(orjson.dumps(value))
    return only


def job(value: object) -> Job:
    item = row(value).item
    assert isinstance(item, Job), item.error
    return item


def error(raw: bytes) -> tuple[str, str]:
    (only,) = rows(raw)
    assert isinstance(only.item, Completion)
    assert only.item.status is Status.ERROR
    assert only.item.error is not None
    return only.item.error.code, only.item.error.message


def chat(**body: object) -> dict[str, object]:
    return {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": USER} | body,
    }


def text(**body: object) -> dict[str, object]:
    return {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "m", "prompt": "hi"} | body,
    }


def test_a_batch_chat_line_becomes_a_chat_job_with_openai_names_mapped() -> None:
    got = job(chat(max_completion_tokens=7, logprobs=True, top_logprobs=3, stop="x", seed=5, n=2, top_k=4))
    assert got.kind is Kind.CHAT
    assert got.messages is not None
    assert got.messages[0].text == "hi"
    assert (got.params.max_tokens, got.params.logprobs, got.params.stop) == (7, 3, ["x"])
    assert (got.params.seed, got.params.n, got.params.top_k) == (5, 2, 4)
    assert got.meta == {"custom_id": "a", "line": 1, "endpoint": "/v1/chat/completions"}
    assert got.reply_to == "run"


def test_a_batch_completion_line_takes_text_or_token_ids() -> None:
    assert job(text(logprobs=2)).params.logprobs == 2
    assert job(text(prompt=[1, 2])).prompt_token_ids == [1, 2]
    assert job(text(prompt=["hi"])).prompt == "hi"


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({"prompt": "p", "max_tokens": 3}, Kind.COMPLETION),
        ({"messages": USER, "temperature": 0}, Kind.CHAT),
        ({"prompt_token_ids": [1]}, Kind.COMPLETION),
        ({"kind": "score", "prompt": "p", "continuation": "c"}, Kind.SCORE),
        ({"prompt_token_ids": [1], "continuation_token_ids": [2]}, Kind.SCORE),
    ],
)
def test_bare_lines_are_understood(value: dict[str, object], kind: Kind) -> None:
    got = job(value)
    assert got.kind is kind
    assert got.meta["custom_id"] == "row-1"


def test_a_text_file_holds_one_prompt_a_line_and_blank_lines_are_passed_over() -> None:
    parser = RowParser(run="run", lane="lane", text=True)
    got = rows(b"\xef\xbb\xbffirst \r", b"", b'{"prompt": 1}', parser=parser)
    assert [r.item.prompt for r in got if isinstance(r.item, Job)] == ["first ", '{"prompt": 1}']
    assert [r.custom_id for r in got] == ["row-1", "row-3"]
    assert is_text("a/b.TXT")
    assert not is_text("-")


def test_fields_that_ask_for_nothing_are_accepted() -> None:
    neutral = {
        "stream": False, "tools": None, "tool_choice": "none", "response_format": {"type": "text"},
        "user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "temperature": None,
    }  # fmt: skip
    assert job(chat(**neutral)).params == job(chat()).params
    assistant = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None}
    assert job(chat(messages=[*USER, assistant])).messages is not None


@pytest.mark.parametrize(
    ("value", "code", "word"),
    [
        (chat(stream=True), "unsupported_field", "stream"),
        (chat(tools=[{"type": "function"}]), "unsupported_field", "tools"),
        (chat(response_format={"type": "json_object"}), "unsupported_field", "response_format"),
        (chat(reasoning_effort="high"), "unsupported_field", "reasoning_effort"),
        (text(echo=True), "unsupported_field", "echo"),
        (text(best_of=3), "unsupported_field", "best_of"),
        (text(prompt=["a", "b"]), "unsupported_field", "2 prompts"),
        (text(prompt=[[1], [2]]), "unsupported_field", "2 prompts"),
        (chat(colour="red"), "unknown_field", "colour"),
        (chat() | {"colour": "red"}, "unknown_field", "colour"),
        ({"prompt": "a", "maxtokens": 3}, "unknown_field", "maxtokens"),
        (chat() | {"url": "/v1/embeddings"}, "unsupported_endpoint", "/v1/embeddings"),
        (chat() | {"method": "GET"}, "invalid_job", "POST"),
        (chat() | {"body": [1]}, "invalid_job", "array"),
        ({"custom_id": "a", "url": "/v1/completions"}, "invalid_job", "method, body"),
        (chat(max_tokens=1, max_completion_tokens=2), "invalid_job", "differ"),
        (chat(top_logprobs=2), "invalid_job", "top_logprobs"),
        (text(logprobs=True), "invalid_job", "logprobs"),
        (chat(model=5), "invalid_job", "model"),
        (chat(messages="hi"), "invalid_job", "messages"),
        (chat(messages=[]), "empty_prompt", "empty"),
        ({"prompt": ""}, "empty_prompt", "empty"),
        ({"prompt_token_ids": []}, "empty_prompt", "empty"),
        ({"prompt": 5}, "invalid_job", "prompt"),
        ({"prompt": "a", "messages": USER}, "invalid_job", "exactly one"),
        ({"max_tokens": 4}, "invalid_job", "none"),
        ({"prompt": "a", "max_tokens": "4"}, "invalid_job", "max_tokens"),
        ({"prompt": "a", "max_tokens": 0}, "invalid_job", "max_tokens"),
        ({"prompt": "a", "temperature": -0.5}, "invalid_job", "temperature"),
        ({"prompt": "a", "n": 0}, "invalid_job", "params.n"),
        ({"prompt": "a", "n": 10_000}, "invalid_job", "params.n"),
        ({"prompt": "a", "stop": ["s"] * 100_000}, "invalid_job", "stop"),
        ({"prompt_token_ids": [1, -5]}, "invalid_job", "prompt_token_ids.1"),
        ({"prompt_token_ids": [1 << 40]}, "invalid_job", "prompt_token_ids"),
        ({"kind": "embed", "prompt": "a"}, "invalid_job", "kind"),
        ({"custom_id": 5, "prompt": "a"}, "invalid_job", "custom_id"),
        ({"custom_id": "x" * 600, "prompt": "a"}, "invalid_job", "512"),
        ({"prompt": "a" * (2 << 20)}, "job_too_large", "shorten"),
    ],
)
def test_a_bad_row_is_answered_with_one_error_that_names_the_fault(
    value: object, code: str, word: str
) -> None:
    got, message = error(orjson.dumps(value))
    assert (got, word in message) == (code, True), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b'{"prompt": "a"', "invalid_json"),
        (b"[1, 2]", "invalid_json"),
        (b"nonsense", "invalid_json"),
        (b'{"prompt": NaN}', "invalid_json"),
        (b'{"prompt": "a", "temperature": NaN}', "invalid_json"),
        (b'{"prompt": "\\ud800"}', "invalid_json"),
        (b'{"prompt": "\xff"}', "invalid_utf8"),
        (b'\xef\xbb\xbf\xef\xbb\xbf{"prompt": "a"}', "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
    ],
)
def test_a_line_that_is_no_json_object_is_answered_with_one_error(raw: bytes, code: str) -> None:
    assert error(raw)[0] == code


def test_nul_and_exotic_text_reach_the_job_unchanged() -> None:
    strange = "a\x00b\u202e\ufeff\U0001f600"
    assert job({"prompt": strange}).prompt == strange


def test_neighbours_of_bad_rows_are_unharmed() -> None:
    good = b'{"prompt": "x"}'
    got = rows(good, b"{", b"\xff\xfe", b'{"prompt": "' + b"y" * 10_000_000 + b'"}', good, b"]", good)
    assert [isinstance(r.item, Job) for r in got] == [True, False, False, False, True, False, True]
    assert got[3].item.error is not None
    assert got[3].item.error.code == "line_too_long"


def test_a_line_of_any_length_costs_no_memory() -> None:
    class Endless(io.RawIOBase):
        """300 MB without a line end, then one good row."""

        left = 300 << 20
        tail = b'\n{"prompt": "x"}\n'

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:
            n = min(len(buffer), self.left)
            if n:
                buffer[:n] = b"z" * n
                self.left -= n
                return n
            n = len(self.tail)
            buffer[:n] = self.tail
            self.tail = b""
            return n

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    got = [PARSER.parse(line) for line in read_lines(io.BufferedReader(Endless()))]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert [type(r.item) for r in got] == [Completion, Job]
    assert grown < 40_000, f"{grown} KiB"
    assert MAX_LINE_BYTES < 10 << 20


def test_a_row_keeps_its_identity_when_lines_move_and_changes_it_with_its_content() -> None:
    first = rows(orjson.dumps(chat()))[0]
    moved = rows(b'{"prompt": "new first line"}', orjson.dumps(chat(user="other")))[1]
    changed = row(chat(max_tokens=5))
    elsewhere = rows(orjson.dumps(chat()), parser=RowParser(run="other", lane="lane"))[0]
    assert first.id == moved.id
    assert first.key == moved.key == changed.key
    assert len({first.id, changed.id, elsewhere.id}) == 3


def test_a_bad_row_gets_the_same_id_in_every_pass() -> None:
    assert row({"prompt": ""}).id == row({"prompt": ""}).id
    assert rows(b"{")[0].id == rows(b"{")[0].id
    assert rows(b"{")[0].id != rows(b"{{")[0].id
    twice = rows(b"{", b"{")
    assert twice[0].id != twice[1].id


def test_inputs_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "utf16.jsonl").write_bytes('{"prompt": "a"}'.encode("utf-16"))
    for path, word in [("missing.jsonl", "does not exist"), (".", "folder"), ("utf16.jsonl", "UTF-16")]:
        with pytest.raises(InputError, match=word), open_input(str(tmp_path / path)):
            pass
