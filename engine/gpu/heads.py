"""What a layer does to its heads before attention, in one Triton kernel: RMSNorm of queries and keys,
rotary embedding, log-n scaling, and storing keys and values in the paged cache.

In torch these are a dozen passes over the heads. Roundings are those of `engine.models.norm` and
`engine.models.rope`: the normed and the rotated value are rounded to the model's dtype, sums are float32.

State: equal to torch in Triton's interpreter, compiled for sm_90; it has not been run on a GPU yet.

Suffixes: T tokens, N query heads, K KV heads, X all heads (N + 2K), H head size, R rotated pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.attn.base import HeadWork


def prepare_heads(
    qkv_TXH: torch.Tensor, num_heads: int, num_kv_heads: int, work: HeadWork, k_cache: torch.Tensor,
    v_cache: torch.Tensor, slots_T: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Queries, ready to attend, [T, N, H]; keys and values go to their slots.

    Only the first len(slots_T) tokens are real: those beyond are left unwritten.
    """
    tokens, heads, head_dim = qkv_TXH.shape
    qkv_TXH = qkv_TXH.contiguous()
    q_TNH = qkv_TXH.new_empty((tokens, num_heads, head_dim))
    half = 0 if work.cos is None else work.cos.shape[-1]
    absent = slots_T  # a pointer that the kernel never follows
    _prepare[(slots_T.shape[0], heads)](
        q_TNH, k_cache, v_cache, qkv_TXH, slots_T,
        absent if work.cos is None else work.cos, absent if work.sin is None else work.sin,
        absent if work.q_weight is None else work.q_weight,
        absent if work.k_weight is None else work.k_weight,
        absent if work.logn is None else work.logn, work.eps,
        NORM=work.q_weight is not None, LOGN=work.logn is not None, R=half,
        N=num_heads, K=num_kv_heads, H=head_dim, PADDED_H=triton.next_power_of_2(head_dim), num_warps=1,
    )  # fmt: skip
    return q_TNH


@triton.jit
def _prepare(
    q, k_cache, v_cache, qkv, slots, cos, sin, q_weight, k_weight, logn, eps,
    NORM: tl.constexpr, LOGN: tl.constexpr, R: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    H: tl.constexpr, PADDED_H: tl.constexpr,
):  # fmt: skip
    """One program per (token, head of any kind)."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    h = tl.arange(0, PADDED_H)
    here = h < H
    source = qkv + (token * (N + 2 * K) + head) * H
    x = tl.load(source + h, mask=here, other=0.0)
    if head >= N + K:
        slot = tl.load(slots + token).to(tl.int64)
        tl.store(v_cache + (slot * K + head - N - K) * H + h, x, mask=here)
    else:
        wide = x.to(tl.float32)
        pair = h  # the other half of a rotated pair
        if R > 0:
            pair = tl.where(h < R, h + R, tl.where(h < 2 * R, h - R, h))
        other = tl.load(source + pair, mask=here, other=0.0).to(tl.float32)
        if NORM:
            weight = q_weight
            if head >= N:
                weight = k_weight
            scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / H + eps)
            wide = _weighed(wide, scale, weight, h, here, x.dtype)
            other = _weighed(other, scale, weight, pair, here, x.dtype)
        if R > 0:
            turned = here & (h < 2 * R)
            c = tl.load(cos + token * R + h % R, mask=turned, other=1.0)
            s = tl.load(sin + token * R + h % R, mask=turned, other=0.0)
            wide = tl.where(h < R, wide * c - other * s, wide * c + other * s)
        y = wide.to(x.dtype)
        if head < N:
            if LOGN:
                y = (y.to(tl.float32) * tl.load(logn + token)).to(x.dtype)
            tl.store(q + (token * N + head) * H + h, y, mask=here)
        else:
            slot = tl.load(slots + token).to(tl.int64)
            tl.store(k_cache + (slot * K + head - N) * H + h, y, mask=here)


@triton.jit
def _weighed(wide, scale, weight, h, here, dtype: tl.constexpr):
    """weight * round(x * scale), rounded again, in float32."""
    w = tl.load(weight + h, mask=here, other=0.0).to(tl.float32)
    return (w * (wide * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
