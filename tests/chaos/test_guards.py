"""The mutation proof: without any one of its guards, headrace fails a test named after the promise."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.guards import GUARDS, Guard, without


@pytest.mark.parametrize("guard", GUARDS, ids=lambda g: g.name.replace(" ", "-"))
def test_a_missing_guard_is_noticed(guard: Guard, tmp_path: Path) -> None:
    done = without(guard, tmp_path)
    said = done.stdout[-3000:] + done.stderr[-1000:]
    assert done.returncode == 1, f"{guard.test} passes without the {guard.name}, or did not run:\n{said}"
    assert "FAILED" in done.stdout, said
