"""RMS normalisation (Zhang and Sennrich, 2019), computed in float32 as all supported models do."""

from __future__ import annotations

import torch

from engine.cpu import ops


class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in x's dtype."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if (out := ops.rms_norm(x, self.weight, self.eps)) is not None:
            return out
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)
