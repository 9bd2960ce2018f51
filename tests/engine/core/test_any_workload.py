"""Whatever the load, every row's output is what it would be alone, and the book-keeping adds up.

The echo executor checks each plan and each block that a row reads while this runs. Covers mistakes 5, 6, 7,
9 and 10 of the engine's list: fully cached prompts, counts taken before a prefix hit, publishing too
early, pools too small for the demand, tokens lost or doubled by preemption.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.request import FinishReason, Request
from tests.engine.core.build import STOP, VOCAB, echo_engine, expected, request


@dataclass(frozen=True)
class Load:
    blocks: int
    rows: int
    budget: int
    block_size: int
    depth: int
    caching: bool
    lookahead: int
    requests: list[Request]
    arrivals: list[int]  # by request: the step at which it comes
    cancels: dict[int, int]  # request -> step
    preemptions: set[int]  # steps before which the newest row is preempted by force


@st.composite
def loads(draw: st.DrawFn) -> Load:
    block_size = draw(st.sampled_from([1, 2, 4, 16]))
    token = st.integers(0, VOCAB - 2)
    prefixes = draw(st.lists(st.lists(token, min_size=0, max_size=24), min_size=1, max_size=3))
    requests = []
    for i in range(draw(st.integers(1, 10))):
        prefix = draw(st.sampled_from(prefixes))
        prompt = prefix + draw(st.lists(token, min_size=0 if prefix else 1, max_size=8))
        kind = draw(
            st.sampled_from(["plain", "plain", "plain", "stop", "score", "prompt_logprobs", "logprobs"])
        )
        fields: dict[str, Any] = {}
        if kind == "stop":
            fields = {"stop_token_ids": (STOP, draw(token)), "min_tokens": draw(st.integers(0, 6))}
        elif kind == "score" and len(prompt) > 1:
            fields = {"score_from": draw(st.integers(1, len(prompt) - 1))}
        elif kind == "prompt_logprobs":
            fields = {"prompt_logprobs": 0}
        elif kind == "logprobs":
            fields = {"logprobs": 0}
        fields |= {"max_tokens": draw(st.integers(1, 20)), "priority": draw(st.sampled_from([0, 0, 0, 1]))}
        salt = draw(st.sampled_from([b"", b"", b"a"]))
        requests.append(request(prompt, id=f"r{i}", salt=salt, **fields))
    largest = max(-(-(r.limit - 1) // block_size) for r in requests)
    return Load(
        blocks=largest + draw(st.integers(0, 2 * largest)),
        rows=draw(st.integers(1, 6)),
        budget=draw(st.sampled_from([1, 2, 3, 7, 16, 64])),
        block_size=block_size,
        depth=draw(st.integers(0, 2)),
        caching=draw(st.booleans()),
        lookahead=draw(st.sampled_from([0, 1, 3, 20])),
        requests=requests,
        arrivals=[draw(st.sampled_from([0, 0, 0, 1, 5, 20])) for _ in requests],
        cancels=draw(st.dictionaries(st.integers(0, len(requests) - 1), st.integers(0, 30), max_size=2)),
        preemptions=draw(st.sets(st.integers(1, 40), max_size=5)),
    )


@settings(max_examples=400, deadline=None)
@given(loads())
def test_outputs_do_not_depend_on_the_load(load: Load) -> None:
    engine = echo_engine(
        blocks=load.blocks, rows=load.rows, budget=load.budget, block_size=load.block_size,
        depth=load.depth, caching=load.caching, lookahead=load.lookahead,
    )  # fmt: skip
    ended: list[Request] = []
    last = max(load.arrivals)
    step = 0
    while step <= last or engine.has_work:
        for req, arrival in zip(load.requests, load.arrivals, strict=True):
            if arrival == step:
                engine.add(req)
        for index, at in load.cancels.items():
            if at == step:
                engine.cancel(f"r{index}")
        if step in load.preemptions and engine.scheduler.running:
            engine.scheduler._preempt(engine.scheduler.running[-1])
        ended += engine.step()
        engine.check_integrity()
        step += 1
        assert step < 5000, "the load does not end"

    assert sorted(r.id for r in ended) == sorted(r.id for r in load.requests)
    assert engine.scheduler.pool.available == engine.scheduler.pool.capacity
    for req in load.requests:
        output, finish = expected(req)
        if req.finish is FinishReason.CANCELLED:
            assert req.output == output[: len(req.output)]
            continue
        assert (req.output, req.finish) == (output, finish), req.id
        if req.sampling.logprobs is not None:
            assert [e.token_id for e in req.logprobs] == req.output
        first = req.sampling.score_from
        if first is None and req.sampling.prompt_logprobs is not None:
            first = 1
        wanted = {} if first is None else {p: req.prompt[p] for p in range(first, len(req.prompt))}
        assert {p: e.token_id for p, e in req.prompt_logprobs.items()} == wanted


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(0, 2), st.integers(1, 30))
def test_a_pool_smaller_than_the_demand_still_finishes_everything(rows: int, depth: int, tokens: int) -> None:
    """Each row alone needs the whole pool by the end, so all but one are preempted, often."""
    requests = [request([i, i + 1], max_tokens=tokens) for i in range(rows)]
    engine = echo_engine(blocks=-(-(tokens + 1) // 4), rows=rows, depth=depth)
    for req in requests:
        engine.add(req)
    for _ in range(100 * rows):
        engine.step()
        engine.check_integrity()
        if not engine.has_work:
            break
    assert [(r.output, r.finish) for r in requests] == [expected(r) for r in requests]


@pytest.mark.parametrize("depth", [0, 1])
def test_a_pool_of_n_blocks_with_a_demand_of_n_plus_one_finishes(depth: int) -> None:
    first, second = request([1, 2, 3], max_tokens=13), request([4, 5, 6], max_tokens=13)
    engine = echo_engine(blocks=7, depth=depth)  # 15 tokens, 4 blocks each
    engine.add(first)
    engine.add(second)
    engine.drain()
    assert [first.output, second.output] == [expected(first)[0], expected(second)[0]]
    assert engine.stats.preemptions == 1
    assert (first.preemptions, second.preemptions) == (0, 1), "the newest is preempted"
