"""What the engine asks of a tokenizer, and how the right one is found in a model folder.

Two kinds: `tokenizer.json` (`engine.hf_tokenizer`) and Qwen-1's `qwen.tiktoken`
(`engine.qwen_tokenizer`). Both are read as data; code that a folder may hold is never run. Tokenizers
are immutable once loaded and may be used from several threads. Knows nothing of jobs.
"""

from __future__ import annotations

import json
import os
from typing import Any, Protocol

from engine.chat import Turn
from engine.config import ModelSpec
from engine.detokenizer import Pieces
from engine.errors import ConfigError, InvalidRequest

#: Files of tokenizers that must be converted to tokenizer.json first.
_OLD_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


class Tokenizer(Pieces, Protocol):
    """Text to token ids and back. Ids are the model's own."""

    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    #: One more than the highest id that has a token.
    vocab_size: int

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Ids of a text, with nothing added. `special`: names of special tokens become these tokens;
        otherwise they are spelled as the plain text that they are.
        """
        ...

    def encode_prompt(self, text: str, *, limit: int | None = None) -> list[int]:
        """Ids of a whole raw prompt: special names count, and BOS is added where the model wants it.

        Raises InvalidRequest("prompt_too_long"), before any work, when the text cannot have as few as
        `limit` tokens.
        """
        ...

    def encode_chat(self, messages: list[Turn], *, limit: int | None = None) -> list[int]:
        """Ids that ask for the next assistant turn; names of special tokens in user text stay text.

        Raises InvalidRequest: "no_chat_template", "chat_template_failed", "prompt_too_long".
        """
        ...

    def token_id(self, text: str) -> int | None:
        """The special token with exactly this name."""
        ...


def load_tokenizer(folder: str) -> Tokenizer | None:
    """The folder's tokenizer; None when it has none (it then serves `prompt_token_ids` only).

    Raises ConfigError for files that cannot be read or need a conversion first.
    """
    if os.path.exists(os.path.join(folder, "tokenizer.json")):
        from engine.hf_tokenizer import HFTokenizer

        return HFTokenizer.load(folder)
    if os.path.exists(os.path.join(folder, "qwen.tiktoken")):
        from engine.qwen_tokenizer import QwenTokenizer

        return QwenTokenizer.load(os.path.join(folder, "qwen.tiktoken"))
    for name in _OLD_FILES:
        if os.path.exists(os.path.join(folder, name)):
            raise ConfigError(
                f"{folder} has {name} but no tokenizer.json: convert it once with transformers "
                "(AutoTokenizer.from_pretrained(folder).save_pretrained(folder)), or remove it to serve "
                "prompt_token_ids only."
            )
    return None


def eos_token_ids(spec: ModelSpec, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Every id that ends a text: the union of config, generation_config and tokenizer, sorted.

    A union, because each of the three is wrong in some published model (vLLM #4180, mlx-vlm #2112).
    """
    own = tokenizer.eos_token_ids if tokenizer else ()
    return tuple(sorted({i for i in (*spec.eos_token_ids, *own) if 0 <= i < spec.vocab_size}))


def read_json(folder: str, name: str) -> dict[str, Any]:
    """A JSON object from the folder; {} when the file is not there. Raises ConfigError."""
    path = os.path.join(folder, name)
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} cannot be read: {e}") from e
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a JSON {type(value).__name__}, not an object.")
    return value


def refuse_too_long(fewest: int, limit: int | None) -> None:
    """Raise InvalidRequest when even the fewest tokens that a text can have are too many."""
    if limit is not None and fewest > limit:
        raise InvalidRequest(
            "prompt_too_long",
            f"prompt of at least {fewest} tokens exceeds the model's context of {limit}: shorten it",
        )
