"""Finished requests become one completion: text, stops, logprobs, scores, errors."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from engine.config import ModelSpec
from engine.hf_tokenizer import HFTokenizer
from engine.monitor import TextMonitor
from engine.request import FinishReason, TokenLogprobs
from engine.text import Prepared, complete, failure, prepare
from engine.tokenizer import load_tokenizer
from headrace.messages import Completion, Job, Status
from tests.engine.text import builders as build
from tests.engine.text.drive import CONTEXT, answer, generate, job, say


def test_a_completion_tells_what_happened(tokenizer: HFTokenizer, spec: ModelSpec) -> None:
    ids = tokenizer.encode("hello 你好 fox", special=False)
    j = job(messages=say("hi"), meta={"k": [1]}, reply_to="replies", enqueued=5.0)
    done = answer(j, tokenizer, spec, [*ids, *tokenizer.eos_token_ids])
    assert (done.status, done.id, done.kind, done.meta) == (Status.OK, j.id, j.kind, {"k": [1]})
    assert (done.engine, done.model, done.attempts, done.reply_to) == ("e", "m", 2, "replies")
    choice = done.choices[0]
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("hello 你好 fox", "stop", None)
    assert choice.token_ids == []
    assert done.prompt_token_ids is None
    assert done.usage.completion_tokens == len(ids) + 1
    assert done.timings.enqueued == 5.0
    assert done.timings.finished is not None


def test_token_ids_come_back_on_request_the_stopping_one_too(tokenizer: HFTokenizer, spec: ModelSpec) -> None:
    eos = tokenizer.eos_token_ids[0]
    done = answer(job(prompt="x", return_token_ids=True), tokenizer, spec, [7, 8, eos])
    assert done.choices[0].token_ids == [7, 8, eos]
    assert done.prompt_token_ids == tokenizer.encode_prompt("x")


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("whole", [False, True], ids=["by character", "by token"])
def test_a_stop_string_cuts_the_text_exactly(
    tokenizer: HFTokenizer, spec: ModelSpec, include: bool, whole: bool
) -> None:
    text = "one two END three"
    ids = tokenizer.encode(text, special=False)
    if not whole:
        ids = [i for c in text for i in tokenizer.encode(c, special=False)]
    j = job(prompt="the END", max_tokens=100, stop=["END", "never"], include_stop_str_in_output=include)
    choice = answer(j, tokenizer, spec, ids).choices[0]
    assert choice.text == ("one two END" if include else "one two ")
    assert (choice.finish_reason, choice.stop_reason) == ("stop", "END")


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_a_stop_string_that_is_a_special_token_is_matched_by_id(
    tokenizer: HFTokenizer, spec: ModelSpec, include: bool, skip: bool
) -> None:
    start = tokenizer.token_id("<|im_start|>")
    assert start is not None
    ids = [*tokenizer.encode("hello", special=False), start, 7, 7]
    j = job(
        prompt="x", stop=["<|im_start|>"], skip_special_tokens=skip, include_stop_str_in_output=include,
        ignore_eos=True, return_token_ids=True,
    )  # fmt: skip
    choice = answer(j, tokenizer, spec, ids).choices[0]
    assert choice.text == ("hello<|im_start|>" if include else "hello")
    assert (choice.finish_reason, choice.stop_reason) == ("stop", "<|im_start|>")
    assert choice.token_ids == ids[:-2]


def test_a_stop_token_id_is_named_and_hidden(tokenizer: HFTokenizer, spec: ModelSpec) -> None:
    ids = tokenizer.encode("hello", special=False)
    fox = tokenizer.encode(" x", special=False)[-1]
    for include, text in ((False, "hello"), (True, "hello" + tokenizer.piece(fox).decode())):
        j = job(prompt="x", stop_token_ids=[fox], include_stop_str_in_output=include)
        choice = answer(j, tokenizer, spec, [*ids, fox]).choices[0]
        assert (choice.text, choice.stop_reason) == (text, fox)


def test_no_stop_before_min_tokens(tokenizer: HFTokenizer, spec: ModelSpec) -> None:
    ids = [i for c in "ab ab ab ab" for i in tokenizer.encode(c, special=False)]
    assert len(ids) == 11
    texts = {}
    for least in (0, 1, 2, 5, 11):
        j = job(prompt="x", max_tokens=20, min_tokens=least, stop=["ab"])
        done = answer(j, tokenizer, spec, ids)
        texts[least] = done.choices[0].text
        assert done.usage.completion_tokens >= least
    assert texts == {0: "", 1: "", 2: "ab ", 5: "ab ab ", 11: "ab ab ab ab"}


def test_streamed_text_holds_back_what_may_be_a_stop_string(tokenizer: HFTokenizer, spec: ModelSpec) -> None:
    prepared = prepare(job(prompt="x", stop=["\nUser:"], max_tokens=50), tokenizer, spec, CONTEXT)
    monitor = prepared.requests[0].monitor
    assert isinstance(monitor, TextMonitor)
    deltas = []
    for c in "hi\nUse it\nUser: no":
        stopped = monitor.push(tokenizer.encode(c, special=False)[0])
        deltas.append(monitor.delta())
        if stopped:
            break
    assert deltas[:7] == ["h", "i", "", "", "", "", "\nUse "]
    assert "".join(deltas) == "hi\nUse it" == monitor.text


def test_chat_text_stands_alone_and_completion_text_continues(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(build.sentencepiece(tmp_path)))
    assert isinstance(tokenizer, HFTokenizer)
    spec = build.spec(tokenizer.vocab_size)
    ids = tokenizer.encode("the fox", special=False)
    assert answer(job(messages=say("hi")), tokenizer, spec, ids).choices[0].text == "the fox"
    assert answer(job(prompt="the"), tokenizer, spec, ids).choices[0].text == " the fox"
    for fields, text in (({"messages": say("hi")}, "the "), ({"prompt": "the"}, " the ")):
        assert answer(job(**fields, stop=["fox"]), tokenizer, spec, ids).choices[0].text == text


def test_logprobs_carry_token_texts(tokenizer: HFTokenizer, spec: ModelSpec) -> None:
    j = job(prompt="ab", logprobs=1, prompt_logprobs=0)
    prepared = prepare(j, tokenizer, spec, CONTEXT)
    r = prepared.requests[0]
    a, b = (tokenizer.encode(c, special=False)[0] for c in "ab")
    generate(r, [a])
    r.logprobs = [TokenLogprobs(a, -0.5, 1, ((a, -0.5), (b, -1.5)))]
    r.prompt_logprobs = {i: TokenLogprobs(t, -2.0, 4) for i, t in enumerate(prepared.prompt) if i}
    done = complete(j, prepared, tokenizer)
    assert done.choices[0].logprobs is not None
    assert [(t.token, t.logprob, t.rank) for t in done.choices[0].logprobs] == [("a", -0.5, 1)]
    assert done.choices[0].logprobs[0].top == [(a, "a", -0.5), (b, "b", -1.5)]
    assert done.prompt_logprobs is not None
    assert done.prompt_logprobs[0] is None
    assert [t.token for t in done.prompt_logprobs[1:] if t] == ["b"]


def test_minus_infinity_is_a_number_on_the_wire(tokenizer: HFTokenizer, spec: ModelSpec) -> None:
    j = job(prompt="ab", logprobs=2)
    prepared = prepare(j, tokenizer, spec, CONTEXT)
    generate(prepared.requests[0], [7])
    prepared.requests[0].logprobs = [TokenLogprobs(7, -math.inf, 9, ((3, 0.0), (4, -math.inf)))]
    done = Completion.parse(complete(j, prepared, tokenizer).to_bytes())
    assert done.choices[0].logprobs is not None
    assert done.choices[0].logprobs[0].logprob == -9999.0
    assert [value for _, _, value in done.choices[0].logprobs[0].top] == [0.0, -9999.0]


def test_n_choices_count_the_prompt_once(tokenizer: HFTokenizer, spec: ModelSpec) -> None:
    done = answer(job(prompt="hello", n=2), tokenizer, spec, [7, 8], [9])
    assert [c.index for c in done.choices] == [0, 1]
    assert done.usage.prompt_tokens == len(tokenizer.encode_prompt("hello"))
    assert done.usage.completion_tokens == 3


# -- scores ----------------------------------------------------------------------------------------


def scored(j: Job, prepared: Prepared, tokenizer: HFTokenizer | None, ranks: list[int]) -> Completion:
    r = prepared.requests[0]
    start = r.sampling.score_from
    assert start is not None
    for k, rank in enumerate(ranks):
        r.prompt_logprobs[start + k] = TokenLogprobs(prepared.prompt[start + k], -0.25, rank)
    r.finish = FinishReason.STOP
    return complete(j, prepared, tokenizer)


def test_a_score_sums_the_continuation(tokenizer: HFTokenizer, spec: ModelSpec) -> None:
    j = job(kind="score", prompt_token_ids=[1, 2], continuation_token_ids=[3, 4], logprobs=0)
    prepared = prepare(j, tokenizer, spec, CONTEXT)
    assert (prepared.prompt, prepared.requests[0].sampling.score_from) == ([1, 2, 3, 4], 2)
    done = scored(j, prepared, tokenizer, [1, 1])
    assert (done.choices[0].score, done.choices[0].is_greedy) == (-0.5, True)
    assert len(done.choices[0].logprobs or []) == 2
    assert done.usage.completion_tokens == 0
    done = scored(j, prepared, None, [1, 2])
    assert done.choices[0].is_greedy is False


def test_a_scored_text_is_tokenised_as_one(tokenizer: HFTokenizer, spec: ModelSpec) -> None:
    whole = tokenizer.encode_prompt("the quick brown fox")
    for prompt, continuation in (("the quick ", "brown fox"), ("the quick", " brown fox")):
        prepared = prepare(
            job(kind="score", prompt=prompt, continuation=continuation), tokenizer, spec, CONTEXT
        )
        assert prepared.prompt == whole
        assert prepared.requests[0].sampling.score_from == len(tokenizer.encode_prompt("the quick"))


def test_a_continuation_that_melts_into_the_context_keeps_its_tokens(
    tokenizer: HFTokenizer, spec: ModelSpec
) -> None:
    context, target = (tokenizer.encode(t, special=False) for t in ("use", "r"))
    assert len(tokenizer.encode("user", special=False)) <= len(context), "fewer tokens, not more"
    prepared = prepare(job(kind="score", prompt="use", continuation="r"), tokenizer, spec, CONTEXT)
    assert prepared.prompt == context + target
    assert prepared.requests[0].sampling.score_from == len(context)


def test_a_score_after_nothing_starts_from_bos_or_eos(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    # A context of blanks only goes to the continuation.
    j = job(kind="score", prompt=" ", continuation="the")
    prepared = prepare(j, tokenizer, build.spec(tokenizer.vocab_size), CONTEXT)
    assert prepared.prompt[0] == tokenizer.eos_token_ids[0]
    assert prepared.requests[0].sampling.score_from == 1


# -- jobs without an answer ------------------------------------------------------------------------


def test_an_error_of_the_core_ends_the_job_with_its_reason(tokenizer: HFTokenizer, spec: ModelSpec) -> None:
    j = job(prompt="x", n=2)
    prepared = prepare(j, tokenizer, spec, CONTEXT)
    generate(prepared.requests[0], [7])
    prepared.requests[1].finish = FinishReason.ERROR
    prepared.requests[1].error = ("non_finite_logits", "NaN")
    done = complete(j, prepared, tokenizer)
    assert done.status is Status.ERROR
    assert done.error is not None
    assert (done.error.code, done.error.message, done.choices) == ("non_finite_logits", "NaN", [])
    prepared.requests[1].finish, prepared.requests[1].error = FinishReason.CANCELLED, None
    assert complete(j, prepared, tokenizer).status is Status.CANCELLED


def test_a_failure_keeps_what_the_job_brought(tokenizer: HFTokenizer) -> None:
    j = job(prompt="x", meta={"a": 1}, reply_to="there")
    done = failure(j, "expired", "too late", status=Status.EXPIRED, leased=3.0)
    assert (done.status, done.meta, done.reply_to, done.timings.leased) == (
        Status.EXPIRED, {"a": 1}, "there", 3.0,
    )  # fmt: skip
    assert Completion.parse(done.to_bytes()) == done
