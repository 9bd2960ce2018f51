"""Builders for tests of the engine core: an engine on the echo executor, and what its rows must answer.

`expected` is the echo model's closed form, written without a look at scheduling: whatever the pool, the
budget, preemption or overlap did, the outputs must be these.
"""

from __future__ import annotations

from itertools import count, cycle, islice
from typing import Any

from engine.config import EngineConfig
from engine.engine import Engine
from engine.exec.echo import EchoExecutor, echo_spec
from engine.request import FinishReason, Request, Sampling

VOCAB = 64
STOP = 63
_ids = count()


def echo_engine(
    *, blocks: int = 64, rows: int = 4, budget: int = 32, block_size: int = 4, depth: int = 0,
    context: int = 512, caching: bool = True, lookahead: int = 0, **executor_args: Any,
) -> Engine:  # fmt: skip
    """A started engine, first come first served; `blocks` without the null block."""
    config = EngineConfig(
        model="echo", num_kv_blocks=blocks + 1, max_num_seqs=rows, max_num_batched_tokens=budget,
        block_size=block_size, overlap_depth=depth, max_model_len=context, enable_prefix_caching=caching,
        lookahead=lookahead,
    )  # fmt: skip
    engine = Engine(config, echo_spec(VOCAB, 4096), EchoExecutor(config, **executor_args))
    engine.start()
    return engine


def request(prompt: list[int], *, max_tokens: int = 16, **fields: Any) -> Request:
    own: dict[str, Any] = {
        k: fields.pop(k) for k in ("id", "salt", "priority", "monitor", "on_token") if k in fields
    }
    sampling = Sampling(max_tokens=max_tokens, **fields)
    return Request(own.pop("id", f"r{next(_ids)}"), prompt, sampling, **own)


def prompt(length: int, first: int = 0) -> list[int]:
    """`length` tokens, none of them STOP, no two blocks alike for another `first`."""
    return [(first * 7 + i * i + i) % (VOCAB - 1) for i in range(length)]


def expected(req: Request) -> tuple[list[int], FinishReason]:
    s = req.sampling
    if s.score_from is not None:
        return [], FinishReason.LENGTH
    stream = list(islice(cycle(req.prompt), s.max_tokens))
    if s.stop_token_ids:
        end = max(len(req.prompt), s.min_tokens)
        stream = [*stream[:end], s.stop_token_ids[0]]
        for i, token in enumerate(stream, 1):
            if token in s.stop_token_ids and i >= s.min_tokens and i <= s.max_tokens:
                return stream[:i], FinishReason.STOP
    return stream[: s.max_tokens], FinishReason.LENGTH


def run(engine: Engine, requests: list[Request], *, check: bool = True) -> list[Request]:
    """Add all, step to the end with the integrity check after each step; returns them as they ended."""
    for req in requests:
        engine.add(req)
    ended = []
    while engine.has_work:
        ended += engine.step()
        if check:
            engine.check_integrity()
    assert engine.scheduler.pool.available == engine.scheduler.pool.capacity, "blocks leaked"
    return ended


def outputs(requests: list[Request]) -> list[tuple[list[int], FinishReason | None]]:
    return [(req.output, req.finish) for req in requests]


def computed(engine: Engine) -> int:
    """Tokens that the ranks have computed."""
    assert isinstance(engine.executor, EchoExecutor)
    return engine.executor.computed_tokens
