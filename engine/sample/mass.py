"""Probability mass as integers: sums that come out the same in any order, on any number of ranks.

exp(v - max) in units of 2^-40: 2^22 tokens of full mass fit an int64, a token below 2^-40 of the best
one counts nothing. Float sums would depend on how a row is split, and with them the edge of top-p.
"""

from __future__ import annotations

import math

import torch

UNITS = float(1 << 40)
#: A value this far below the maximum has no mass left: ln(2^40) is 27.73.
NEGLIGIBLE = 29.0


def mass(values_RV: torch.Tensor, max_R: torch.Tensor) -> torch.Tensor:
    """[R, V] int64 mass of float32 values, whose row maximum over all ranks is `max_R`."""
    x = values_RV - max_R[:, None]
    return x.exp_().mul_(UNITS).to(torch.int64)


def log_total(total_R: torch.Tensor) -> torch.Tensor:
    """float64 logarithm of a sum of masses, relative to the maximum's own."""
    return total_R.to(torch.float64).log() - math.log(UNITS)
