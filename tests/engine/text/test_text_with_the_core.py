"""The text layer on the real engine core: rows stop, score and answer as their jobs asked.

The executor is the echo model, whose output repeats the prompt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.exec.echo import LOGPROB, EchoExecutor, echo_spec
from engine.hf_tokenizer import HFTokenizer
from engine.text import complete, prepare
from engine.tokenizer import load_tokenizer
from headrace.messages import Completion, Job
from tests.engine.text import builders as build


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HFTokenizer:
    found = load_tokenizer(str(build.byte_level(tmp_path_factory.mktemp("byte-level"))))
    assert isinstance(found, HFTokenizer)
    return found


def answers(tokenizer: HFTokenizer, depth: int, *jobs: dict[str, Any]) -> list[Completion]:
    """All jobs run together."""
    spec = echo_spec(tokenizer.vocab_size, 512)
    config = EngineConfig(model="echo", num_kv_blocks=200, max_num_seqs=8, overlap_depth=depth)
    engine = Engine(config, spec, EchoExecutor(config))
    engine.start()
    prepared = []
    for fields in jobs:
        params = {k: fields.pop(k) for k in list(fields) if k not in Job.model_fields}
        kind = fields.pop("kind", "completion")
        job = Job.build({"run": "r", "lane": "l", "kind": kind, "params": params, **fields})
        prepared.append((job, prepare(job, tokenizer, spec, 512)))
        for request in prepared[-1][1].requests:
            engine.add(request)
    while engine.has_work:
        engine.step()
    engine.stop()
    return [complete(job, p, tokenizer) for job, p in prepared]


@pytest.mark.parametrize("depth", [0, 1])
def test_rows_stop_where_their_jobs_say(tokenizer: HFTokenizer, depth: int) -> None:
    text = "one 😀 two END three"
    plain, cut, kept, special, short = answers(
        tokenizer,
        depth,
        {"prompt": text, "max_tokens": 100},
        {"prompt": text, "max_tokens": 100, "stop": ["END"], "n": 2},
        {"prompt": text, "max_tokens": 100, "stop": ["END"], "include_stop_str_in_output": True},
        {"prompt": "a<|im_start|>b", "max_tokens": 100, "stop": ["<|im_start|>"], "ignore_eos": True},
        {"prompt": text, "max_tokens": 2, "return_token_ids": True},
    )
    assert (plain.choices[0].text, plain.choices[0].finish_reason) == (text, "stop")
    assert [(c.text, c.stop_reason) for c in cut.choices] == [("one 😀 two ", "END")] * 2
    assert kept.choices[0].text == "one 😀 two END"
    assert (special.choices[0].text, special.choices[0].stop_reason) == ("a", "<|im_start|>")
    assert (short.choices[0].finish_reason, len(short.choices[0].token_ids)) == ("length", 2)
    assert text.startswith(short.choices[0].text)


def test_scores_and_logprobs_carry_their_texts(tokenizer: HFTokenizer) -> None:
    score, logprobs = answers(
        tokenizer,
        0,
        {"kind": "score", "prompt": "hello", "continuation": " fox", "logprobs": 0},
        {"prompt": "hello", "max_tokens": 2, "logprobs": 0, "prompt_logprobs": 0},
    )
    scored = score.choices[0].logprobs
    assert scored is not None
    assert "".join(t.token or "" for t in scored) == " fox"
    assert score.choices[0].score == pytest.approx(LOGPROB * len(scored))
    assert score.usage.completion_tokens == 0
    assert len(logprobs.choices[0].logprobs or []) == 2
    assert logprobs.prompt_logprobs is not None
    assert [t is None for t in logprobs.prompt_logprobs] == [
        i == 0 for i in range(logprobs.usage.prompt_tokens)
    ]


def test_a_prompt_that_ends_inside_a_character_is_completed(tokenizer: HFTokenizer, tmp_path: Path) -> None:
    whole = tokenizer.encode("🤖", special=False)
    assert len(whole) > 1
    # The echo of a prompt that ends after half of the character begins with the prompt's first token.
    (done,) = answers(tokenizer, 0, {"prompt_token_ids": whole[1:] + whole[:1], "max_tokens": len(whole) - 1})
    assert done.choices[0].text == "🤖"
