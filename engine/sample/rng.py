"""The random numbers of a draw: a hash of (seed, position, token id), and nothing else.

There is no generator and no state, so a row's noise is the same alone or in a batch, before and after
preemption, and on any number of ranks: each computes the noise of its own token ids (Salmon et al.,
"Parallel Random Numbers: As Easy as 1, 2, 3", 2011, for the idea of counter-based numbers).

A draw from softmax(v) is the argmax of v + g with g = -log(-log(u)) standard Gumbel noise, u uniform
(Gumbel, 1954; Maddison et al., 2014). With w = 1 - u, g = -log(-log1p(-w)), which is exact in the tail
that decides draws; w has 31 bits.

Suffixes: R rows, V ids of this rank. Integer tensors wrap around, as the hashes want.
"""

from __future__ import annotations

import torch

_M32 = 0x7FFFFFFF


def _signed(x: int, bits: int) -> int:
    return x - (1 << bits) if x >> (bits - 1) else x


#: splitmix64 (Steele, Lea and Flood, 2014).
_GOLDEN = _signed(0x9E3779B97F4A7C15, 64)
_MIX1 = _signed(0xBF58476D1CE4E5B9, 64)
_MIX2 = _signed(0x94D049BB133111EB, 64)
#: lowbias32, the 32-bit mix with the least bias found by C. Wellons' search (hash-prospector, 2018).
_MUL1 = _signed(0x7FEB352D, 32)
_MUL2 = _signed(0x846CA68B, 32)


def row_keys(seeds_R: torch.Tensor, positions_R: torch.Tensor) -> torch.Tensor:
    """[R, 2] int32: the two keys of each row's draw, from int64 seeds and token positions."""
    x = _mix64(_mix64(seeds_R + _GOLDEN) + positions_R)
    return torch.stack((x, x >> 32), dim=1).to(torch.int32)


def id_hashes(start: int, count: int, device: torch.device) -> torch.Tensor:
    """[count] int32: the keyless half of the hash for the token ids from `start` on, computed once."""
    x = torch.arange(start, start + count, dtype=torch.int32, device=device)
    x ^= _shift(x, 16)
    x *= _MUL1
    x ^= _shift(x, 15)
    x *= _MUL2
    return x ^ _shift(x, 16)


def noise_bits(
    id_hashes: torch.Tensor,
    keys: torch.Tensor,
    out: torch.Tensor | None = None,
    spare: torch.Tensor | None = None,
) -> torch.Tensor:
    """The 31 random bits of each token, int32; small numbers mean much noise.

    `keys` is [..., 2] and broadcasts against `id_hashes` with its last dimension taken off. `out` and
    `spare` are buffers of the result's shape for callers that draw over a whole vocabulary.
    """
    x = torch.bitwise_xor(id_hashes, keys[..., 0], out=out)
    x *= _MUL1
    y = torch.bitwise_right_shift(x, 15, out=spare)
    y &= 0x1FFFF  # torch shifts signed numbers arithmetically
    x ^= y
    x ^= keys[..., 1]
    x *= _MUL2
    # The last shift may keep the sign: with the top bit cut off, the map stays balanced (two to one).
    x ^= torch.bitwise_right_shift(x, 16, out=spare)
    x &= _M32
    return x


def gumbel(bits: torch.Tensor) -> torch.Tensor:
    """float64 Gumbel noise of `noise_bits`, between -3.1 and 22.2."""
    w = (bits.to(torch.float64) + 0.5) * 2.0**-31
    return w.neg_().log1p_().neg_().log_().neg_()


def _shift(x: torch.Tensor, n: int) -> torch.Tensor:
    """Logical right shift of int32."""
    return (x >> n) & ((1 << (32 - n)) - 1)


def _mix64(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX2
    return x ^ ((x >> 31) & ((1 << 33) - 1))
