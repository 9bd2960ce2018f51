"""What the engine has done and how full it is: plain numbers, read by the service, `top` and benchmarks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class EngineStats:
    """Counters since the engine was built (a restart of its ranks keeps them), then gauges of this moment."""

    steps: int = 0  # plans whose result has arrived
    prefill_tokens: int = 0  # computed at positions that were known: prompts, and all of a resumed row
    decode_tokens: int = 0  # computed one at a time behind the prompt
    output_tokens: int = 0  # accepted into an output
    prefix_query_tokens: int = 0  # prompt tokens admitted while prefix caching is on
    prefix_hit_tokens: int = 0  # of those, already cached
    preemptions: int = 0
    finished: int = 0
    scheduling_s: float = 0.0  # planning steps and applying results
    executing_s: float = 0.0  # waiting for results
    allreduces: int = 0

    kv_blocks: int = 0  # that rows can hold
    kv_used: int = 0  # held by rows; cached blocks that nobody holds count as free
    running: int = 0
    waiting: int = 0

    @property
    def kv_usage(self) -> float:
        """Share of the KV pool that rows hold."""
        return self.kv_used / self.kv_blocks if self.kv_blocks else 0.0

    @property
    def prefix_hit_rate(self) -> float:
        return self.prefix_hit_tokens / self.prefix_query_tokens if self.prefix_query_tokens else 0.0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {
            "kv_usage": self.kv_usage, "prefix_hit_rate": self.prefix_hit_rate
        }  # fmt: skip
