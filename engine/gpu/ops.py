"""Chooses the Triton kernels for tensors on a GPU. Each verb answers None where they do not apply (another
device, or Triton is not installed), and its caller does the same in torch.

Suffixes: T tokens, D features.
"""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor | None:
    """`engine.gpu.elementwise.rms_norm`"""
    kernels = _kernels(x.device.type)
    return None if kernels is None else kernels.rms_norm(x, weight, eps)


def add_rms_norm(
    x_TD: torch.Tensor, delta_TD: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`engine.gpu.elementwise.add_rms_norm`"""
    kernels = _kernels(x_TD.device.type)
    return None if kernels is None else kernels.add_rms_norm(x_TD, delta_TD, weight, eps)


def silu_mul(gate_TD: torch.Tensor, up_TD: torch.Tensor) -> torch.Tensor | None:
    """`engine.gpu.elementwise.silu_mul`"""
    kernels = _kernels(gate_TD.device.type)
    return None if kernels is None else kernels.silu_mul(gate_TD, up_TD)


@functools.cache
def _kernels(device: str) -> ModuleType | None:
    if device != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from engine.gpu import elementwise

    return elementwise
