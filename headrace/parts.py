"""How calls are cut into script-sized parts, and how replies are read. Knows no key and no script."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

#: Items in one script call, and bytes of payload in it: a script blocks the server while it runs.
BATCH, BATCH_BYTES = 200, 4 << 20


def batches(items: Sequence[tuple[Any, ...]]) -> Iterator[list[Any]]:
    """Items (payload last) in script-sized parts: a script holds the server up, and its payloads sit in
    the server's memory twice. At least one item each."""
    part: list[Any] = []
    size = 0
    for item in items:
        if part and (len(part) == BATCH or size + len(item[-1]) > BATCH_BYTES):
            yield part
            part, size = [], 0
        part.append(item)
        size += len(item[-1])
    if part:
        yield part


def parts(items: Sequence[T]) -> Iterator[Sequence[T]]:
    return (items[i : i + BATCH] for i in range(0, len(items), BATCH))


def numbered(names: Iterable[str]) -> dict[str, int]:
    """Each name once, in order, with its number from 1."""
    return {name: n for n, name in enumerate(dict.fromkeys(names), start=1)}


def as_is(reply: Any) -> Any:
    return reply


def text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def words(reply: Any) -> list[str]:
    return [text(word) for word in reply]
