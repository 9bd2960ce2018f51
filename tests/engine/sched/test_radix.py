"""The radix tree says of any set of prompts which share how many blocks, and loses none of them."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sched.radix import Node, Pending, radix, shared
from tests.engine.sched.backlog import SIZE, row, rows

UNIT = 4 * SIZE


def tree(pending: list[Pending]) -> Node:
    root = radix(pending, UNIT)
    assert root is not None
    return root


def drawn(node: Node) -> str:
    """A node as "depth:members(children)"."""
    inner = " ".join(sorted(drawn(child) for child in node.children))
    return f"{node.depth}:{','.join(p.request.id for p in node.members)}" + (f"({inner})" if inner else "")


def test_prompts_part_where_their_full_blocks_differ() -> None:
    assert drawn(tree(rows("abcdef", "abcdxy", "abzz", "qq"))) == "0:(1:(2:(3:abcdef 3:abcdxy) 2:abzz) 1:qq)"


def test_a_prompt_that_others_continue_is_their_parent() -> None:
    assert drawn(tree(rows("abcdef", "abcd", "abcdx"))) == "0:(2:abcd,abcdx(3:abcdef))"


def test_prompts_shorter_than_a_block_share_nothing() -> None:
    assert drawn(tree(rows("a", "ab", "a"))) == "0:a,a(1:ab)"


def test_salts_keep_equal_prompts_apart() -> None:
    assert drawn(tree([row("abcd"), row("abcd", salt=b"x")])) == "0:(2:abcd 2:abcd)"


def test_no_prompts_make_no_tree() -> None:
    assert radix([], UNIT) is None


@settings(deadline=None)
@given(st.lists(st.tuples(st.text("ab", min_size=1, max_size=12), st.sampled_from([b"", b"s"])), min_size=1))
def test_every_pair_meets_at_the_blocks_it_shares(made: list[tuple[str, bytes]]) -> None:
    pending = [row(text, expected=len(text), ticket=i, salt=salt) for i, (text, salt) in enumerate(made)]
    met: dict[tuple[int, int], int] = {}

    def below(node: Node) -> list[Pending]:
        parts = [[p] for p in node.members] + [below(child) for child in node.children]
        for i, part in enumerate(parts):
            for other in parts[:i]:
                met.update({(a.ticket, b.ticket): node.depth for a in part for b in other})
        found = [p for part in parts for p in part]
        assert (node.count, node.longest) == (len(found), max(p.expected for p in found))
        return found

    assert sorted(p.ticket for p in below(tree(pending))) == list(range(len(made)))
    for (i, j), depth in met.items():
        (a, salt_a), (b, salt_b) = made[i], made[j]
        blocks = 0
        while (
            len(a) // SIZE > blocks < len(b) // SIZE and a[: (blocks + 1) * SIZE] == b[: (blocks + 1) * SIZE]
        ):
            blocks += 1
        blocks = blocks if salt_a == salt_b else 0
        assert depth == blocks == shared(pending[i], pending[j], UNIT)
