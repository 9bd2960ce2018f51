"""In which order a known backlog should start: a pure function of the waiting prompts and their lengths.

    critical   rows so long that the backlog's end would wait for them: first, the longest of all foremost
    the rest   along the prompts' radix tree, depth first, so that a prefix is computed once and used by all
               before its blocks are evicted; kinds that are heavy on prompt and heavy on output are mixed

Longest first is Graham's LPT rule (SIAM J. Appl. Math. 17, 1969), applied where it matters: elsewhere the
order is free, and sharing decides. Knows nothing of the queue, its fairness or the cache.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from operator import itemgetter

from engine.sched.radix import Node, Pending, radix

#: A row is critical when its output is expected to take this share of all steps that are left (the margin is
#: for the guess that expected lengths are), and is this many times longer than the average: what is not would
#: not make the end much later, and taking it out of its prefix has a price.
CRITICAL, LONG = 0.5, 2.0
#: A row whose prompt costs this many times more or less per output token than the average is of another kind.
HEAVY = 4.0
_WORD = 4


@dataclass(frozen=True, slots=True)
class Machine:
    """The sizes that the order depends on."""

    block_size: int
    rows: int  # that run at once, at most
    budget: int  # tokens of a step
    kv_tokens: int  # that the cache holds


def arrange(pending: Sequence[Pending], machine: Machine, started: Collection[Pending] = ()) -> list[Pending]:
    """All of `pending`, in the order in which to start them; sets their `cost`.

    `started` are the last ones before these: what continues their prefixes comes before other prefixes.
    """
    root = radix(pending, _WORD * machine.block_size)
    if root is None:
        return []
    walk = _depth_first(root, machine.block_size, list(started))
    outputs, prompts = sum(p.expected for p in walk), sum(p.cost for p in walk)
    average = outputs / len(walk)
    rows = max(1.0, min(machine.rows, machine.kv_tokens / (average + prompts / len(walk))))
    least = max(CRITICAL * max(outputs / rows, prompts / machine.budget), LONG * average)
    critical = [p for p in walk if p.expected >= least]
    # By powers of two, as nobody knows lengths better; of like ones, the walk's order stands.
    critical.sort(key=lambda p: -p.expected.bit_length())
    return critical + _mixed([p for p in walk if p.expected < least])


def _depth_first(root: Node, block_size: int, started: list[Pending]) -> list[Pending]:
    """The walk. Of sibling prefixes, those that are warm go first, then what saves most, then the one with
    the longest output."""
    unit = _WORD * block_size
    out: list[Pending] = []
    stack = [(root, 0.0, started)]
    while stack:
        node, cost, warm = stack.pop()
        for p in sorted(node.members, key=lambda p: (-p.expected, p.ticket)):
            p.cost = cost + len(p.words) // _WORD - node.depth * block_size
            out.append(p)
        here = slice(node.depth * unit, (node.depth + 1) * unit)
        going_on: dict[tuple[bytes, bytes], list[Pending]] = {}  # the started ones, by their next block
        for p in warm:
            going_on.setdefault((p.salt, p.words[here]), []).append(p)
        ranked = []
        for child in node.children:
            edge = (child.depth - node.depth) * block_size
            first = child.first
            warmed = going_on.get((first.salt, first.words[here]), []) if going_on else []
            rank = (bool(warmed), (child.count - 1) * edge, child.longest, -first.ticket)
            ranked.append((rank, child, cost + edge / child.count, warmed))
        ranked.sort(key=itemgetter(0))  # the stack's end is walked first
        stack += [entry[1:] for entry in ranked]
    return out


def _mixed(rows: list[Pending]) -> list[Pending]:
    """Merge the kinds in proportion to their numbers, each in its own order: steps that are full of prompt
    tokens carry decoding rows at little extra cost, so no kind should be left alone at the end."""
    kinds: tuple[list[Pending], ...] = ([], [], [])
    average = sum(p.cost for p in rows) / max(1, sum(p.expected for p in rows))
    for p in rows:
        usual = average * p.expected
        kinds[0 if p.cost * HEAVY < usual else 2 if p.cost > HEAVY * usual else 1].append(p)
    places = [((i + 0.5) / len(kind), p) for kind in kinds for i, p in enumerate(kind)]
    places.sort(key=itemgetter(0))
    return [p for _, p in places]
