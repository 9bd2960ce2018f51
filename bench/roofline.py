"""What a machine could do at best: the seconds of a workload from two rates, and how to measure those on a
GPU. Knows nothing of engines.

The bound counts what cannot be avoided: products of prompt tokens at the rate of large GEMMs; for each
decoding step the greater of its products and of the bytes of weights and keys and values that it reads.
Prompts come first, all rows then decode together. No time for launches, sampling or norms.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Rates:
    """A machine's own: bytes moved by a large copy (read and written) and bfloat16 FLOP of a large GEMM, each
    a second."""

    bytes: float
    flop: float


def seconds(config: dict[str, Any], rows: Sequence[tuple[int, int]], rates: Rates) -> float:
    """The least time for `rows` of (prompt tokens, output tokens) on a dense model in bfloat16, described by
    config.json's names."""
    layers, d = config["num_hidden_layers"], config["hidden_size"]
    heads, kv_heads, h = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    layer_weights = layers * (d * h * (2 * heads + 2 * kv_heads) + 3 * d * config["intermediate_size"])
    head_weights = config["vocab_size"] * d
    kv_bytes = 2 * layers * kv_heads * h * 2  # of one token

    def attention(pairs: float) -> float:
        return 4 * layers * heads * h * pairs  # query-key pairs, in both products

    prompts = sum(p for p, _ in rows)
    flop = 2 * layer_weights * prompts + 2 * head_weights * len(rows)
    total = (flop + attention(sum(p * (p + 1) / 2 for p, _ in rows))) / rates.flop
    for step in range(1, max(out for _, out in rows)):  # the first token comes with the prompt
        alive = [p + step for p, out in rows if out > step]
        flop = 2 * (layer_weights + head_weights) * len(alive) + attention(sum(alive))
        moved = 2 * (layer_weights + head_weights) + kv_bytes * sum(alive)
        total += max(flop / rates.flop, moved / rates.bytes)
    return total


def measure(device: torch.device, quick: bool = False) -> Rates:
    """Rates of this machine: the best of ten calls, each waited for."""
    size, n = (1 << 24, 256) if quick else (1 << 31, 8192)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    copy = best_of(lambda: target.copy_(source), device)
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    return Rates(2 * size / copy, 2 * n**3 / best_of(lambda: a @ b, device))


def best_of(call: Callable[[], object], device: torch.device, times: int = 10) -> float:
    spent = []
    for _ in range(times + 2):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - began)
    return min(spent[2:])
