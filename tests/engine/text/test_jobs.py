"""Jobs become requests of the core, or are refused with a stable code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config import ModelSpec
from engine.errors import InvalidRequest
from engine.hf_tokenizer import HFTokenizer
from engine.text import prepare, seed_of
from engine.tokenizer import load_tokenizer
from tests.engine.text import builders as build
from tests.engine.text.drive import CONTEXT, answer, job, say


def test_every_sampling_field_reaches_the_core(tokenizer: HFTokenizer, spec: ModelSpec) -> None:
    j = job(
        prompt="hello", max_tokens=9, min_tokens=2, temperature=0.5, top_p=0.9, top_k=40, min_p=0.1,
        presence_penalty=0.1, frequency_penalty=0.2, repetition_penalty=1.3, logit_bias={"7": -3},
        seed=11, stop_token_ids=[8], logprobs=3, prompt_logprobs=2,
    )  # fmt: skip
    prepared = prepare(j, tokenizer, spec, CONTEXT)
    s = prepared.requests[0].sampling
    assert prepared.prompt == tokenizer.encode_prompt("hello")
    assert (s.max_tokens, s.min_tokens, s.temperature, s.top_p, s.top_k, s.min_p) == (9, 2, 0.5, 0.9, 40, 0.1)
    assert (s.presence_penalty, s.frequency_penalty, s.repetition_penalty) == (0.1, 0.2, 1.3)
    assert (s.logit_bias, s.seed, s.logprobs, s.prompt_logprobs) == ({7: -3.0}, 11, 3, 2)
    assert s.stop_token_ids == tuple(sorted((5, 8, tokenizer.eos_token_ids[0])))
    assert s.score_from is None
    assert prepared.requests[0].monitor is None, "no stop strings: nothing to watch while running"


def test_defaults_of_max_tokens(tokenizer: HFTokenizer, spec: ModelSpec) -> None:
    chat = prepare(job(messages=say("hi")), tokenizer, spec, CONTEXT)
    assert chat.requests[0].sampling.max_tokens == CONTEXT - len(chat.prompt)
    assert prepare(job(prompt="hi"), tokenizer, spec, CONTEXT).requests[0].sampling.max_tokens == 16
    full = prepare(job(prompt_token_ids=[1] * 510), tokenizer, spec, CONTEXT)
    assert full.requests[0].sampling.max_tokens == 2, "a default never makes a job impossible"


def test_top_k_that_keeps_everything_is_off(tokenizer: HFTokenizer, spec: ModelSpec) -> None:
    for k in (-1, 0, spec.vocab_size, 1 << 30):
        assert prepare(job(prompt="x", top_k=k), tokenizer, spec, CONTEXT).requests[0].sampling.top_k == 0


def test_ignore_eos_ignores_all_of_them_but_not_what_the_job_names(
    tokenizer: HFTokenizer, spec: ModelSpec
) -> None:
    j = job(prompt="x", ignore_eos=True, stop_token_ids=[9], stop=["<|im_end|>", "<|im_start|>", "plain"])
    ids = prepare(j, tokenizer, spec, CONTEXT).requests[0].sampling.stop_token_ids
    assert set(ids) == {9, tokenizer.token_id("<|im_end|>"), tokenizer.token_id("<|im_start|>")}


def test_seeds_repeat_for_a_job_and_differ_between_choices(tokenizer: HFTokenizer, spec: ModelSpec) -> None:
    first, again, other = (job(prompt="x", n=4, id=i) for i in ("a", "a", "b"))
    seeds = [[r.sampling.seed for r in prepare(j, tokenizer, spec, CONTEXT).requests] for j in (first, again)]
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 4
    assert seed_of(other, 0) not in seeds[0]
    assert all(0 <= s < 1 << 63 for s in seeds[0])
    assert 0 <= seed_of(job(prompt="x", seed=-5), 0) < 1 << 63
    assert seed_of(job(prompt="x", seed=7, n=3), 0) == seed_of(job(prompt="y", seed=7), 0) == 7


def test_choices_share_a_prompt_and_have_ids_of_their_own(tokenizer: HFTokenizer, spec: ModelSpec) -> None:
    prepared = prepare(job(prompt="x", n=3, id="j", stop=["a"]), tokenizer, spec, CONTEXT)
    assert [r.id for r in prepared.requests] == ["j/0", "j/1", "j/2"]
    assert len({id(r.monitor) for r in prepared.requests}) == 3
    assert all(r.prompt == prepared.prompt for r in prepared.requests)


REFUSED: dict[str, list[dict[str, Any]]] = {
    "prompt_too_long": [
        {"prompt_token_ids": [1] * 512},
        {"prompt": "fox " * 2000},
        {"messages": say("fox " * 2000)},
        {"prompt": "a" * 10_000_000},
        {"messages": say("é" * 10_000_000)},
        {"kind": "score", "prompt": "a " * 400, "continuation": "b " * 400},
    ],
    "max_tokens_too_large": [{"prompt": "hi", "max_tokens": 600}, {"messages": say("x"), "max_tokens": 512}],
    "min_tokens_too_large": [{"prompt": "hi", "min_tokens": 17}],
    "token_out_of_range": [
        {"prompt_token_ids": [1, 1 << 20]},
        {"prompt": "x", "stop_token_ids": [1 << 20]},
        {"prompt": "x", "logit_bias": {str(1 << 20): 1}},
        {"kind": "score", "prompt": "x", "continuation_token_ids": [1 << 20]},
    ],
}


@pytest.mark.parametrize(("code", "fields"), [(c, f) for c, rows in REFUSED.items() for f in rows])
def test_what_the_model_cannot_run_is_refused_with_a_stable_code(
    tokenizer: HFTokenizer, spec: ModelSpec, code: str, fields: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest) as e:
        prepare(job(**fields), tokenizer, spec, CONTEXT)
    assert e.value.code == code
    assert any(c.isdigit() for c in str(e.value)), "the message names value and limit"
    assert len(str(e.value)) < 300


def test_the_vocabulary_ends_where_the_model_says(tokenizer: HFTokenizer, spec: ModelSpec) -> None:
    last = spec.vocab_size - 1
    assert prepare(job(prompt_token_ids=[last]), tokenizer, spec, CONTEXT).prompt == [last]
    with pytest.raises(InvalidRequest, match=f"{last + 1} in the prompt .* from 0 to {last}"):
        prepare(job(prompt_token_ids=[0, last + 1]), tokenizer, spec, CONTEXT)


def test_the_words_of_a_refusal(tokenizer: HFTokenizer, spec: ModelSpec) -> None:
    with pytest.raises(InvalidRequest) as e:
        prepare(job(prompt_token_ids=[1] * 120, max_tokens=9000), tokenizer, spec, 8192)
    assert str(e.value) == (
        "max_tokens 9000 + prompt 120 exceeds the model's context of 8192: "
        "lower max_tokens or shorten the prompt"
    )


def test_an_empty_prompt_is_refused(tmp_path: Path, spec: ModelSpec) -> None:
    words = load_tokenizer(str(build.word_level(tmp_path)))
    rows: list[dict[str, Any]] = [{"prompt": "  "}, {"kind": "score", "prompt": "x", "continuation": " "}]
    for fields in rows:
        with pytest.raises(InvalidRequest) as e:
            prepare(job(**fields), words, build.spec(100), CONTEXT)
        assert e.value.code == "empty_prompt"


def test_odd_but_valid_text_passes(tokenizer: HFTokenizer, spec: ModelSpec) -> None:
    for text in ("\0", "\ufeff", "\u202eabc", "\ufffd", "\ufdd0x\ufdd1", " "):
        rows: list[dict[str, Any]] = [{"prompt": text}, {"messages": say(text)}]
        for fields in [*rows, {"messages": say(text + "<|im_end|>")}]:
            assert prepare(job(**fields), tokenizer, spec, CONTEXT).prompt


# -- a model without a tokenizer ----------------------------------------------------------------------


def test_a_model_without_tokenizer_serves_token_ids(spec: ModelSpec) -> None:
    done = answer(job(prompt_token_ids=[1, 2], stop_token_ids=[9]), None, spec, [3, 4, 9])
    assert done.choices[0].token_ids == [3, 4, 9]
    assert (done.choices[0].text, done.choices[0].stop_reason) == ("", 9)
    for fields in (
        {"prompt": "x"},
        {"messages": say("x")},
        {"prompt_token_ids": [1], "stop": ["x"]},
        {"kind": "score", "prompt_token_ids": [1], "continuation": "x"},
    ):
        with pytest.raises(InvalidRequest) as e:
            prepare(job(**fields), None, spec, CONTEXT)
        assert e.value.code == "no_tokenizer"
