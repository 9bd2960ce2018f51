"""RMS normalisation (Zhang and Sennrich, 2019), computed in float32 as all supported models do."""

from __future__ import annotations

import torch

from engine.cpu import ops
from engine.gpu import ops as gpu_ops


class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in x's dtype."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if (out := ops.rms_norm(x, self.weight, self.eps)) is not None:
            return out
        if (out := gpu_ops.rms_norm(x, self.weight, self.eps)) is not None:
            return out
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)

    def after_adding(
        self, x_TD: torch.Tensor, delta_TD: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x + delta, the norm of that sum): the residual stream and a layer's input."""
        if delta_TD is None:
            return x_TD, self(x_TD)
        if (both := ops.add_rms_norm(x_TD, delta_TD, self.weight, self.eps)) is not None:
            return both
        if (both := gpu_ops.add_rms_norm(x_TD, delta_TD, self.weight, self.eps)) is not None:
            return both
        x_TD = x_TD + delta_TD
        return x_TD, self(x_TD)
