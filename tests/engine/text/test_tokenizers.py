"""Tokenizers are read from model folders as data, and agree with transformers."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from engine.detokenizer import decode
from engine.errors import ConfigError, InvalidRequest
from engine.hf_tokenizer import HFTokenizer
from engine.tokenizer import eos_token_ids, load_tokenizer
from tests.engine.text import builders as build

TEXTS = [
    "hello", " leading", "trailing ", "two  spaces", "naïve café 你好 😀", "e\u0301 decomposed", "\0 nul",
    "\ufeffbom", "\u202ebidi", "\n\n\tlines\r\n", "a<|im_end|>b</s>c<think>d", "",
]  # fmt: skip


def load(folder: Path) -> HFTokenizer:
    tokenizer = load_tokenizer(str(folder))
    assert isinstance(tokenizer, HFTokenizer)
    return tokenizer


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (build.byte_level, {}),
        (build.byte_level, {"add_bos_token": True, "bos_token": "<|endoftext|>"}),
        (build.byte_level, {"add_bos_token": False}),
        (build.sentencepiece, {}),
        (build.sentencepiece, {"add_bos_token": False}),
        (build.word_level, {}),
    ],
)
def test_prompts_have_the_ids_that_transformers_gives_them(
    tmp_path: Path, kind: Any, config: dict[str, Any]
) -> None:
    from transformers import AutoTokenizer

    ours = load(kind(tmp_path, **config))
    theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in TEXTS:
        assert ours.encode_prompt(text) == theirs(text)["input_ids"], text
        assert ours.encode(text, special=True) == theirs(text, add_special_tokens=False)["input_ids"], text
    assert ours.special_ids >= set(theirs.all_special_ids)
    ids = list(range(ours.vocab_size))
    expected = str(theirs.decode(ids, skip_special_tokens=True)).split("\ufffd")[-1]
    assert decode(ours, ids).endswith(expected)
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("kind", [build.byte_level, build.sentencepiece])
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30))
def test_plain_text_comes_back_and_never_holds_special_tokens(
    tmp_path_factory: pytest.TempPathFactory, kind: Any, text: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / f"plain-{kind.__name__}"
    if not folder.exists():
        kind(folder, **({"nfc": False} if kind is build.byte_level else {}))
    tokenizer = load(folder)
    text = f"{text}<|im_end|></s>"
    ids = tokenizer.encode(text, special=False)
    assert tokenizer.special_ids.isdisjoint(ids)
    assert b"".join(map(tokenizer.piece, ids)).removeprefix(tokenizer.lead) == text.encode()


def test_a_folder_without_tokenizer_files_has_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert load_tokenizer(str(tmp_path)) is None


def test_code_in_the_folder_is_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w').close()\nclass Evil: pass\n"
    for folder, make in (("hf", build.byte_level), ("qwen", build.qwen_tiktoken)):
        make(tmp_path / folder)
        for name in ("tokenization_evil", "tokenization_qwen", "configuration_evil", "__init__", "setup"):
            (tmp_path / folder / f"{name}.py").write_text(code)
        path = tmp_path / folder / "tokenizer_config.json"
        config = json.loads(path.read_text()) if path.exists() else {}
        auto = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
        path.write_text(json.dumps(config | {"auto_map": auto, "tokenizer_class": "Evil"}))
        model = {"auto_map": {"AutoConfig": "configuration_evil.Evil"} | auto, "model_type": "evil"}
        (tmp_path / folder / "config.json").write_text(json.dumps(model))
        tokenizer = load_tokenizer(str(tmp_path / folder))
        assert tokenizer is not None
        assert tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert not canary.exists()


def test_tokens_that_only_tokenizer_config_knows_are_added(tmp_path: Path) -> None:
    build.byte_level(tmp_path)
    size = load(tmp_path).vocab_size
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    extra = {"content": "<|tool|>", "special": True, "normalized": False, "lstrip": False, "rstrip": False}
    path.write_text(json.dumps(config | {"added_tokens_decoder": {str(size): extra}}))
    tokenizer = load(tmp_path)
    assert tokenizer.encode("<|tool|>", special=True) == [size]
    assert size in tokenizer.special_ids
    path.write_text(json.dumps(config | {"added_tokens_decoder": {str(size + 7): extra}}))
    with pytest.raises(ConfigError, match=rf"<\|tool\|>.*{size + 7}"):
        load_tokenizer(str(tmp_path))


def test_truncation_and_padding_of_the_file_do_not_touch_prompts(tmp_path: Path) -> None:
    build.byte_level(tmp_path)
    t = Backend.from_file(str(tmp_path / "tokenizer.json"))
    t.enable_truncation(4)
    t.enable_padding(length=64)
    t.save(str(tmp_path / "tokenizer.json"))
    ids = load(tmp_path).encode_prompt("0123456789")
    assert len(ids) == 10


def test_the_chat_template_file_wins_and_named_templates_have_a_default(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "x"}]
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]
    build.byte_level(tmp_path, None, chat_template=named)
    tokenizer = load(tmp_path)
    assert tokenizer.encode_chat(turns) == tokenizer.encode("named", special=True)
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert load(tmp_path).encode_chat(turns) == tokenizer.encode("from the file", special=True)


def test_a_model_without_a_chat_template_refuses_chats(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as e:
        load(build.word_level(tmp_path)).encode_chat([{"role": "user", "content": "t3"}])
    assert e.value.code == "no_chat_template"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ["{", "[]", "\udcff"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, name: str, content: str) -> None:
    build.byte_level(tmp_path)
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=name):
        load_tokenizer(str(tmp_path))


def test_old_tokenizer_files_are_refused_with_the_way_to_convert_them(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(ConfigError, match="save_pretrained"):
        load_tokenizer(str(tmp_path))


def test_eos_ids_are_the_union_of_all_sources(tmp_path: Path) -> None:
    tokenizer = load(build.byte_level(tmp_path))
    spec = build.spec(tokenizer.vocab_size, eos_token_ids=(7, 3, 1 << 20))
    assert eos_token_ids(spec, tokenizer) == tuple(sorted((3, 7, tokenizer.eos_token_ids[0])))
    assert eos_token_ids(spec, None) == (3, 7)


@pytest.mark.parametrize("kind", [build.byte_level, build.sentencepiece])
def test_a_text_that_cannot_fit_is_refused_without_tokenising_it(tmp_path: Path, kind: Any) -> None:
    tokenizer = load(kind(tmp_path))
    tokenizer._backend = None  # type: ignore[assignment]  # any tokenising would fail now
    for char in ("a", " ", "é", "😀", "\0"):
        with pytest.raises(InvalidRequest) as e:
            tokenizer.encode_prompt(char * 10_000_000, limit=512)
        assert e.value.code == "prompt_too_long"
        with pytest.raises(InvalidRequest) as e:
            tokenizer.encode_chat([{"role": "user", "content": char * 5_000_000}], limit=512)
        assert e.value.code == "prompt_too_long"


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="a \nthe你😀\u1100\u1161\u11a8e\u0301", max_size=80), n=st.integers(1, 30))
def test_the_lower_bound_on_tokens_is_never_too_high(
    tmp_path_factory: pytest.TempPathFactory, text: str, n: int
) -> None:
    for kind in (build.byte_level, build.sentencepiece, build.word_level):
        folder = tmp_path_factory.getbasetemp() / f"bound-{kind.__name__}"
        tokenizer = load(folder if folder.exists() else kind(folder))
        assert tokenizer._fewest_tokens(text * n) <= len(tokenizer.encode(text * n, special=True))


def test_there_is_no_lower_bound_where_an_unknown_token_swallows_text(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    some, every = ({c: i for i, c in enumerate(["?", *letters])} for letters in ("ab", alphabet))
    missing_bytes = Backend(models.BPE(some, [], unk_token="?", fuse_unk=True))
    whole_words = Backend(models.WordLevel(every, unk_token="?"))
    for name, t in (("missing", missing_bytes), ("words", whole_words)):
        t.decoder = decoders.ByteLevel()
        tokenizer = load(build.write(tmp_path / name, t, None))
        assert len(tokenizer.encode_prompt("x" * 5000, limit=512)) == 1


def test_the_lower_bound_holds_for_text_that_normalisation_shortens(tmp_path: Path) -> None:
    # Three code points become one character of two bytes, and one token holds many of these.
    tokenizer = load(build.byte_level(tmp_path, corpus=["\u0390" * 64] * 2))
    text = "\u03b9\u0308\u0301" * 64
    assert tokenizer._fewest_tokens(text) <= len(tokenizer.encode(text, special=True)) <= 2


@pytest.mark.parametrize("kind", [build.byte_level, build.sentencepiece, build.qwen_tiktoken])
def test_threads_share_a_tokenizer(tmp_path: Path, kind: Any) -> None:
    tokenizer = load_tokenizer(str(kind(tmp_path)))
    assert tokenizer is not None
    texts = [f"{word} {i} 你好 <|im_end|></s>" for i in range(40) for word in ("the", "fox", "naïve")]

    def both(text: str) -> tuple[list[int], str]:
        ids = tokenizer.encode_chat([{"role": "user", "content": text}])
        return ids, decode(tokenizer, ids)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(both, texts)) == list(map(both, texts))


def test_lone_surrogates_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as e:
        load(build.byte_level(tmp_path)).encode_prompt("a\ud800b")
    assert e.value.code == "invalid_text"
