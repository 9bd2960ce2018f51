"""What may travel: every bad job is refused in one readable line, wherever it is read, and good ones come
back as they went."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import InvalidJob
from headrace.messages import (
    MAX_JOB_BYTES,
    Choice,
    Completion,
    Job,
    Status,
    TokenLogprob,
    Usage,
)


def fields(**changes: Any) -> dict[str, Any]:
    good = {"id": "a", "run": "r", "lane": "l", "kind": "completion", "prompt": "hello"}
    return {k: v for k, v in {**good, **changes}.items() if v is not ...}


BAD = {
    "unknown field": (fields(colour="red"), "colour: unknown field"),
    "unknown parameter": (fields(params={"best_of": 2}), "params.best_of: unknown field"),
    "another version": (fields(v=2), "v: "),
    "no run": (fields(run=...), "run: Field required"),
    "kind of nothing": (fields(kind="poem"), "kind: "),
    "empty prompt": (fields(prompt=""), "prompt: text is empty"),
    "prompt of a wrong type": (fields(prompt=7), "prompt: Input should be a valid string (got '7')"),
    "no prompt": (fields(prompt=...), "give exactly one of messages, prompt, prompt_token_ids (got none)"),
    "two prompts": (fields(prompt_token_ids=[1]), "(got prompt, prompt_token_ids)"),
    "chat without messages": (fields(kind="chat"), "kind chat does not take prompt"),
    "messages without chat": (
        fields(prompt=..., messages=[{"role": "user", "content": "x"}]),
        "kind completion does not take messages",
    ),
    "no messages": (fields(kind="chat", prompt=..., messages=[]), "messages: "),
    "message without content": (fields(kind="chat", prompt=..., messages=[{"role": "user"}]), "content"),
    "image part": (
        fields(kind="chat", prompt=..., messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
        "type",
    ),
    "score without continuation": (fields(kind="score"), "takes one of continuation"),
    "continuation without score": (fields(continuation="x"), "and no other, takes one of continuation"),
    "no token ids": (fields(prompt=..., prompt_token_ids=[]), "prompt_token_ids: "),
    "negative token id": (fields(prompt=..., prompt_token_ids=[-1]), "greater than or equal to 0 (got '-1')"),
    "token id of 32 bits": (fields(prompt=..., prompt_token_ids=[1 << 31]), "less than"),
    "token id of another type": (fields(prompt=..., prompt_token_ids=[True]), "valid integer"),
    "lone surrogate": (fields(prompt="a\ud800b"), "lone surrogate at character 1"),
    "lone surrogate in a name": (fields(id="a\ud800"), "id: "),
    "path as id": (fields(id="../../etc/passwd"), "id: String should match pattern"),
    "id with a line end": (fields(id="a\n"), "id: String should match pattern"),
    "id of 129 characters": (fields(id="a" * 129), "id: String should match pattern"),
    "result stream with braces": (fields(reply_to="{x}"), "reply_to: String should match pattern"),
    "NaN temperature": (fields(params={"temperature": float("nan")}), "params.temperature: "),
    "infinite temperature": (fields(params={"temperature": float("inf")}), "params.temperature: "),
    "negative temperature": (fields(params={"temperature": -0.1}), "params.temperature: "),
    "temperature as text": (fields(params={"temperature": "1"}), "params.temperature: "),
    "temperature as a yes": (fields(params={"temperature": True}), "params.temperature: "),
    "no top_p": (fields(params={"top_p": 0}), "params.top_p: "),
    "n of 0": (fields(params={"n": 0}), "params.n: Input should be greater than or equal to 1 (got '0')"),
    "n of 10,000": (fields(params={"n": 10_000}), "params.n: "),
    "max_tokens of 0": (fields(params={"max_tokens": 0}), "params.max_tokens: "),
    "max_tokens of 65 bits": (fields(params={"max_tokens": 1 << 64}), "params.max_tokens: "),
    "min above max": (fields(params={"max_tokens": 1, "min_tokens": 2}), "min_tokens 2 exceeds max_tokens 1"),
    "100,000 stop strings": (fields(params={"stop": ["x"] * 100_000}), "params.stop: "),
    "empty stop string": (fields(params={"stop": ""}), "params.stop.0: text is empty"),
    "long stop string": (fields(params={"stop": "x" * 2000}), "params.stop.0: "),
    "257 stop ids": (fields(params={"stop_token_ids": [1] * 257}), "params.stop_token_ids: "),
    "bias of no token": (fields(params={"logit_bias": {"hello": 1}}), "'hello' is not a token id"),
    "bias of digits that are none": (fields(params={"logit_bias": {"٣": 1}}), "is not a token id"),
    "bias of 101": (fields(params={"logit_bias": {"1": 101}}), "params.logit_bias.1: "),
    "bias of 2000 tokens": (fields(params={"logit_bias": {str(i): 1 for i in range(2000)}}), "logit_bias"),
    "21 logprobs": (fields(params={"logprobs": 21}), "params.logprobs: "),
    "seed of 65 bits": (fields(params={"seed": 1 << 64}), "params.seed: "),
    "large meta": (fields(meta={"x": "y" * 20_000}), "exceeds the limit of 16384"),
    "meta with a surrogate": (fields(meta={"x": "\ud800"}), "meta cannot be written as JSON"),
    "meta with a 65-bit number": (fields(meta={"x": 1 << 70}), "meta cannot be written as JSON"),
    "deadline of NaN": (fields(deadline=float("nan")), "deadline: "),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_job_is_refused_in_one_line_that_names_the_field(name: str) -> None:
    value, expected = BAD[name]
    with pytest.raises(InvalidJob) as caught:
        Job.build(value)
    text = str(caught.value)
    assert expected in text
    assert "\n" not in text
    assert len(text) < 600
    text.encode()


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b'{"id": "\xff"}', "invalid_json"),
        (b'{"id": "\\ud800"}', "invalid_json"),
        (b"[1]", "invalid_json"),
        (b"null", "invalid_json"),
        (b'{"x":' * 2000 + b"1" + b"}" * 2000, "invalid_json"),
        (b'{"temperature": NaN}', "invalid_json"),
        (b'"' + b"a" * (10 << 20) + b'"', "job_too_large"),
        (b"{}", "invalid_job"),
    ],
)
def test_bytes_that_are_no_job_are_refused_with_a_code(raw: bytes, code: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        Job.parse(raw)
    assert caught.value.code == code
    assert "\n" not in str(caught.value)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ["params", "messages", "prompt", "meta", "id", "prompt_token_ids", "deadline", "stop"]


@given(ANYTHING, st.sampled_from(FIELDS))
def test_no_value_whatever_breaks_the_check(value: Any, field: str) -> None:
    wrong = fields(params={field: value}) if field == "stop" else fields(**{field: value})
    try:
        job = Job.build(wrong)
    except InvalidJob:
        return
    Job.parse(job.to_bytes())


def test_a_prompt_over_the_limit_is_refused_before_it_is_sent() -> None:
    with pytest.raises(InvalidJob, match=f"exceeds the limit of {MAX_JOB_BYTES}"):
        Job.build(fields(prompt="a" * (10 << 20))).to_bytes()


def test_text_of_any_kind_travels_untouched() -> None:
    for text in ("\0", "\ufeffbom", "a\u202eb", "🙂" * 10, "<|im_end|>", "\r\n\t"):
        job = Job.build(fields(prompt=text, meta={"line": text}))
        assert Job.parse(job.to_bytes()) == job


def test_every_field_comes_back_as_it_went() -> None:
    job = Job.build(
        fields(
            kind="chat", prompt=..., messages=[{"role": "user", "content": [{"type": "text", "text": "a"}]}],
            params={"stop": "x", "logit_bias": {5: 1.5}, "seed": -1, "n": 3, "logprobs": 0, "top_k": -1},
            priority="bulk", deadline=2e9, reply_to="mine", meta={"a": [1, None]}, enqueued=1.5,
        )
    )  # fmt: skip
    again = Job.parse(job.to_bytes())
    assert again == job
    assert again.params.stop == ["x"]
    done = Completion(
        id="a", run="r", lane="l", status=Status.OK, usage=Usage(prompt_tokens=1), meta={"a": 1},
        choices=[Choice(text="b", logprobs=[TokenLogprob(token_id=1, logprob=-1.0, rank=1)])],
    )  # fmt: skip
    assert Completion.parse(done.to_bytes()) == done
    assert orjson.loads(done.to_bytes())["v"] == 1


def test_a_default_id_names_what_is_asked_and_not_how_it_travels() -> None:
    one = Job.build(fields(id=...))
    assert len(one.id) == 32
    assert Job.build(fields(id=..., reply_to="x", priority="bulk", enqueued=5.0, deadline=9e9)).id == one.id
    others = [fields(id=..., run="s"), fields(id=..., prompt="b"), fields(id=..., params={"seed": 1})]
    assert len({one.id, *(Job.build(o).id for o in others)}) == 4
