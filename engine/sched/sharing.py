"""Who starts from whose blocks: prefix hits at admission, blocks published when computed, and waiting for
a prefix that another row is computing right now.

Joins the prefix cache to rows, blocks and flights for `engine.sched.scheduler`. Without prefix caching
every row starts from nothing and nothing is published.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from engine.errors import EngineError
from engine.request import FinishReason, Request
from engine.sched.blocks import BlockPool
from engine.sched.flight import Flight
from engine.sched.prefix import PrefixCache

#: Steps that a waiting row lets another compute the same prefix block before it does so itself.
PATIENCE = 32


class Sharing:
    """The prefix cache of one engine, seen from its rows; owns the block pool that it shares out."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        enabled: bool,
        hash_: Callable[[bytes], bytes],
        salt_of: Callable[[int], bytes],
    ) -> None:
        """`salt_of(prompt length)` keeps prompts apart whose keys the model rotates differently."""
        self.enabled = enabled
        self.block_size = block_size
        self.prefix = PrefixCache(block_size, hash_)
        self.pool = BlockPool(num_blocks, self.prefix.forget)
        self._salt_of = salt_of
        self._computing: Counter[bytes] = Counter()  # prefix blocks that plans on their way compute

    def hits(self, req: Request) -> tuple[list[int], int | bytes] | None:
        """(cached blocks that the row starts from, uid of the last). None: wait a step, because another
        row is computing the next block of the same prefix.

        Without the wait, a batch of equal prefixes that arrives at once would compute it in every row.
        The wait for one block ends after PATIENCE steps, so a stalled leader holds nobody up for ever.
        """
        if not self.enabled:
            return [], req.salt
        if req.chain is None:
            req.chain = self.prefix.chain(req.prompt, req.output, self.salt(req))
        chain = req.chain
        if chain.awaited in self._computing and chain.waited < PATIENCE:
            chain.waited += 1
            return None
        limit = reusable(req) // self.block_size
        blocks, above = self.prefix.match(chain, limit)
        at = len(blocks)
        if at < limit and (digest := chain.digest(at)) in self._computing:
            if at > chain.patience_at:
                chain.patience_at, chain.waited = at, 0
            if chain.waited < PATIENCE:
                chain.awaited = digest
                chain.waited += 1
                return None
        return blocks, above

    def salt(self, req: Request) -> bytes:
        """Rows with different salts share no blocks, whatever their prompts."""
        return req.salt + self._salt_of(len(req.prompt))

    def computing(self, flight: Flight, req: Request, start: int, end: int) -> None:
        """A plan in the making computes the row's known positions [start, end), in its last row step: others
        may wait for the prefix blocks that it completes."""
        blocks = range(start // self.block_size, end // self.block_size)
        if self.enabled and blocks:
            digests = [req.chain.digest(i) for i in blocks]
            flight.filling.append(len(flight.rows) - 1)
            flight.computing += digests
            self._computing.update(digests)

    def landed(self, flight: Flight) -> None:
        """The blocks that this plan has filled are computed now, and can be shared; not sooner."""
        if not self.enabled:
            return
        steps, rows = flight.plan.steps, flight.rows
        for i in flight.filling:
            req, step = rows[i], steps[i]
            if req is not None and req.finish is not FinishReason.ERROR:
                full = (step.start + step.count) // self.block_size
                for block in self.prefix.publish(req.chain, req.blocks, full):
                    self.pool.keep(block)
        for digest in flight.computing:
            if self._computing[digest] == 1:
                del self._computing[digest]
            else:
                self._computing[digest] -= 1

    def clear(self) -> None:
        """Nothing is cached any more. What running rows hold stays theirs."""
        self.prefix.clear()
        self.pool.forget()

    def check_integrity(self, holders: Iterable[list[int]], flights: Iterable[Flight]) -> None:
        """Raises EngineError when blocks, prefix cache and flights do not add up."""
        self.pool.check_integrity(holders)
        if self.pool.kept() != self.prefix.blocks():
            raise EngineError("the block pool and the prefix cache disagree about which blocks are cached")
        if self._computing != Counter(digest for flight in flights for digest in flight.computing):
            raise EngineError("prefix blocks are counted as being computed, and no plan computes them")


def reusable(req: Request) -> int:
    """Tokens of the row that may come from the prefix cache.

    The last token's logits are always needed, so it is always computed. A score row also needs the logits
    of the token before the first scored one, and all after it; prompt logprobs need them everywhere.
    """
    if req.sampling.score_from is not None:
        return req.sampling.score_from - 1
    if req.sampling.prompt_logprobs is not None:
        return 0
    return req.tokens - 1
