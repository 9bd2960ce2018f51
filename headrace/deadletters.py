"""Calls on dead letters: jobs that were given up, with the evidence. Part of `headrace.ledger.Ledger`.

A letter is written by the finish script in the same change that ends its job, so the two never differ. It
holds the job's bytes, and with them its prompt: only who may read the lane's streams may read it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import orjson

from headrace.keys import FIELD, Keys
from headrace.leases import Attempts
from headrace.parts import text
from headrace.store import Call, Flow

#: Letters in one page.
PAGE = 100


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """`letter_id` names the letter; `info` is what the engine said (job, run, code, message, engine, build);
    `evidence` what is known of the last crash; `origin` the stream and entry that the job stood in."""

    letter_id: str
    raw: bytes
    attempts: Attempts
    origin: str = ""
    info: dict[str, Any] = field(default_factory=dict)
    evidence: dict[str, Any] = field(default_factory=dict)


class DeadLetterCalls:
    """Dead-letter calls of one lane."""

    keys: Keys

    def dead_letters(self) -> Flow[list[DeadLetter]]:
        """All letters of the lane, oldest first."""
        out: list[DeadLetter] = []
        after = "-"
        while page := (yield Call(_letters, None, (), ("XRANGE", self.keys.dead, after, "+", "COUNT", PAGE))):
            out += page
            after = f"({page[-1].letter_id}"
        return out

    def dead_letter(self, letter_id: str) -> Flow[DeadLetter | None]:
        page = yield Call(_letters, None, (), ("XRANGE", self.keys.dead, letter_id, letter_id))
        return page[0] if page else None

    def purge(self, *letter_ids: str) -> Call[int]:
        """Drop letters. Returns how many there were."""
        return Call(int, None, (), ("XDEL", self.keys.dead, *letter_ids))


def _letters(reply: Any) -> list[DeadLetter]:
    out = []
    for entry, flat in reply or ():
        fields = dict(zip(flat[::2], flat[1::2], strict=True)) if isinstance(flat, list) else flat
        out.append(
            DeadLetter(
                text(entry),
                fields.get(FIELD.encode(), b""),
                Attempts.parse(fields.get(b"a", b"")),
                text(fields.get(b"s", b"")),
                orjson.loads(fields.get(b"i") or b"{}"),
                orjson.loads(fields.get(b"e") or b"{}"),
            )
        )
    return out
