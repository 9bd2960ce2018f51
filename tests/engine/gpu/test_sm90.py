"""Every kernel compiles for Hopper, as far as a machine without a GPU can tell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: there is no compiler to try")

SCRIPT = Path(__file__).with_name("compile_for_sm90.py")
ROOT = SCRIPT.parents[3]


def test_every_kernel_compiles_for_sm_90(tmp_path: Path) -> None:
    """In bfloat16; the script does all three dtypes when it is run by hand."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "bfloat16"], capture_output=True, text=True, timeout=280,
        env=environment | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    names = (
        "_attend_chunks",
        "_attend_decoding",
        "_merge",
        "_prepare",
        "_rms_norm",
        "_swiglu",
        "_draw_parts",
    )
    assert all(f'"{name}"' in done.stdout for name in names)
