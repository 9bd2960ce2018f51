"""Token ids back to text, one at a time, never showing half a character.

Works on bytes: every tokenizer says which bytes a token stands for (`piece`), so the text of a stream
is the UTF-8 of its joined bytes, and one token costs O(1) however long the text is. Decoding a window
again and again, as `transformers` and vLLM do, is neither. Knows nothing of stop strings or requests;
`engine.text` sits above it, the tokenizers below.

Rules, the same while streaming and at the end:
- bytes that can never become a character show as U+FFFD, one per maximal subpart (Unicode 3.9, D93b);
- a character that is still incomplete when the stream ends is not shown at all;
- when a prompt ends in mid-character, the output that completes it shows the whole character, and
  output that does not complete it shows only its own bytes.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Protocol

#: A UTF-8 sequence misses at most three bytes' worth of context.
_MAX_CHAR_BYTES = 4


class Pieces(Protocol):
    """What a detokenizer needs of a tokenizer."""

    special_ids: frozenset[int]
    #: What a text that stands alone loses at its beginning (the space of "▁Hello"); b"" for byte-level BPE.
    lead: bytes

    def piece(self, token_id: int) -> bytes:
        """The bytes of one token; b"" for an id without a token (padding of the vocabulary)."""
        ...


class Detokenizer:
    """The text of one growing token stream.

    `after`: the prompt's ids, when the text continues them; None: the text stands alone, and loses
    `lead`. `skip_special`: special tokens show nothing.
    """

    __slots__ = ("_carry", "_held", "_lead", "_pieces", "_skip", "_utf8")

    def __init__(
        self, pieces: Pieces, *, skip_special: bool = True, after: Sequence[int] | None = None
    ) -> None:
        self._pieces = pieces
        self._skip = pieces.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._lead = pieces.lead if after is None else b""
        self._carry = _unfinished_character(pieces, after) if after else b""
        self._held = b""  # output bytes that wait to know whether they complete the carry

    def push(self, token_id: int) -> str:
        """The text that this token completes; often "" in the middle of a character."""
        if token_id in self._skip:
            return ""
        data = self._pieces.piece(token_id)
        if not data:
            return ""
        if self._lead:
            data = data.removeprefix(self._lead)
            self._lead = b""
        if self._carry:
            data = self._settle(data)
        return self._utf8.decode(data)

    def _settle(self, data: bytes) -> bytes:
        """Decide whether the output completes the prompt's last character, or wait (b"")."""
        self._held += data
        whole = self._carry + self._held
        if incomplete_tail(whole) == len(whole):
            return b""
        try:
            codecs.utf_8_decode(whole[: _length(whole[0])], "strict", True)
        except UnicodeDecodeError:
            whole = self._held  # the broken character is the prompt's own
        self._carry = self._held = b""
        return whole


def decode(
    pieces: Pieces, ids: Iterable[int], *, skip_special: bool = True, after: Sequence[int] | None = None
) -> str:
    """The text of all `ids`: what a `Detokenizer` shows in all."""
    stream = Detokenizer(pieces, skip_special=skip_special, after=after)
    return "".join(map(stream.push, ids))


def token_text(pieces: Pieces, token_id: int) -> str:
    """How one token looks on its own (for logprobs); part of a character shows as U+FFFD."""
    return pieces.piece(token_id).decode("utf-8", "replace")


def incomplete_tail(data: bytes) -> int:
    """How many of the last bytes (0 to 3) begin a character that more bytes could complete."""
    for k in range(1, min(_MAX_CHAR_BYTES - 1, len(data)) + 1):
        if data[-k] < 0x80:
            return 0
        if data[-k] >= 0xC0:
            try:
                _, used = codecs.utf_8_decode(data[-k:], "strict", False)
            except UnicodeDecodeError:
                return 0
            return k - used
    return 0


def _unfinished_character(pieces: Pieces, ids: Sequence[int]) -> bytes:
    tail = b""
    for token_id in reversed(ids):
        tail = pieces.piece(token_id) + tail
        if len(tail) >= _MAX_CHAR_BYTES:
            break
    n = incomplete_tail(tail)
    return tail[-n:] if n else b""


def _length(first: int) -> int:
    """Bytes of the character that this byte begins."""
    return 4 if first >= 0xF0 else 3 if first >= 0xE0 else 2
