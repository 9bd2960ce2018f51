"""What attention needs of a step, and the one protocol that every backend keeps.

A backend owns the paged KV cache of one rank. It knows nothing of requests: rows arrive as lengths and
block tables. `choose` picks a backend once, at load, and says why.

Suffixes: T tokens, R rows, B blocks of a row, N heads, K KV heads, H head size.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from engine.config import ModelSpec
from engine.cpu.build import library


@dataclass(frozen=True, slots=True)
class AttnShape:
    """The attention of one rank: its own heads, and each layer's window (None: all tokens)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    windows: tuple[int | None, ...]  # tokens a query sees, itself included; one entry per layer
    dtype: torch.dtype
    device: torch.device

    @property
    def block_bytes(self) -> int:
        """Bytes of one KV block over all layers."""
        return (
            2 * len(self.windows) * self.block_size * self.num_kv_heads * self.head_dim * self.dtype.itemsize
        )


def attn_shape(
    spec: ModelSpec, heads: int, kv_heads: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> AttnShape:
    """The shape of a rank that holds `heads` query heads and `kv_heads` KV heads."""
    windows = tuple(
        None if layer in spec.full_layers else spec.sliding_window for layer in range(spec.num_layers)
    )
    return AttnShape(heads, kv_heads, spec.head_dim, block_size, windows, dtype, device)


@dataclass(frozen=True, slots=True)
class AttnStep:
    """One step's rows. Row r computes positions [starts[r], starts[r] + counts[r]); its tokens lie at
    [cu[r], cu[r + 1]) of the step. Padding tokens, if any, come after cu[-1] and are not stored."""

    starts: np.ndarray  # int64 [R]
    counts: np.ndarray  # int64 [R], each >= 1
    cu: np.ndarray  # int64 [R + 1]
    tables_RB: torch.Tensor  # int32, on the device; null block beyond a row's own blocks
    slots_T: torch.Tensor  # int64, on the device: block * block_size + offset of each real token


@dataclass(frozen=True, slots=True)
class HeadWork:
    """What a layer does to its heads before attention; None leaves a part out."""

    cos: torch.Tensor | None = None  # float32 [T, 1, R], of R rotated pairs
    sin: torch.Tensor | None = None
    logn: torch.Tensor | None = None  # float32 [T, 1, 1]: a factor on rotated queries
    q_weight: torch.Tensor | None = None  # [H]: RMSNorm of each query head
    k_weight: torch.Tensor | None = None
    eps: float = 0.0


class KVCache:
    """K and V of every layer, apart, [blocks, block_size, kv_heads, head_dim]; block 0 is the null block."""

    def __init__(self, shape: AttnShape, num_blocks: int) -> None:
        size = (num_blocks, shape.block_size, shape.num_kv_heads, shape.head_dim)
        layers = len(shape.windows)
        self.k = [torch.zeros(size, dtype=shape.dtype, device=shape.device) for _ in range(layers)]
        self.v = [torch.zeros(size, dtype=shape.dtype, device=shape.device) for _ in range(layers)]


class AttentionBackend(Protocol):
    """Attention over the cache. Whatever stands in blocks or slots that no row has written, NaN
    included, never reaches an output."""

    name: str
    cache: KVCache

    def allocate(self, num_blocks: int) -> None:
        """Make the cache, empty; a second call replaces it."""
        ...

    def begin(self, step: AttnStep) -> None:
        """Prepare what all layers of the step share."""
        ...

    def attend(
        self, layer: int, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor
    ) -> torch.Tensor:
        """Store the step's keys and values, then attend causally: [T, N, H]; padding rows are anything."""
        ...

    @property
    def attend_heads(self) -> Callable[[int, torch.Tensor, HeadWork], torch.Tensor] | None:
        """`attend` for raw heads [T, N + 2K, H] (queries, keys, values), with the HeadWork done in the kernel
        that stores them; None where torch must do it first."""
        ...


def choose(shape: AttnShape) -> tuple[AttentionBackend, str]:
    """(backend, the reason in a few words)."""
    from engine.attn.sdpa import SdpaBackend

    if shape.device.type == "cpu":
        from engine.attn.cpu_paged import CpuPagedBackend, refusal

        why_not = refusal(shape)
        if why_not is None:
            return CpuPagedBackend(shape), f"cpu_paged: C++ kernel, {library()[1]}"
        return SdpaBackend(shape), f"sdpa: gathered blocks, because {why_not}"
    if importlib.util.find_spec("triton") is None:
        return SdpaBackend(shape), "sdpa: gathered blocks, because Triton is not installed"
    from engine.attn.triton_paged import TritonBackend

    return TritonBackend(shape), "triton: paged kernel"
