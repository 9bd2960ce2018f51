"""Puts `examples/` on the import path: its scripts are run by hand and belong to no package."""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
