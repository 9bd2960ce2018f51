"""The block pool: who is evicted first, and that no block is lost or handed out twice."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.config import NULL_BLOCK
from engine.errors import CapacityError, EngineError
from engine.sched.blocks import BlockPool


def pool_of(num_blocks: int) -> tuple[BlockPool, list[int]]:
    evicted: list[int] = []
    return BlockPool(num_blocks, evicted.append), evicted


def cached(pool: BlockPool, count: int) -> list[int]:
    blocks = pool.allocate(count)
    for block in blocks:
        pool.keep(block)
    return blocks


def test_the_null_block_is_never_handed_out() -> None:
    pool, _ = pool_of(5)
    assert pool.capacity == 4
    assert NULL_BLOCK not in pool.allocate(4)


def test_a_pool_without_one_usable_block_is_refused() -> None:
    with pytest.raises(CapacityError, match="1 KV blocks leave none beside the null block: raise"):
        pool_of(1)


def test_a_request_for_too_many_blocks_takes_none() -> None:
    pool, _ = pool_of(5)
    pool.allocate(2)
    with pytest.raises(CapacityError, match="3 KV blocks wanted, 2 of 4 are free"):
        pool.allocate(3)
    assert pool.available == 2


def test_the_tail_of_a_freed_prefix_is_evicted_first() -> None:
    pool, evicted = pool_of(4)
    blocks = cached(pool, 3)
    pool.release(blocks)
    assert pool.allocate(2) == [blocks[2], blocks[1]]
    assert evicted == [blocks[2], blocks[1]]


def test_the_prefix_freed_longest_ago_is_evicted_first() -> None:
    pool, evicted = pool_of(5)
    old, new = cached(pool, 2), cached(pool, 2)
    pool.release(old)
    pool.release(new)
    pool.share(old)  # used again: now the youngest
    pool.release(old)
    pool.allocate(2)
    assert sorted(evicted) == sorted(new)


def test_blocks_without_cached_content_are_reused_before_any_with_it() -> None:
    pool, evicted = pool_of(4)
    kept, blank = cached(pool, 1), pool.allocate(2)
    pool.release(kept)
    pool.release(blank)
    assert sorted(pool.allocate(2)) == sorted(blank)
    assert evicted == []


def test_a_shared_block_stays_until_its_last_holder_leaves() -> None:
    pool, _ = pool_of(3)
    blocks = cached(pool, 2)
    pool.share(blocks)
    pool.release(blocks)
    assert pool.available == 0
    assert pool.idle(blocks) == 0
    pool.release(blocks)
    assert pool.available == 2
    assert pool.idle(blocks) == 2


def test_the_integrity_check_names_blocks_whose_counts_are_wrong() -> None:
    pool, _ = pool_of(4)
    blocks = pool.allocate(2)
    pool.check_integrity([blocks])
    with pytest.raises(EngineError, match=rf"\({blocks[0]}, 1, 0\)"):
        pool.check_integrity([blocks[1:]])
    with pytest.raises(EngineError, match=rf"\({blocks[0]}, 1, 2\)"):
        pool.check_integrity([blocks, blocks[:1]])


class Pool(RuleBasedStateMachine):
    """Random use against the plainest model: a list of holders and a set of cached blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.cached: set[int] = set()
        self.pool = BlockPool(9, self.evict)
        self.holders: list[list[int]] = []

    def evict(self, block: int) -> None:
        assert not any(block in blocks for blocks in self.holders), "a held block was evicted"
        self.cached.remove(block)

    @rule(count=st.integers(0, 4))
    def allocate(self, count: int) -> None:
        if count <= self.pool.available:
            self.holders.append(self.pool.allocate(count))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.holders))
        for block in blocks:
            self.pool.keep(block)
            self.cached.add(block)

    @precondition(lambda self: self.cached)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        blocks = data.draw(st.lists(st.sampled_from(sorted(self.cached)), unique=True))
        self.pool.share(blocks)
        self.holders.append(blocks)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.pool.release(blocks)

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        self.cached.clear()

    @invariant()
    def adds_up(self) -> None:
        self.pool.check_integrity(self.holders)
        assert self.pool.kept() == self.cached
        held = {block for blocks in self.holders for block in blocks}
        assert self.pool.available == self.pool.capacity - len(held)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
