"""What crosses between the host and a GPU without anyone waiting; on CPUs nothing crosses.

torch's allocator of pinned memory keeps a buffer until the copy that reads it is done, so each transfer
has a buffer of its own and none is overwritten early.
"""

from __future__ import annotations

import numpy as np
import torch


def upload(x: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on the device; on a CPU the same memory."""
    tensor = torch.from_numpy(np.ascontiguousarray(x))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


class Download:
    """A small tensor on its way to the host. Reading waits for it, not for what was launched after it."""

    def __init__(self, x: torch.Tensor) -> None:
        self._host = x.to("cpu", non_blocking=True)  # into pinned memory
        self._arrived = None
        if x.device.type == "cuda":
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> np.ndarray:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.numpy()
