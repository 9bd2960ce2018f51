"""Qwen-1's tokenizer, read natively from `qwen.tiktoken` (Qwen-7B/14B and their Chat models).

Source: the model's published tokenization_qwen.py and qwen_generation_utils.py (QwenLM/Qwen), whose
code, which model folders carry, is not run. The file holds one base64 token and its rank a line; the
special tokens follow the last rank. Implements `engine.tokenizer.Tokenizer`.
"""

from __future__ import annotations

import base64
import binascii
import unicodedata
from typing import Literal

import tiktoken

from engine.chat import Turn
from engine.errors import ConfigError, InvalidRequest
from engine.tokenizer import refuse_too_long

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END_OF_TEXT, IM_START, IM_END, *(f"<|extra_{i}|>" for i in range(205)))
DEFAULT_SYSTEM = "You are a helpful assistant."

#: NFC makes a text at most this much shorter in bytes of UTF-8.
_NFC_SHRINK = 4


class QwenTokenizer:
    """Byte-level BPE by tiktoken, with ChatML as the chat template."""

    lead = b""
    bos_token_id: int | None = None

    def __init__(self, ranks: dict[bytes, int]) -> None:
        """`ranks`: token bytes to id, dense from 0, all 256 single bytes among them."""
        self._special = {name: len(ranks) + i for i, name in enumerate(SPECIAL)}
        self._encoding = tiktoken.Encoding(
            "qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=self._special
        )
        self._pieces = sorted(ranks, key=ranks.__getitem__) + [name.encode() for name in SPECIAL]
        self.vocab_size = len(self._pieces)
        self.special_ids = frozenset(self._special.values())
        self.eos_token_ids: tuple[int, ...] = (self._special[IM_END], self._special[END_OF_TEXT])
        self._longest = max(map(len, self._pieces))

    @classmethod
    def load(cls, path: str) -> QwenTokenizer:
        """From the file. Raises ConfigError naming the line that is wrong."""
        ranks: dict[bytes, int] = {}
        try:
            with open(path, "rb") as f:
                lines = f.read().splitlines()
        except OSError as e:
            raise ConfigError(f"{path} cannot be read: {e}") from e
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error):
                raise ConfigError(f"{path}, line {number}: not a base64 token and its rank.") from None
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ConfigError(f"{path}: ranks are not 0 to {len(ranks) - 1}, each once.")
        if missing := [b for b in range(256) if bytes([b]) not in ranks]:
            raise ConfigError(f"{path}: the single byte {missing[0]:#04x} has no token.")
        return cls(ranks)

    def encode(self, text: str, *, special: bool) -> list[int]:
        text = unicodedata.normalize("NFC", text)
        allowed: Literal["all"] | set[str] = "all" if special else set()
        try:
            # Not `encode_ordinary`: where this raises ValueError, that one panics.
            return self._encoding.encode(text, allowed_special=allowed, disallowed_special=())
        except ValueError as e:  # the pattern's look-ahead gives up on a million blanks in a row
            raise InvalidRequest(
                "tokenizer_failed", f"the text cannot be split into words ({e}): shorten its white space"
            ) from e

    def encode_prompt(self, text: str, *, limit: int | None = None) -> list[int]:
        refuse_too_long(self._fewest_tokens(len(text)), limit)
        return self.encode(text, special=True)

    def encode_chat(self, messages: list[Turn], *, limit: int | None = None) -> list[int]:
        """ChatML as qwen_generation_utils.make_context builds it: role and content are encoded apart,
        without special names, and the default system prompt leads where none is given.
        """
        refuse_too_long(self._fewest_tokens(sum(len(m["content"]) for m in messages)), limit)
        newline = self.encode("\n", special=False)
        start, end = [self._special[IM_START]], [self._special[IM_END]]
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": DEFAULT_SYSTEM}, *messages]
        ids: list[int] = []
        for m in messages:
            role, content = (self.encode(m[key], special=False) for key in ("role", "content"))
            ids += start + role + newline + content + end + newline
        return ids + start + self.encode("assistant", special=False) + newline

    def token_id(self, text: str) -> int | None:
        return self._special.get(text)

    def piece(self, token_id: int) -> bytes:
        return self._pieces[token_id] if 0 <= token_id < len(self._pieces) else b""

    def _fewest_tokens(self, chars: int) -> int:
        return -(-chars // (self._longest * _NFC_SHRINK))
