"""The byte-level tokenizer and the model that most tests of text use."""

from __future__ import annotations

import pytest

from engine.config import ModelSpec
from engine.hf_tokenizer import HFTokenizer
from engine.tokenizer import load_tokenizer
from tests.engine.text import builders as build


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HFTokenizer:
    found = load_tokenizer(str(build.byte_level(tmp_path_factory.mktemp("byte-level"))))
    assert isinstance(found, HFTokenizer)
    return found


@pytest.fixture(scope="module")
def spec(tokenizer: HFTokenizer) -> ModelSpec:
    return build.spec(tokenizer.vocab_size, eos_token_ids=(5,))
