"""The id index: what was added is found, in this process and the next, and memory stays small."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from headrace.index import IdIndex


def test_what_was_added_is_found_also_by_the_next_process(tmp_path: Path) -> None:
    index = IdIndex(tmp_path / "i.sqlite")
    index.add_many((index.key(f"id-{i}"), b"%d" % i) for i in range(3000))
    assert index.get_many([index.key(f"id-{i}") for i in range(2990, 3010)]) == {
        index.key(f"id-{i}"): b"%d" % i for i in range(2990, 3000)
    }
    index.add_many([(index.key("id-1"), b"other")])
    index.close()
    again = IdIndex(tmp_path / "i.sqlite")
    assert again.get(again.key("id-1")) == b"other"
    assert len(again) == 3000
    assert again.key("id-7") in again
    assert again.key("\ud800") not in again


def test_a_batch_is_in_the_index_whole_or_not_at_all(tmp_path: Path) -> None:
    index = IdIndex(tmp_path / "i.sqlite")

    def items():
        yield index.key("a"), b""
        raise RuntimeError("the caller failed half-way")

    with pytest.raises(RuntimeError):
        index.add_many(items())
    assert len(index) == 0
    index.add_many([(index.key("b"), b"")])
    assert len(index) == 1


def test_a_file_that_is_no_index_is_an_error_and_not_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "i.sqlite").write_bytes(b"x" * 4096)
    with pytest.raises(sqlite3.DatabaseError):
        IdIndex(tmp_path / "i.sqlite")
