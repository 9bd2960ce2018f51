"""Streaming text: never half a character, and the deltas add up to the whole."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from engine.detokenizer import Detokenizer, decode, incomplete_tail, token_text
from engine.errors import ConfigError
from engine.tokenizer import Tokenizer, load_tokenizer
from tests.engine.text import builders as build

KINDS = ("byte_level", "sentencepiece", "word_level", "qwen_tiktoken")
RICH = "Größe 你好 😀🎉 naïve\n\n  two  spaces 👍🏽 e\u0301 end"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: getattr(build, kind)(root / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    found = {kind: load_tokenizer(str(folder)) for kind, folder in folders.items()}
    assert all(found.values())
    return found  # type: ignore[return-value]


def stream(tokenizer: Tokenizer, ids: list[int], **options: object) -> list[str]:
    d = Detokenizer(tokenizer, **options)  # type: ignore[arg-type]
    return [d.push(i) for i in ids]


# Any token, but half of them single bytes: three kinds keep these among their first 260 ids.
ids_of = st.lists(st.one_of(st.integers(0, 10_000), st.integers(0, 260)), max_size=60)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120, deadline=None)
@given(numbers=ids_of, skip=st.booleans())
def test_deltas_of_random_tokens_add_up_to_the_full_text(
    loaded: dict[str, Tokenizer], kind: str, numbers: list[int], skip: bool
) -> None:
    tokenizer = loaded[kind]
    ids = [i % (tokenizer.vocab_size + 3) for i in numbers]  # three ids without a token, too
    shown = [i for i in ids if not (skip and i in tokenizer.special_ids)]
    data = b"".join(map(tokenizer.piece, shown))
    whole = data[: len(data) - incomplete_tail(data)].decode("utf-8", "replace")
    assert "".join(stream(tokenizer, ids, skip_special=skip, after=[])) == whole
    assert decode(tokenizer, ids, skip_special=skip) == whole.removeprefix(tokenizer.lead.decode())


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120, deadline=None)
@given(numbers=ids_of, cut=st.integers(0, 60))
def test_prompt_and_output_make_the_whole_text(
    loaded: dict[str, Tokenizer], kind: str, numbers: list[int], cut: int
) -> None:
    tokenizer = loaded[kind]
    ids = [i % tokenizer.vocab_size for i in numbers]
    prompt, output = (decode(tokenizer, part, skip_special=False, after=[]) for part in (ids[:cut], ids))
    text = decode(tokenizer, ids[cut:], skip_special=False, after=ids[:cut])
    # A character that the prompt began and the output broke is nobody's: both sides may show its bytes.
    assert text.lstrip("\ufffd") == output.removeprefix(prompt).lstrip("\ufffd")


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "word_level"])
@settings(max_examples=80, deadline=None)
@given(text=st.text(alphabet=st.sampled_from("aeh the 你好😀é\n .3"), max_size=40))
def test_text_equals_the_tokenizers_library(
    loaded: dict[str, Tokenizer], folders: dict[str, Path], kind: str, text: str
) -> None:
    backend = Backend.from_file(str(folders[kind] / "tokenizer.json"))
    ids = backend.encode(text).ids
    skip = kind != "word_level"  # where tokenizer_config.json, not tokenizer.json, makes tokens special
    assert decode(loaded[kind], ids, skip_special=skip) == backend.decode(ids, skip_special_tokens=skip)


@settings(max_examples=120, deadline=None)
@given(numbers=ids_of)
def test_broken_bytes_of_byte_level_bpe_show_as_the_tokenizers_library_shows_them(
    loaded: dict[str, Tokenizer], folders: dict[str, Path], numbers: list[int]
) -> None:
    backend = Backend.from_file(str(folders["byte_level"] / "tokenizer.json"))
    tokenizer = loaded["byte_level"]
    ids = [i % 256 for i in numbers] + tokenizer.encode("x", special=False)  # the alphabet: single bytes
    assert decode(tokenizer, ids, skip_special=False) == backend.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "qwen_tiktoken"])
def test_no_delta_holds_half_a_character(loaded: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = loaded[kind]
    ids = tokenizer.encode(RICH, special=False)
    deltas = stream(tokenizer, ids)
    assert "" in deltas, "the text was meant to have characters of several tokens"
    assert not any("\ufffd" in delta for delta in deltas)
    assert unicodedata.normalize("NFC", "".join(deltas)) == unicodedata.normalize("NFC", RICH)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "qwen_tiktoken"])
@pytest.mark.parametrize("given_bytes", [1, 2, 3])
def test_a_character_that_the_prompt_began_is_shown_whole(
    loaded: dict[str, Tokenizer], kind: str, given_bytes: int
) -> None:
    tokenizer = loaded[kind]
    ids = [single(tokenizer, b) for b in "🙂".encode()]
    prompt = tokenizer.encode("a", special=False) + ids[:given_bytes]
    deltas = stream(tokenizer, ids[given_bytes:] + [single(tokenizer, b) for b in b"z!"], after=prompt)
    assert "".join(deltas) == "🙂z!"


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "qwen_tiktoken"])
def test_a_broken_end_of_the_prompt_does_not_leak(loaded: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = loaded[kind]
    prompt = [single(tokenizer, b) for b in b"a\xf0\x9f"]
    output = [single(tokenizer, b) for b in b"ok"]
    assert "".join(stream(tokenizer, output, after=prompt)) == "ok"
    # Output that goes on with the character and then breaks it shows its own broken byte only.
    output = [single(tokenizer, b) for b in b"\x99ok"]
    assert "".join(stream(tokenizer, output, after=prompt)) == "\ufffdok"


def test_an_unfinished_last_character_is_not_shown(loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded["byte_level"]
    assert decode(tokenizer, [single(tokenizer, b) for b in "né🙂".encode()[:6]]) == "né"


def test_a_standing_text_loses_its_prefix_space_and_a_continued_one_keeps_it(
    loaded: dict[str, Tokenizer],
) -> None:
    tokenizer = loaded["sentencepiece"]
    ids = tokenizer.encode("the fox", special=False)
    assert decode(tokenizer, ids) == "the fox"
    assert decode(tokenizer, ids, after=ids) == " the fox"


def test_special_tokens_show_only_on_request(loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded["byte_level"]
    ids = tokenizer.encode("a<|im_end|>b<think>c", special=True)
    assert decode(tokenizer, ids) == "ab<think>c"
    assert decode(tokenizer, ids, skip_special=False) == "a<|im_end|>b<think>c"


def test_token_texts(loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded["sentencepiece"]
    assert token_text(tokenizer, tokenizer.encode("the", special=False)[0]).startswith(" ")
    assert token_text(tokenizer, single(tokenizer, 0xF0)) == "\ufffd"
    assert token_text(tokenizer, tokenizer.vocab_size + 5) == ""


def test_an_unknown_decoder_is_refused_by_name(tmp_path: Path) -> None:
    t = Backend(models.WordLevel({"a": 0}, unk_token="a"))
    t.decoder = decoders.CTC()
    t.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="CTC"):
        load_tokenizer(str(tmp_path))


def single(tokenizer: Tokenizer, byte: int) -> int:
    """The id of one byte."""
    return next(i for i in range(tokenizer.vocab_size) if tokenizer.piece(i) == bytes([byte]))
