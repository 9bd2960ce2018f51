"""The elementwise kernels, called on torch tensors: RMSNorm, rotary embedding, SiLU times up.

Each returns None where the kernels do not apply (no compiler, another device or dtype, a size that is no
multiple of 16), and its caller does the same in torch. A row's result never depends on other rows.

Suffixes: T tokens, N heads, H head size, D features, R half of the rotated dimensions.
"""

from __future__ import annotations

import torch

from engine.cpu.kernels import LANES, kernel


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor | None:
    """weight * round(x / sqrt(mean(x^2) + eps)) of [T, D] or [T, N, H], over the last dimension."""
    cols = x.shape[-1]
    if x.device.type != "cpu" or cols % LANES or x.stride(-1) != 1 or weight.dtype != x.dtype:
        return None
    if x.dim() == 3 and x.stride(1) != cols:
        return None
    run = kernel("rms_norm", x.dtype)
    if run is None:
        return None
    out = torch.empty(x.shape, dtype=x.dtype)
    inner = x.shape[1] if x.dim() == 3 else 1
    run(
        out.data_ptr(), x.data_ptr(), weight.data_ptr(),
        x.shape[0], inner, cols, x.stride(0), eps, torch.get_num_threads(),
    )  # fmt: skip
    return out


def add_rms_norm(
    x_TD: torch.Tensor, delta_TD: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(x + delta, the RMSNorm of that sum)."""
    cols = x_TD.shape[-1]
    if x_TD.device.type != "cpu" or cols % LANES or not x_TD.dtype == delta_TD.dtype == weight.dtype:
        return None
    run = kernel("add_rms_norm", x_TD.dtype)
    if run is None or not (x_TD.is_contiguous() and delta_TD.is_contiguous()):
        return None
    total_TD, out_TD = torch.empty_like(x_TD), torch.empty_like(x_TD)
    run(
        total_TD.data_ptr(), out_TD.data_ptr(), x_TD.data_ptr(), delta_TD.data_ptr(), weight.data_ptr(),
        x_TD.shape[0], cols, eps, torch.get_num_threads(),
    )  # fmt: skip
    return total_TD, out_TD


def rotate(x_TNH: torch.Tensor, cos_T1R: torch.Tensor, sin_T1R: torch.Tensor) -> torch.Tensor | None:
    """Rotates pairs (i, i + R) of each head by float32 angles; dimensions from 2R on are copied."""
    tokens, heads, head_dim = x_TNH.shape
    half = cos_T1R.shape[-1]
    if x_TNH.device.type != "cpu" or half % LANES or x_TNH.stride()[1:] != (head_dim, 1):
        return None
    run = kernel("rotate", x_TNH.dtype)
    if run is None:
        return None
    out = torch.empty(x_TNH.shape, dtype=x_TNH.dtype)
    cos_T1R, sin_T1R = cos_T1R.contiguous(), sin_T1R.contiguous()
    run(
        out.data_ptr(), x_TNH.data_ptr(), cos_T1R.data_ptr(), sin_T1R.data_ptr(),
        tokens, heads, head_dim, half, x_TNH.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    return out


def silu_mul(gate_TD: torch.Tensor, up_TD: torch.Tensor) -> torch.Tensor | None:
    """round(silu(gate)) * up."""
    tokens, width = gate_TD.shape
    if gate_TD.device.type != "cpu" or width % LANES or gate_TD.stride() != up_TD.stride():
        return None
    if gate_TD.stride(1) != 1:
        return None
    run = kernel("silu_mul", gate_TD.dtype)
    if run is None:
        return None
    out = torch.empty(gate_TD.shape, dtype=gate_TD.dtype)
    run(
        out.data_ptr(), gate_TD.data_ptr(), up_TD.data_ptr(),
        tokens, width, gate_TD.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    return out
