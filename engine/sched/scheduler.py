"""Plans steps: one token budget, shared by every row whose computed tokens lag behind its known tokens.

There is no prefill phase and no decode phase (after vLLM V1's scheduler). Running rows are served first,
in the order of priority and start, then waiting ones are admitted, in the order of `engine.sched.waiting`;
a long prompt takes what is left of the budget and goes on in the next step. Sits between `engine.engine`
and the executor; does no I/O.

With overlap, plan N+1 is made before result N is known. So `Request.computed` advances when a plan is
made, and tokens that will have been sampled by then are only counted (`Request.pending`). A row that
leaves while a plan with it is on its way drops out of that plan's record (`Flight`), and its blocks stay
held until that plan's result has arrived.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from time import monotonic

from engine.errors import EngineError
from engine.exec.wire import NewRow, RowStep, StepPlan, StepResult
from engine.request import FinishReason, Request
from engine.sched.admission import Limits, blocks_for
from engine.sched.flight import Flight, land
from engine.sched.lengths import Lengths
from engine.sched.lookahead import Lookahead
from engine.sched.plan import Machine
from engine.sched.prefix import sha256
from engine.sched.sharing import Sharing
from engine.sched.waiting import Line, Waiting
from engine.stats import EngineStats


class Scheduler:
    """Rows, blocks and queues of one engine. Not thread-safe: `engine.engine` is its only caller."""

    def __init__(
        self,
        limits: Limits,
        max_rows: int,
        budget: int,
        stats: EngineStats,
        *,
        lookahead: int = 0,
        cache_prefixes: bool = True,
        hash_: Callable[[bytes], bytes] = sha256,
        salt_of: Callable[[int], bytes] = lambda prompt_len: b"",
    ) -> None:
        """`budget`: tokens that one step may compute; `lookahead`: waiting requests whose order is planned
        (0: first come, first served); `hash_` names prefix blocks (tests make it collide); `salt_of`:
        `engine.models.registry.prefix_salt` of the model."""
        self.limits = limits
        self.stats = stats
        self.budget = budget
        self.max_rows = max_rows
        self.block_size = limits.block_size
        self.sharing = Sharing(limits.kv_blocks + 1, limits.block_size, cache_prefixes, hash_, salt_of)
        self.pool = self.sharing.pool
        self.lookahead = lookahead
        # Without shared prefixes no two prompts have a block in common.
        shared = limits.block_size if cache_prefixes else limits.context + 1
        self._machine = Machine(shared, max_rows, budget, limits.kv_blocks * limits.block_size)
        self._lengths = Lengths()
        self.waiting = self._new_queue()
        self.running: list[Request] = []  # by priority, then start: the last is the first to be preempted
        self.flights: deque[Flight] = deque()
        self._next_step = 0
        self._starts = 0
        self._free_rows = list(range(max_rows))  # a heap: low rows first, so that batches stay dense
        self._left: list[int] = []  # rows that ended or were preempted since the last plan

    # -- what the engine calls -------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raises InvalidRequest for what can never run. Pure; may be called from any thread."""
        self.limits.check(request)

    def add(self, request: Request) -> None:
        """Queue a request that `check` has let pass."""
        request.seq = -1
        self.waiting.add(request)

    def schedule(self) -> StepPlan | None:
        """The next plan, or None when nothing can be computed before another result arrives."""
        draft = Flight(StepPlan(self._next_step, [], [], self._left), [], [])
        budget = self._serve_running(draft)
        self._admit(draft, budget)
        if not draft.rows:
            return None
        self._next_step += 1
        self._left = []
        self.flights.append(draft)
        return draft.plan

    def update(self, plan: StepPlan, result: StepResult) -> list[Request]:
        """Apply the result of the oldest plan on its way, and return the requests that ended with it."""
        flight = self.flights.popleft()
        if flight.plan is not plan:
            raise EngineError(f"step {plan.step} is not the oldest on its way: {flight.plan.step} is")
        ended, accepted = land(flight, result, monotonic())
        for blocks in flight.leaving:
            self.pool.release(blocks)
        self.sharing.landed(flight)
        if ended:
            for req in ended:
                self._vacate(req)
                self._lengths.learn(req)
            self.running = [req for req in self.running if req.finish is None]
        stats = self.stats
        stats.steps += 1
        stats.output_tokens += accepted
        stats.finished += len(ended)
        stats.allreduces += result.allreduces
        return ended

    def cancel(self, req: Request) -> None:
        """End a request that has not ended, wherever it is."""
        if req.row >= 0:
            self.running.remove(req)
            self._vacate(req)
        else:
            self.waiting.remove(req)
        req.finish = FinishReason.CANCELLED
        req.finished_at = monotonic()
        self.stats.finished += 1

    def evacuate(self) -> list[Request]:
        """Take out all requests, in the order in which they should run, ready to be added anew here or
        in another scheduler. They keep their output; what they computed is lost."""
        out = [*self.running, *self.waiting]
        for req in self.running:
            self._vacate(req)
            req.preemptions += 1
        for req in out:
            req.chain = None
        self.running = []
        self.waiting = self._new_queue()
        return out

    def check_integrity(self) -> None:
        """Raises EngineError when rows, blocks and prefix cache do not add up. For tests and idle times."""
        holders = [req.blocks for req in self.running]
        holders += [blocks for flight in self.flights for blocks in flight.leaving]
        self.sharing.check_integrity(holders, self.flights)
        rows = sorted([*self._free_rows, *(req.row for req in self.running)])
        if rows != list(range(self.max_rows)):
            raise EngineError(f"rows {rows} are not each free or running once")
        if self.running != sorted(self.running, key=_order):
            raise EngineError(f"running rows are out of order: {[_order(req) for req in self.running]}")

    def _new_queue(self) -> Waiting:
        def planned() -> Line:
            return Lookahead(self.lookahead, self._machine, self._lengths, self.sharing.salt)

        return Waiting(planned) if self.lookahead else Waiting()

    # -- the policy ------------------------------------------------------------------------------

    def _serve_running(self, draft: Flight) -> int:
        """Serve running rows in order; returns the budget left."""
        budget, size = self.budget, self.block_size
        steps, rows = draft.plan.steps, draft.rows
        decoded = 0
        # Rows may be preempted from the list's end meanwhile; a list's iterator allows just that.
        for req in self.running:
            start, pending = req.computed, req.pending
            prompt_len = len(req.prompt)
            known = prompt_len + len(req.output) + pending
            count = known - start
            if count <= 0 or (pending and known >= prompt_len + req.sampling.max_tokens):
                continue  # nothing to do, or a result on its way will surely end the row
            if not budget:
                break
            if count > budget:
                count = budget
            end = start + count
            added: Sequence[int] = ()
            if end > len(req.blocks) * size:
                if not self._make_room(req):
                    continue
                # Only decoding rows grow: admission gives a row blocks for all tokens that it brings.
                added = self.pool.allocate(1)
                req.blocks += added
            rows.append(req)
            req.computed = end
            if start >= prompt_len and count == 1:
                decoded += 1
                sample = end == known  # not so where a resumed row's chunk of one is all that the budget gave
                if not end % size:
                    draft.filling.append(len(rows) - 1)
            else:
                self.stats.prefill_tokens += count
                self.sharing.computing(draft, req, start, end)
                sample = end == known and req.sampling.score_from is None
            req.pending = pending + sample
            steps.append(RowStep(req.row, start, count, sample, added))
            budget -= count
        self.stats.decode_tokens += decoded
        return budget

    def _make_room(self, req: Request) -> bool:
        """One block for `req`: preempt newer rows until there is one. False when `req` has to go without,
        because it was the newest itself, or because blocks come free with a result on its way."""
        while not self.pool.available:
            if any(flight.leaving for flight in self.flights):
                return False
            victim = self.running[-1]
            self._preempt(victim)
            if victim is req:
                return False
        return True

    def _preempt(self, req: Request) -> None:
        """The row goes back to the queue. What it knows stays; what it computed is computed again, save
        what the prefix cache still holds by then."""
        self.running.pop()
        self._vacate(req)
        req.preemptions += 1
        self.stats.preemptions += 1
        self.waiting.resume(req)

    def _vacate(self, req: Request) -> None:
        """Take a row's number and blocks away; the next plan tells the ranks."""
        last = None
        for flight in self.flights:
            if req in flight.rows:
                flight.rows[flight.rows.index(req)] = None
                last = flight
        if last is None:
            self.pool.release(req.blocks)
        else:
            last.leaving.append(req.blocks)
        self._left.append(req.row)
        heapq.heappush(self._free_rows, req.row)
        req.row = -1
        req.blocks = []
        req.computed = req.pending = 0

    def _admit(self, draft: Flight, budget: int) -> None:
        """Give rows to waiting requests, in order; one that waits for a prefix lets others pass."""
        if not self._free_rows:
            return
        admitted = []
        for req in islice(self.waiting, len(self._free_rows) + self.max_rows):
            if not budget or not self._free_rows:
                break
            hits = self.sharing.hits(req)
            if hits is None:
                continue
            blocks, above = hits
            wanted = blocks_for(req.tokens, self.block_size) - len(blocks)
            # The watermark: each running row will want a block within block_size steps. Without it, a full
            # pool admits a row only to preempt it again.
            if wanted + self.pool.idle(blocks) + len(self.running) > self.pool.available:
                break
            admitted.append(req)
            self.pool.share(blocks)
            req.blocks = blocks + self.pool.allocate(wanted)
            req.row = heapq.heappop(self._free_rows)
            if req.seq < 0:
                req.seq = self._starts
                self._starts += 1
            req.computed = len(blocks) * self.block_size
            if self.sharing.enabled:
                req.chain.published, req.chain.above = len(blocks), above
                if not req.preemptions:
                    req.cached = req.computed
                    self.stats.prefix_query_tokens += req.tokens
                    self.stats.prefix_hit_tokens += req.computed
            insort(self.running, req, key=_order)
            budget -= self._begin(draft, req, budget)
        for req in admitted:
            self.waiting.remove(req)

    def _begin(self, draft: Flight, req: Request, budget: int) -> int:
        """Plan an admitted row's first chunk; returns its tokens."""
        known, start = req.tokens, req.computed
        count = min(known - start, budget)
        sample = start + count == known and req.sampling.score_from is None
        draft.plan.new.append(
            NewRow(req.row, req.prompt + req.output, len(req.prompt), start, req.blocks[:], req.sampling)
        )
        draft.plan.steps.append(RowStep(req.row, start, count, sample))
        draft.rows.append(req)
        self.sharing.computing(draft, req, start, start + count)
        req.computed = start + count
        req.pending = int(sample)
        self.stats.prefill_tokens += count
        return count


def _order(req: Request) -> tuple[int, int]:
    return req.priority, req.seq
