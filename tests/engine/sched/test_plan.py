"""The order of a backlog: prefixes stay together, rows that would make the end late go first, kinds mix."""

from __future__ import annotations

import random

from engine.sched.plan import arrange
from tests.engine.sched.backlog import machine, names, row, rows


def test_rows_that_share_a_prefix_stand_together() -> None:
    order = arrange(rows("aa1", "bb1", "aa2", "cc1", "bb2", "aa3"), machine())
    assert names(order) == "aa1 aa2 aa3 bb1 bb2 cc1", "the prefix that saves most goes first"


def test_prefixes_within_prefixes_stand_together_too() -> None:
    shuffled = rows("ssaa1", "sbbb1", "ssaa2", "sscc1", "sbbb2", "sscc2")
    order = names(arrange(shuffled, machine())).split()
    assert [o[:4] for o in order] in (
        ["ssaa", "ssaa", "sscc", "sscc", "sbbb", "sbbb"], ["sscc", "sscc", "ssaa", "ssaa", "sbbb", "sbbb"]
    )  # fmt: skip


def test_a_prompt_that_others_continue_goes_before_them() -> None:
    assert names(arrange(rows("aabbcc", "aabb", "aa"), machine())) == "aa aabb aabbcc"


def test_the_prefix_that_is_running_is_continued() -> None:
    pending = rows("aa1", "aa2", "aa3", "bb1", "bb2")
    assert names(arrange(pending, machine())) == "aa1 aa2 aa3 bb1 bb2"
    assert names(arrange(pending, machine(), started=[row("bb0")])) == "bb1 bb2 aa1 aa2 aa3"
    assert names(arrange(pending, machine(), started=[row("bb0", salt=b"other")])) == "aa1 aa2 aa3 bb1 bb2"


def test_rows_longer_than_half_of_what_is_left_go_first_the_longest_foremost() -> None:
    pending = [row(f"s{i}", 4, i) for i in range(30)] + [
        row("m0", 40, 30),
        row("l0", 90, 31),
        row("l1", 70, 32),
    ]
    order = names(arrange(pending, machine(rows=4))).split()
    assert set(order[:2]) == {"l0", "l1"}
    assert order[2] == "m0", "80 steps are left, for 4 rows"
    order = names(arrange(pending, machine(rows=1))).split()
    assert not {"l0", "l1", "m0"} & set(order[:2]), "320 steps are left: nobody is late yet, and kinds mix"


def test_lengths_that_are_nearly_alike_do_not_break_a_prefix_up() -> None:
    pending = [row("aa1", 40), row("bb1", 45, 1), row("aa2", 50, 2), row("bb2", 60, 3)]
    assert names(arrange(pending, machine(rows=4))) in ("aa2 aa1 bb2 bb1", "bb2 bb1 aa2 aa1")


def test_a_shared_prefix_costs_each_row_its_part() -> None:
    pending = rows("aabb1", "aabb2", "aacc", "z")
    arrange(pending, machine())
    assert [round(p.cost, 3) for p in pending] == [2.667, 2.667, 2.667, 1.0]


def test_kinds_that_are_heavy_on_prompt_and_on_output_are_mixed() -> None:
    """Whatever the order of arrival: neither kind is alone at the start or at the end."""
    pending = [row(chr(200 + i) * 40, 1, i) for i in range(40)] + [
        row(chr(300 + i), 40, 40 + i) for i in range(40)
    ]
    order = arrange(pending, machine(rows=4, budget=16))
    for start in range(0, 80, 10):
        assert sum(p.expected == 40 for p in order[start : start + 10]) == 5


def test_every_row_is_in_the_plan_once() -> None:
    rng = random.Random(7)
    pending = [
        row(
            "".join(rng.choices("ab", k=rng.randint(1, 12))),
            rng.choice((1, 5, 300)),
            i,
            rng.choice((b"", b"s")),
        )
        for i in range(300)
    ]
    order = arrange(pending, machine(), started=[row("abab")])
    assert sorted(p.ticket for p in order) == list(range(300))
    assert arrange([], machine()) == []
