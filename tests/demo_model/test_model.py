"""Promises of the shipped demo model: loads cleanly, small, splits over ranks, answers held-out questions."""

from __future__ import annotations

import json
import logging
import random
import warnings
from pathlib import Path

import demo_tasks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from train_demo_model import train_tokenizer, turn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

FOLDER = Path(__file__).parents[2] / "examples" / "demo_model"
CHARACTERS = st.characters(exclude_categories=["Cs"])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER, padding_side="left")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


class _Listening(logging.Handler):
    """Keeps what transformers logs; its root logger does not propagate, so caplog cannot."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def test_transformers_loads_the_folder_without_a_warning() -> None:
    listening, logger = _Listening(), logging.getLogger("transformers")
    logger.addHandler(listening)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            AutoTokenizer.from_pretrained(FOLDER)
            _, report = AutoModelForCausalLM.from_pretrained(FOLDER, output_loading_info=True)
    finally:
        logger.removeHandler(listening)
    assert listening.lines == []
    assert not any(report.values()), report


def test_the_weights_are_safetensors_of_at_most_12_mb() -> None:
    size = sum(path.stat().st_size for path in FOLDER.glob("*.safetensors"))
    assert 0 < size <= 12_000_000, f"{size:,} bytes"
    assert not [path.name for path in FOLDER.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_split_dimension_divides(ranks: int) -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["model_type"] == "qwen3"
    for name in ("num_attention_heads", "intermediate_size", "vocab_size"):
        assert config[name] % ranks == 0, f"{name} {config[name]} over {ranks} ranks"
    kv = config["num_key_value_heads"]
    assert kv % ranks == 0 or ranks % kv == 0, f"{kv} key-value heads over {ranks} ranks"


@settings(max_examples=200, deadline=None)
@given(text=st.text(CHARACTERS, max_size=60))
def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_and_letters_of_spelled_words_are_single_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize("9075") == list("9075")
    assert tokenizer.tokenize("Reverse PLANET.")[1:] == ["Ġ", *"PLANET", "."]


def test_the_chat_template_gives_the_text_that_training_used(tokenizer: PreTrainedTokenizerBase) -> None:
    asked = [{"role": "user", "content": "Add 1 and 2."}]
    rendered = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert rendered == turn("Add 1 and 2.")
    assert tokenizer.eos_token == "<|im_end|>"


def test_the_script_makes_the_same_tokenizer_again() -> None:
    made = json.loads(train_tokenizer().to_str())
    shipped = json.loads(Tokenizer.from_file(str(FOLDER / "tokenizer.json")).to_str())
    assert made["model"] == shipped["model"]
    assert made["pre_tokenizer"] == shipped["pre_tokenizer"]


def exact(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, count: int
) -> tuple[int, list[tuple[str, str]]]:
    """Held-out questions of `task` that greedy decoding answers exactly, and the others with answers."""
    rng = random.Random(31)
    asked = [demo_tasks.generate_split(task, rng, held_out=True)[0] for _ in range(count)]
    chats = [[{"role": "user", "content": question}] for question in asked]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        out = model.generate(**batch, max_new_tokens=16, do_sample=False)
    texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    wrong = [(q, text) for q, text in zip(asked, texts, strict=True) if not demo_tasks.check(task, q, text)]
    return count - len(wrong), wrong


def test_held_out_questions_are_answered_exactly(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    right, wrong = exact(model, tokenizer, "sum", 100)
    assert right >= 95, f"{wrong}"
    shares = {task: exact(model, tokenizer, task, 50)[0] / 50 for task in demo_tasks.TASKS}
    assert sum(shares.values()) / len(shares) >= 0.8, shares


def test_text_that_it_never_learned_still_gives_finite_logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    for text in ("Tell me about the sea.", "日本語 🎉 \x00", "A" * 300):
        ids = torch.tensor([tokenizer.encode(text)])
        with torch.inference_mode():
            assert torch.isfinite(model(ids).logits).all(), text
