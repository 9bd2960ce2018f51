"""Chooses the Triton kernels for tensors on a GPU. Each verb answers None where they do not apply (another
device, or Triton is not installed), and its caller does the same in torch.

Suffixes: T tokens, D features, S rows of a step, R all rows, V ids of this rank.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import numpy as np
import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor | None:
    """`engine.gpu.elementwise.rms_norm`"""
    kernels = _kernels("elementwise", x.device.type)
    return None if kernels is None else kernels.rms_norm(x, weight, eps)


def add_rms_norm(
    x_TD: torch.Tensor, delta_TD: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`engine.gpu.elementwise.add_rms_norm`"""
    kernels = _kernels("elementwise", x_TD.device.type)
    return None if kernels is None else kernels.add_rms_norm(x_TD, delta_TD, weight, eps)


def silu_mul(gate_TD: torch.Tensor, up_TD: torch.Tensor) -> torch.Tensor | None:
    """`engine.gpu.elementwise.silu_mul`"""
    kernels = _kernels("elementwise", gate_TD.device.type)
    return None if kernels is None else kernels.silu_mul(gate_TD, up_TD)


def draw(
    logits_SV: torch.Tensor, rows: list[int], seeds_R: np.ndarray, temperatures_R: np.ndarray,
    positions_S: torch.Tensor, first_id: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:  # fmt: skip
    """`engine.gpu.draw.draw`, with the settings of these rows."""
    kernels = _kernels("draw", logits_SV.device.type)
    if kernels is None:
        return None
    return kernels.draw(logits_SV, seeds_R[rows], temperatures_R[rows], positions_S, first_id)


@functools.cache
def _kernels(module: str, device: str) -> ModuleType | None:
    if device != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(f"engine.gpu.{module}")
