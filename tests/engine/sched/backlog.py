"""Builders for tests of the plan: pending rows from short words, and what a plan of them looks like."""

from __future__ import annotations

from array import array

from engine.request import Request, Sampling
from engine.sched.plan import Machine
from engine.sched.radix import Pending

#: Tokens of a block; a letter of a row's text is one token.
SIZE = 2


def row(text: str, expected: int = 1, ticket: int = 0, salt: bytes = b"", **fields: int) -> Pending:
    prompt = [ord(c) for c in text]
    request = Request(text, prompt, Sampling(max_tokens=expected), **fields)
    return Pending(request, ticket, salt, array("I", prompt).tobytes(), expected)


def rows(*texts: str) -> list[Pending]:
    return [row(text, ticket=i) for i, text in enumerate(texts)]


def machine(rows: int = 4, budget: int = 64, kv_tokens: int = 1_000_000) -> Machine:
    return Machine(SIZE, rows, budget, kv_tokens)


def names(order: list[Pending]) -> str:
    return " ".join(p.request.id for p in order)
