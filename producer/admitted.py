"""Which rows of an input were admitted, by which content, in which pass over the file.

This is how a load tells a row that it saw before (the command was given again) from one that stands
twice in the file, and notices a row that changed since. Knows files only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from headrace.errors import HeadraceError
from headrace.index import IdIndex
from producer.rows import Row


class RowChanged(HeadraceError):
    """A row's custom_id stands for another content than in an earlier pass."""


@dataclass(frozen=True, slots=True)
class Admission:
    """`fresh` rows are the first of their custom_id in this pass; `twice` are not."""

    fresh: list[Row]
    twice: list[Row]


class AdmittedRows:
    """The index of one input. `generation` numbers the passes over it and grows with each."""

    def __init__(self, path: Path, generation: int = 1) -> None:
        self._index = IdIndex(path)
        self._generation = generation.to_bytes(4, "big")
        self._count = len(self._index)

    def __len__(self) -> int:
        """Rows ever admitted, over all passes."""
        return self._count

    def ids(self) -> Iterator[str]:
        """Job ids of all rows ever admitted."""
        return (value[4:].hex() for value in self._index.values())

    def admit(self, rows: list[Row]) -> Admission:
        """Sort a batch into fresh and repeated rows; the fresh ones are noted, none of them on RowChanged."""
        known = self._index.get_many({r.key for r in rows})
        added = 0
        noted: dict[bytes, bytes] = {}
        fresh: list[Row] = []
        twice: list[Row] = []
        for row in rows:
            before = noted.get(row.key) or known.get(row.key)
            if before is None:
                added += 1
            elif before.startswith(self._generation):
                twice.append(row)
                continue
            elif before[4:] != bytes.fromhex(row.id):
                raise RowChanged(
                    f"line {row.line}: the row with custom_id {row.custom_id[:80]!r} changed since the "
                    "last run of this output: --fresh starts over, or give the row another custom_id"
                )
            fresh.append(row)
            noted[row.key] = self._generation + bytes.fromhex(row.id)
        self._index.add_many(noted.items())
        self._count += added
        return Admission(fresh, twice)

    def close(self) -> None:
        self._index.close()
