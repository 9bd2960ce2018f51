"""The pool of KV blocks: who holds which block, and which freed block is reused first.

Counts references only; what stands in a block is the business of `engine.sched.prefix`, which is told
when a block that still held a cached prefix is taken for something else. Block 0, the null block, is
never handed out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from engine.config import NULL_BLOCK
from engine.errors import CapacityError, EngineError


class BlockPool:
    """`num_blocks` blocks, the null block included.

    A freed block without cached content is reused before any with it; of those, the one freed longest
    ago goes first. A row's blocks are freed in reverse, so that of one prefix the tail is lost first.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None]) -> None:
        if num_blocks < 2:
            raise CapacityError(
                f"{num_blocks} KV blocks leave none beside the null block: raise --kv-cache-memory or "
                "--gpu-memory-utilization."
            )
        self.num_blocks = num_blocks
        self._on_evict = on_evict
        self._refs = [0] * num_blocks
        self._refs[NULL_BLOCK] = 1  # held for ever
        self._kept = bytearray(num_blocks)  # 1: the content is indexed by the prefix cache
        self._blank = list(range(num_blocks - 1, NULL_BLOCK, -1))  # a stack; low numbers go first
        self._lru: OrderedDict[int, None] = OrderedDict()  # free and kept, longest free first

    @property
    def capacity(self) -> int:
        """Blocks that rows can hold."""
        return self.num_blocks - 1

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give, cached ones included."""
        return len(self._blank) + len(self._lru)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, each with one reference. Raises CapacityError and takes none if short."""
        if count > self.available:
            raise CapacityError(f"{count} KV blocks wanted, {self.available} of {self.capacity} are free.")
        taken = []
        for _ in range(count):
            if self._blank:
                block = self._blank.pop()
            else:
                block, _ = self._lru.popitem(last=False)
                self._kept[block] = 0
                self._on_evict(block)
            self._refs[block] = 1
            taken.append(block)
        return taken

    def idle(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` nobody holds: sharing them lowers `available` by as much."""
        return sum(not self._refs[block] for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference to each block; a free one must hold cached content."""
        for block in blocks:
            if not self._refs[block]:
                del self._lru[block]
            self._refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less to each block of a row, last block first."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            if not self._refs[block]:
                if self._kept[block]:
                    self._lru[block] = None
                else:
                    self._blank.append(block)

    def keep(self, block: int) -> None:
        """The prefix cache indexes this held block: once free, it is reused last."""
        self._kept[block] = 1

    def forget(self) -> None:
        """Nothing is cached any more."""
        self._blank.extend(self._lru)
        self._lru.clear()
        self._kept = bytearray(self.num_blocks)

    def kept(self) -> set[int]:
        """Blocks whose content the prefix cache indexes, held or free."""
        return {block for block, kept in enumerate(self._kept) if kept}

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """Every block is free once or held as often as `held` (the block lists of all holders) says.

        Raises EngineError with the blocks for which this does not hold.
        """
        expected = [0] * self.num_blocks
        expected[NULL_BLOCK] = 1
        for blocks in held:
            for block in blocks:
                expected[block] += 1
        wrong = [(b, r, e) for b, (r, e) in enumerate(zip(self._refs, expected, strict=True)) if r != e]
        if wrong:
            raise EngineError(f"KV blocks with wrong counts, as (block, count, holders): {wrong[:8]}")
        free = [*self._blank, *self._lru]
        unheld = [block for block, refs in enumerate(self._refs) if not refs]
        if sorted(free) != unheld:
            raise EngineError(f"free KV blocks {sorted(free)[:8]} are not the unheld ones {unheld[:8]}")
        mixed = [b for b in self._blank if self._kept[b]] + [b for b in self._lru if not self._kept[b]]
        if mixed:
            raise EngineError(f"free KV blocks in the wrong list: {mixed[:8]}")
