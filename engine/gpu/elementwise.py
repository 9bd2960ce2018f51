"""RMSNorm, RMSNorm after the residual's addition, and SwiGLU: each one pass over its rows, in Triton.

Roundings are those of `engine.models.norm` and torch's silu in the model's dtype, so a GPU with these
kernels computes what one without them does, up to the order of float32 sums.

State: equal to torch in Triton's interpreter, compiled for sm_90; it has not been run on a GPU yet.

Suffixes: T tokens, N heads, D features, I the MLP's width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Columns of one program of SwiGLU.
SWIGLU_COLUMNS = 1024


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * round(x / sqrt(mean(x^2) + eps)) over the last dimension of x, [T, D] or [T, N, D]."""
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _norm(rows, None, rows, out, weight, eps)
    return out


def add_rms_norm(
    x_TD: torch.Tensor, delta_TD: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + delta, the RMSNorm of that sum)."""
    total_TD, out_TD = (torch.empty_like(x_TD, memory_format=torch.contiguous_format) for _ in range(2))
    _norm(x_TD, delta_TD, total_TD, out_TD, weight, eps)
    return total_TD, out_TD


def silu_mul(gate_TI: torch.Tensor, up_TI: torch.Tensor) -> torch.Tensor:
    """round(silu(gate)) * up."""
    tokens, width = gate_TI.shape
    out_TI = torch.empty((tokens, width), dtype=gate_TI.dtype, device=gate_TI.device)
    _swiglu[(tokens, triton.cdiv(width, SWIGLU_COLUMNS))](
        out_TI, gate_TI, up_TI, width, gate_TI.stride(0), up_TI.stride(0), COLUMNS=SWIGLU_COLUMNS
    )
    return out_TI


def _norm(
    x: torch.Tensor, delta: torch.Tensor | None, total: torch.Tensor, out: torch.Tensor,
    weight: torch.Tensor, eps: float,
) -> None:  # fmt: skip
    rows, width = x.shape
    padded = triton.next_power_of_2(width)
    _rms_norm[(rows,)](
        out, total, x, x if delta is None else delta, weight, width, x.stride(0),
        0 if delta is None else delta.stride(0), eps, ADD=delta is not None, PADDED=padded,
        num_warps=min(8, max(1, padded // 256)),
    )  # fmt: skip


@triton.jit
def _rms_norm(
    out, total, x, delta, weight, width, x_stride, delta_stride, eps,
    ADD: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PADDED)
    here = i < width
    value = tl.load(x + row * x_stride + i, mask=here, other=0.0)
    if ADD:
        more = tl.load(delta + row * delta_stride + i, mask=here, other=0.0)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(value.dtype)
        tl.store(total + row * width + i, value, mask=here)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    w = tl.load(weight + i, mask=here, other=0.0).to(tl.float32)
    normed = (wide * scale).to(value.dtype).to(tl.float32)
    tl.store(out + row * width + i, (w * normed).to(value.dtype), mask=here)


@triton.jit
def _swiglu(out, gate, up, width, gate_stride, up_stride, COLUMNS: tl.constexpr):
    """One program per (row, COLUMNS columns)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = i < width
    g = tl.load(gate + row * gate_stride + i, mask=here, other=0.0)
    u = tl.load(up + row * up_stride + i, mask=here, other=0.0).to(tl.float32)
    wide = g.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(g.dtype).to(tl.float32)
    tl.store(out + row * width + i, (silu * u).to(g.dtype), mask=here)
