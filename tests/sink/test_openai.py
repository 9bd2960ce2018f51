"""The output line is OpenAI's: what a client of the real `openai` package parses, and what it means."""

from __future__ import annotations

import math
from typing import Any

import orjson
import pytest
from openai.types import Completion as TextCompletion
from openai.types.chat import ChatCompletion

from headrace.messages import (
    Choice,
    Completion,
    ErrorInfo,
    Kind,
    Status,
    Timings,
    TokenLogprob,
    Usage,
)
from sink.openai import LOWEST_LOGPROB, batch_line

LOGPROBS = [
    TokenLogprob(token_id=5, token="né", logprob=-0.5, rank=1, top=[(5, "né", -0.5), (6, "x", -1.5)]),
    TokenLogprob(token_id=7, token=None, logprob=-math.inf, rank=90, top=[(8, "y", -0.1)]),
]


def completion(kind: Kind, **more: Any) -> Completion:
    choice = Choice(index=0, text="né!", finish_reason="stop", logprobs=LOGPROBS, token_ids=[5, 7])
    fields: dict[str, Any] = {
        "id": "ab" * 16,
        "run": "r",
        "lane": "l",
        "kind": kind,
        "status": Status.OK,
        "choices": [choice],
        "usage": Usage(prompt_tokens=9, cached_tokens=4, completion_tokens=2),
        "timings": Timings(enqueued=1.0, finished=1700000000.9),
        "model": "m",
        "meta": {"custom_id": "q1", "line": 1},
    }
    return Completion(**(fields | more))


def line(c: Completion) -> dict[str, Any]:
    return orjson.loads(orjson.dumps(batch_line(c)))


def body(c: Completion) -> dict[str, Any]:
    return line(c)["response"]["body"]


def test_the_line_is_a_batch_output_line() -> None:
    got = line(completion(Kind.CHAT))
    assert set(got) == {"id", "custom_id", "response", "error"}
    assert (got["id"], got["custom_id"], got["error"]) == ("batch_req_" + "ab" * 16, "q1", None)
    assert got["response"]["status_code"] == 200
    assert got["response"]["request_id"] == "ab" * 16


def test_a_chat_body_parses_as_the_clients_chat_completion() -> None:
    raw = body(completion(Kind.CHAT))
    got = ChatCompletion.model_validate(raw, strict=True)
    (choice,) = got.choices
    assert (choice.message.content, choice.message.role, choice.finish_reason) == ("né!", "assistant", "stop")
    assert got.created == 1700000000
    assert got.usage is not None
    assert got.usage.total_tokens == 11
    assert got.usage.prompt_tokens_details is not None
    assert got.usage.prompt_tokens_details.cached_tokens == 4
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    first, second = choice.logprobs.content
    assert (first.token, first.bytes, first.logprob) == ("né", [110, 195, 169], -0.5)
    assert [t.token for t in first.top_logprobs] == ["né", "x"]
    assert (second.token, second.logprob) == ("token_id:7", LOWEST_LOGPROB)
    assert raw["choices"][0]["token_ids"] == [5, 7]


def test_a_completion_body_parses_as_the_clients_text_completion() -> None:
    got = TextCompletion.model_validate(body(completion(Kind.COMPLETION)), strict=True)
    (choice,) = got.choices
    assert (choice.text, choice.finish_reason, got.object) == ("né!", "stop", "text_completion")
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["né", "token_id:7"]
    assert choice.logprobs.text_offset == [0, 2]
    assert choice.logprobs.top_logprobs == [{"né": -0.5, "x": -1.5}, {"y": -0.1}]


def test_what_was_not_asked_for_is_absent() -> None:
    plain = Choice(text="a", finish_reason="length")
    chat = body(completion(Kind.CHAT, choices=[plain]))["choices"][0]
    assert chat["logprobs"] is None
    assert "token_ids" not in chat
    ChatCompletion.model_validate(body(completion(Kind.CHAT, choices=[plain])), strict=True)
    bare = Choice(text="a", finish_reason="length", logprobs=[TokenLogprob(token_id=1, logprob=-1, rank=1)])
    assert body(completion(Kind.COMPLETION, choices=[bare]))["choices"][0]["logprobs"]["top_logprobs"] is None


def test_all_n_choices_are_in_the_body() -> None:
    choices = [Choice(index=i, text=str(i), finish_reason="stop") for i in range(3)]
    got = ChatCompletion.model_validate(body(completion(Kind.CHAT, choices=choices)))
    assert [(c.index, c.message.content) for c in got.choices] == [(0, "0"), (1, "1"), (2, "2")]


def test_a_score_body_carries_the_log_likelihood() -> None:
    choice = Choice(score=-3.25, is_greedy=True)
    got = body(completion(Kind.SCORE, choices=[choice]))
    assert (got["object"], got["score"], got["is_greedy"]) == ("score", -3.25, True)
    impossible = body(completion(Kind.SCORE, choices=[Choice(score=-math.inf, is_greedy=False)]))
    assert impossible["score"] == LOWEST_LOGPROB


def test_prompt_logprobs_stand_in_vllms_form() -> None:
    got = body(completion(Kind.COMPLETION, prompt_token_ids=[1, 5], prompt_logprobs=[None, LOGPROBS[0]]))
    assert got["prompt_token_ids"] == [1, 5]
    assert got["prompt_logprobs"][0] is None
    assert got["prompt_logprobs"][1]["6"] == {"logprob": -1.5, "rank": 2, "decoded_token": "x"}


@pytest.mark.parametrize(
    ("status", "given", "code"),
    [
        (Status.ERROR, "prompt_too_long", "prompt_too_long"),
        (Status.DEAD, "engine_crashed", "engine_crashed"),
        (Status.EXPIRED, "deadline", "batch_expired"),
        (Status.CANCELLED, None, "batch_cancelled"),
        (Status.ERROR, None, "error"),
    ],
)
def test_a_failed_row_has_an_error_and_no_response(status: Status, given: str | None, code: str) -> None:
    error = ErrorInfo(code=given, message="why") if given else None
    got = line(completion(Kind.CHAT, status=status, choices=[], error=error))
    assert got["response"] is None
    assert got["error"]["code"] == code
    assert got["error"]["message"]
    assert got["custom_id"] == "q1"


def test_a_job_without_a_custom_id_is_named_by_its_id() -> None:
    assert line(completion(Kind.CHAT, meta={}))["custom_id"] == "ab" * 16
