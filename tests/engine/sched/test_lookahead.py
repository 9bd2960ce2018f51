"""The line that plans ahead: everyone leaves it once, nobody is overtaken without end, memory is bounded."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.request import FinishReason, Request, Sampling
from engine.sched.lengths import Lengths
from engine.sched.lookahead import UNFAIRNESS, Lookahead
from engine.sched.plan import Machine
from tests.engine.core.build import echo_engine, expected, outputs, request, run

ROWS = 4


def line(ahead: int, lengths: Lengths | None = None) -> Lookahead:
    return Lookahead(ahead, Machine(2, ROWS, 64, 100_000), lengths or Lengths(), lambda r: r.salt)


def add(to: Lookahead, *texts: str, max_tokens: int = 4) -> None:
    for text in texts:
        to.add(Request(text, [ord(c) for c in text], Sampling(max_tokens=max_tokens)))


def start(one: Lookahead, number: int) -> list[Request]:
    """One pass of the scheduler: the first `number` start."""
    started = [r for r, _ in zip(one, range(number), strict=False)]
    for r in started:
        assert one.remove(r)
    return started


def test_prefixes_are_grouped_within_the_window_only() -> None:
    one = line(4)
    add(one, *(f"{prefix}{i}" for i in range(6) for prefix in ("aa", "bb")))
    assert [r.id for r in one][:8] == ["aa0", "aa1", "aa2", "aa3", "bb0", "bb1", "bb2", "bb3"]
    assert [r.id for r in one][8:] == ["aa4", "bb4", "aa5", "bb5"], "behind the window: in order of arrival"
    assert len(one) == 12


def test_those_behind_move_up_as_rows_start() -> None:
    one = line(4)
    add(one, *(f"{prefix}{i}" for i in range(8) for prefix in ("aa", "bb")))
    order = [r.id for _ in range(4) for r in start(one, ROWS)]
    assert order[:4] == ["aa0", "aa1", "aa2", "aa3"]
    assert order[4:6] == ["aa4", "aa5"], "they came up meanwhile, and their prefix is warm"
    assert sorted(order) == sorted(f"{prefix}{i}" for i in range(8) for prefix in ("aa", "bb"))


def test_a_request_can_be_taken_out_from_anywhere_once() -> None:
    one = line(1)
    add(one, *(f"p{i}" for i in range(9)))
    everyone = {r.id: r for r in one}
    for name in ("p0", "p3", "p8"):
        assert one.remove(everyone[name])
        assert not one.remove(everyone[name])
    assert sorted(r.id for r in one) == ["p1", "p2", "p4", "p5", "p6", "p7"]
    assert len(one) == 6


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 8, 30]))
def test_a_row_is_overtaken_by_no_more_later_rows_than_the_bound(seed: int, ahead: int) -> None:
    """A lonely row among arrivals that would always be preferred, all in random sizes of passes."""
    rng = random.Random(seed)
    one = line(ahead)
    arrived: list[str] = []
    left: list[str] = []
    waiting_since: dict[str, int] = {}
    while len(left) < 600:
        while len(one) < 3 * (ahead + ROWS):
            name = f"{'aa' if rng.random() < 0.9 else chr(400 + len(arrived)) * 2}{len(arrived)}"
            waiting_since[name] = len(arrived)
            arrived.append(name)
            add(one, name, max_tokens=rng.choice((1, 4, 64)))
        left += [r.id for r in start(one, rng.randint(1, ROWS))]
    place = {name: i for i, name in enumerate(left)}
    for name in left:
        later = sum(waiting_since[other] > waiting_since[name] for other in left[: place[name]])
        assert later <= max(one.bound, ROWS), name
    for name in set(arrived) - set(left):
        assert sum(waiting_since[other] > waiting_since[name] for other in left) <= max(one.bound, ROWS)
    assert one.bound == UNFAIRNESS * ahead


def test_rows_that_become_critical_are_noticed_without_new_arrivals() -> None:
    one = line(400)
    for i in range(396):
        add(one, f"{chr(500 + i)}", max_tokens=10)
    add(one, *"wxyz", max_tokens=300)
    places = [r.id for _ in range(100) for r in start(one, ROWS)]
    assert len(places) == 400
    late = max(places.index(name) for name in "wxyz")
    assert late * 10 / ROWS < 396 * 10 / ROWS - 250, "all end with the short ones"


def test_learned_lengths_change_the_order() -> None:
    lengths = Lengths()
    one = line(100, lengths)
    for _ in range(40):
        done = Request("d", [1], Sampling(max_tokens=64), run="terse")
        done.output, done.finish = [1], FinishReason.STOP
        lengths.learn(done)
    for i in range(20):
        one.add(Request(f"t{i}", [100 + i, 7], Sampling(max_tokens=64), run="terse"))
    one.add(Request("w", [99, 7], Sampling(max_tokens=63), run="wordy"))
    assert next(iter(one)).id == "w"


def test_priorities_go_before_any_plan() -> None:
    engine = echo_engine(rows=1, lookahead=50)
    started: list[str] = []
    rows = [request([1, 2, 3, 4, i], priority=1, max_tokens=20, on_token=_note(started)) for i in range(5)]
    urgent = request([9], priority=0, max_tokens=1, on_token=_note(started))
    run(engine, [*rows, urgent])
    assert started[0] == urgent.id


def _note(started: list[str]):  # type: ignore[no-untyped-def]
    def note(req: Request, token: int) -> None:
        if req.id not in started:
            started.append(req.id)

    return note


def test_a_planned_backlog_computes_each_prefix_once_where_first_come_would_not() -> None:
    rng = random.Random(3)
    shared = [[(i * 5 + j * j) % 60 for j in range(32)] for i in range(12)]
    prompts = [[*shared[i % 12], i % 60, i // 60] for i in range(120)]
    rng.shuffle(prompts)
    computed = []
    for lookahead in (0, 200):
        engine = echo_engine(blocks=40, rows=4, budget=64, lookahead=lookahead)
        requests = [request(p, max_tokens=2) for p in prompts]
        run(engine, requests, check=False)
        assert outputs(requests) == [expected(r) for r in requests]
        computed.append(engine.stats.prefill_tokens)
    assert computed[1] <= 12 * 32 + 120 * 2 + 12 * 32 // 4
    assert computed[0] > 2 * computed[1]
