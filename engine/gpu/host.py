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
