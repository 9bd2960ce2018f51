"""The one matrix product of the engine: `linear(x, weight, bias)`, with the weight in its fastest form.

Knows nothing of ranks or models. Layers call `prepare` once, after loading, and keep what it returns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

#: A weight that `prepare` has put into the form that `linear` multiplies by.
Weight = torch.Tensor


def prepare(weight_OI: torch.Tensor) -> Weight:
    """The weight as `linear` wants it on this device."""
    return weight_OI.contiguous()


def linear(x_TI: torch.Tensor, weight: Weight, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias: [T, O] from [T, I]."""
    return F.linear(x_TI, weight, bias_O)
