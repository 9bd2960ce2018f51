"""The chaos program itself, in about twenty seconds: two cells small, and a violation that it must see."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from tests.chaos.checker import check
from tests.chaos.nemesis import CELLS
from tests.chaos.run import run_cell
from tests.chaos.world import World


@pytest.mark.parametrize("number", ["F2", "F10"])
def test_a_small_cell_is_valid(number: str, tmp_path: Path) -> None:
    figures = run_cell(CELLS[number], 600, 1, "valkey-9", tmp_path)
    assert figures["valid"], figures
    assert (figures["submitted"], figures["lost"], figures["duplicated"]) == (600, 0, 0)
    assert (figures["xlen"], figures["pending"]) == (0, 0)


def test_a_row_taken_out_of_a_sinks_file_is_seen(tmp_path: Path) -> None:
    world = World(tmp_path, engines=1, step_ms=1)
    try:
        world.start(50, per_second=1000, steps=4)
        assert world.drain(60)
        assert check(world.history()).valid
        out = tmp_path / "out.chaos"
        first, *rest = out.read_bytes().splitlines(keepends=True)
        out.write_bytes(b"".join([*rest, rest[0]]))
        verdict = check(world.history())
        gone, twice = orjson.loads(first)["id"], orjson.loads(rest[0])["id"]
        assert (verdict.sinks["chaos"].lost, verdict.sinks["chaos"].duplicated) == ([gone], [twice])
        assert not verdict.valid
    finally:
        world.close()
