"""Rotary position embedding (Su et al., 2021, arXiv 2104.09864) and the ways to stretch it.

Knows nothing of layers or caches: it turns positions into cosines and sines, once a step, in float32.

Keys are cached rotated, so a token's angle must not depend on how its row was cut into chunks, on its
neighbours, or on when it was computed. The static kinds (default, linear, llama3, yarn) are a table over
positions. The two dynamic kinds depend on a length as well:

* "dynamic" (NTK-aware scaling as in transformers' Llama): generate() computes a prompt in one forward
  pass and then one token at a time, so the token at position p is rotated for the length
  max(prompt length, p + 1).
* "qwen_ntk" (Qwen-1's modeling_qwen.py): alpha = 2^ceil(log2(n / seq_length) + 1) - 1, at least 1, is
  taken from the prompt's length n at its first forward pass and kept while the row decodes (the code
  calls it `_ntk_alpha_cached_list`); the base is theta * alpha^(d / (d - 2)).

Both make the keys of a long prompt depend on its length; `engine.models.registry.prefix_salt` keeps the
prefix cache from mixing them.

Suffixes: T tokens, N heads of any kind, H head size, R half of the rotated dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from engine.config import ModelSpec
from engine.cpu import ops

DYNAMIC = ("dynamic", "qwen_ntk")


class Rope:
    """cos and sin for a step's tokens."""

    def __init__(self, spec: ModelSpec, max_len: int, device: torch.device) -> None:
        self.kind = spec.rope.kind
        self.theta = spec.rope.theta
        self.dim = spec.rope.dim or spec.head_dim
        self.params = spec.rope.params
        self.device = device
        if self.kind in DYNAMIC:
            return
        inv_freq_R, scale = _STATIC[self.kind](self.theta, self.dim, self.params)
        angles = torch.arange(max_len, dtype=torch.float32)[:, None] * inv_freq_R
        self.cos = (angles.cos() * scale).to(device)
        self.sin = (angles.sin() * scale).to(device)

    def angles(
        self, positions_T: torch.Tensor, prompt_lens_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), float32 [T, 1, R]. `prompt_lens_T` is the prompt length of each token's row."""
        if self.kind not in DYNAMIC:
            return self.cos[positions_T][:, None], self.sin[positions_T][:, None]
        growth_T = self._growth(positions_T, prompt_lens_T)
        base_T = self.theta * growth_T ** (self.dim / (self.dim - 2))
        exponent_R = torch.arange(0, self.dim, 2, dtype=torch.float32, device=self.device) / self.dim
        angles_TR = positions_T[:, None].float() * (1.0 / base_T[:, None] ** exponent_R).float()
        return angles_TR.cos()[:, None], angles_TR.sin()[:, None]

    def _growth(self, positions_T: torch.Tensor, prompt_lens_T: torch.Tensor) -> torch.Tensor:
        """How much the base grows, float64 so that a length just above the limit is exact."""
        if self.kind == "qwen_ntk":
            train = self.params["train_length"]
            steps_T = torch.ceil(torch.log2(prompt_lens_T.double() / train) + 1)
            return (2.0**steps_T - 1).clamp(min=1.0)
        limit, factor = self.params["max_position"], self.params["factor"]
        length_T = torch.maximum(prompt_lens_T, positions_T + 1).clamp(min=limit).double()
        return factor * length_T / limit - (factor - 1)


def rotate(x_TNH: torch.Tensor, cos_T1R: torch.Tensor, sin_T1R: torch.Tensor) -> torch.Tensor:
    """Rotate the first 2R dimensions of every head, in float32; the halves are paired as in GPT-NeoX."""
    if (out := ops.rotate(x_TNH, cos_T1R, sin_T1R)) is not None:
        return out
    half = cos_T1R.shape[-1]
    a, b = x_TNH[..., :half], x_TNH[..., half : 2 * half]
    parts = [a * cos_T1R - b * sin_T1R, b * cos_T1R + a * sin_T1R]
    if 2 * half < x_TNH.shape[-1]:
        parts.append(x_TNH[..., 2 * half :])
    return torch.cat(parts, dim=-1).to(x_TNH.dtype)


def _default(theta: float, dim: int, params: dict) -> tuple[torch.Tensor, float]:
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim), 1.0


def _linear(theta: float, dim: int, params: dict) -> tuple[torch.Tensor, float]:
    """Position interpolation (Chen et al., 2023, arXiv 2306.15595)."""
    return _default(theta, dim, params)[0] / params["factor"], 1.0


def _llama3(theta: float, dim: int, params: dict) -> tuple[torch.Tensor, float]:
    """Llama 3.1: long wavelengths are interpolated, short ones kept, those between blended."""
    inv_freq_R = _default(theta, dim, params)[0]
    factor, length = params["factor"], params["original_max_position_embeddings"]
    low, high = params["low_freq_factor"], params["high_freq_factor"]
    turns_R = length * inv_freq_R / (2 * math.pi)  # rotations over the trained length
    blend_R = ((turns_R - low) / (high - low)).clamp(0, 1)
    return (1 - blend_R) * inv_freq_R / factor + blend_R * inv_freq_R, 1.0


def _yarn(theta: float, dim: int, params: dict) -> tuple[torch.Tensor, float]:
    """YaRN (Peng et al., 2023, arXiv 2309.00071): blend by rotations, and scale the attention."""
    inv_freq_R = _default(theta, dim, params)[0]
    factor, length = params["factor"], params["original_max_position_embeddings"]

    def dimension_of(turns: float) -> float:
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension_of(params.get("beta_fast") or 32)
    high = dimension_of(params.get("beta_slow") or 1)
    if params.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp_R = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    scale = params.get("attention_factor")
    if scale is None:
        if params.get("mscale") and params.get("mscale_all_dim"):
            scale = mscale(params["mscale"]) / mscale(params["mscale_all_dim"])
        else:
            scale = mscale(1.0)
    return inv_freq_R / factor * ramp_R + inv_freq_R * (1 - ramp_R), float(scale)


_STATIC: dict[str, Callable[[float, int, dict], tuple[torch.Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
