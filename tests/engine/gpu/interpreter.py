"""Import this before any kernel: tests run on a GPU where there is one, else in Triton's interpreter.

Where Triton is not installed (torch for CPUs does not bring it) the importing module is skipped.
"""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be run here")

#: What a result may differ by from torch's, after up to three roundings. The interpreter cuts bfloat16 off
#: where GPUs and torch round to the nearest.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2 if DEVICE.type == "cuda" else 3e-2}
