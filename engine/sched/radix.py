"""A radix tree over waiting prompts, in units of KV blocks: which of them begin alike, and for how long.

Built in one pass over the sorted prompts, where those that share a prefix stand together. Knows nothing of
the policy that walks it (`engine.sched.plan`), nor of which blocks are cached.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.request import Request


@dataclass(slots=True, eq=False)
class Pending:
    """A waiting request, as the plan sees it."""

    request: Request
    ticket: int  # order of arrival
    salt: bytes = b""
    words: bytes = b""  # the prompt as 4-byte words
    expected: int = 1  # output tokens
    cost: float = 0.0  # prompt tokens to compute, when each shared block is split among those who share it
    gone: bool = False  # it waits no more


@dataclass(slots=True, eq=False)
class Node:
    """All prompts that share `depth` full blocks with `first`."""

    depth: int
    first: Pending
    members: list[Pending] = field(default_factory=list)  # whose full blocks end here
    children: list[Node] = field(default_factory=list)
    count: int = 0  # of prompts here and below
    longest: int = 0  # output that one of them is expected to have


def radix(pending: Iterable[Pending], unit: int) -> Node | None:
    """The tree's root, of depth 0; None without prompts. `unit`: bytes of words in a block.

    Prompts of different salts share nothing.
    """
    path: list[Node] = []  # from the root to where the last prompt stands
    before: Pending | None = None
    for one in sorted(pending, key=lambda p: (p.salt, p.words)):
        if before is None:
            path.append(Node(0, one))
        else:
            _climb(path, shared(before, one, unit))
        depth = len(one.words) // unit
        if depth > path[-1].depth:
            path.append(Node(depth, one))
        node = path[-1]
        node.members.append(one)
        node.count += 1
        node.longest = max(node.longest, one.expected)
        before = one
    if not path:
        return None
    _climb(path, 0)
    return path[0]


def shared(a: Pending, b: Pending, unit: int) -> int:
    """Full blocks that two prompts have in common at their start."""
    x, y = a.words, b.words
    if a.salt != b.salt or x[:unit] != y[:unit]:
        return 0
    low, high = 0, min(len(x), len(y)) // unit
    if x[: high * unit] == y[: high * unit]:
        return high
    while high - low > 1:  # the first `low` blocks are equal, the first `high` are not
        middle = (low + high) // 2
        if x[low * unit : middle * unit] == y[low * unit : middle * unit]:
            low = middle
        else:
            high = middle
    return low


def _climb(path: list[Node], depth: int) -> None:
    """Hang finished nodes deeper than `depth` below their parents; the path then ends at that depth."""
    while path[-1].depth > depth:
        done = path.pop()
        if path[-1].depth < depth:
            path.append(Node(depth, done.first))
        above = path[-1]
        above.children.append(done)
        above.count += done.count
        above.longest = max(above.longest, done.longest)
