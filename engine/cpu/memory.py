"""Large tensors in huge pages. Knows nothing of what they hold.

A page of 4 KiB holds two tokens of a layer's keys: attention would look up more addresses than data.
"""

from __future__ import annotations

import math
import mmap

import torch

#: Smaller tensors gain nothing.
HUGE_PAGE = 2 << 20


def zeros(size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Like torch.zeros on the CPU. Every page is real when it returns: a step never waits for one."""
    number = math.prod(size)
    length = number * dtype.itemsize
    if length < HUGE_PAGE:
        return torch.zeros(size, dtype=dtype)
    memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=number).view(size).zero_()  # keeps the mapping
