"""The waiting queue: priority, then preempted rows, then first come; anyone can be taken out."""

from __future__ import annotations

from engine.request import Request, Sampling
from engine.sched.waiting import Waiting


def queue_of(*names: str) -> tuple[Waiting, dict[str, Request]]:
    """Names like "a1": the digit is the priority."""
    waiting = Waiting()
    requests = {name: Request(name, [1], Sampling(), priority=int(name[1])) for name in names}
    for request in requests.values():
        waiting.add(request)
    return waiting, requests


def order(waiting: Waiting) -> str:
    return " ".join(request.id for request in waiting)


def test_first_come_first_served_within_a_priority() -> None:
    waiting, _ = queue_of("a1", "b0", "c1", "d0", "e2")
    assert order(waiting) == "b0 d0 a1 c1 e2"
    assert len(waiting) == 5


def test_preempted_rows_resume_before_new_ones_and_the_oldest_of_them_first() -> None:
    waiting, _ = queue_of("a0", "b1")
    older, newer = (Request(name, [1], Sampling(), priority=0) for name in ("x0", "y0"))
    waiting.resume(newer)  # rows are preempted newest first
    waiting.resume(older)
    assert order(waiting) == "x0 y0 a0 b1"


def test_a_preempted_row_does_not_overtake_a_better_priority() -> None:
    waiting, _ = queue_of("a0")
    waiting.resume(Request("x1", [1], Sampling(), priority=1))
    assert order(waiting) == "a0 x1"


def test_anyone_can_be_taken_out_once() -> None:
    waiting, requests = queue_of("a0", "b0", "c0")
    resumed = Request("x0", [1], Sampling())
    waiting.resume(resumed)
    assert waiting.remove(requests["b0"])
    assert waiting.remove(resumed)
    assert not waiting.remove(resumed)
    assert order(waiting) == "a0 c0"
    assert len(waiting) == 2
