"""A map from 16-byte keys to small values on disk, whose memory does not grow with it.

The producer keeps the rows of its input in one, the JSONL sink the job ids in its output. Both can be
rebuilt from the files they describe, so a lost or torn index costs time and nothing else: it is synced
when SQLite sees fit, not at each commit.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

#: Page cache, in KiB. The rest is left to the page cache of the system.
_CACHE_KIB = 2 << 10
#: Keys in one query; SQLite's own limit is 32,766 parameters.
_CHUNK = 500


class IdIndex:
    """Thread-safe. Raises sqlite3.Error where the disk does not hold (full, read-only, not a database)."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        self._db.execute("CREATE TABLE IF NOT EXISTS ids (k BLOB PRIMARY KEY, v BLOB NOT NULL) WITHOUT ROWID")

    @staticmethod
    def key(text: str) -> bytes:
        """The 16 bytes that stand for an id of any length."""
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()

    def add_many(self, items: Iterable[tuple[bytes, bytes]]) -> None:
        """Set all of them in one transaction, replacing what stood there."""
        with self._lock, self._db:
            self._db.execute("BEGIN")
            self._db.executemany("INSERT OR REPLACE INTO ids VALUES (?, ?)", items)

    def get(self, key: bytes) -> bytes | None:
        return self.get_many([key]).get(key)

    def get_many(self, keys: Collection[bytes]) -> dict[bytes, bytes]:
        """Those of `keys` that are there, with their values."""
        wanted = list(keys)
        found: dict[bytes, bytes] = {}
        with self._lock:
            for start in range(0, len(wanted), _CHUNK):
                chunk = wanted[start : start + _CHUNK]
                marks = ",".join("?" * len(chunk))
                found.update(self._db.execute(f"SELECT k, v FROM ids WHERE k IN ({marks})", chunk))
        return found

    def values(self) -> Iterator[bytes]:
        """All values, in the order of their keys; the index may grow meanwhile."""
        after = b""
        while True:
            with self._lock:
                page = self._db.execute(
                    "SELECT k, v FROM ids WHERE k > ? ORDER BY k LIMIT ?", (after, _CHUNK)
                ).fetchall()
            if not page:
                return
            after = page[-1][0]
            yield from (value for _, value in page)

    def __contains__(self, key: bytes) -> bool:
        return self.get(key) is not None

    def __len__(self) -> int:
        with self._lock:
            return self._db.execute("SELECT count(*) FROM ids").fetchone()[0]

    def close(self) -> None:
        with self._lock:
            self._db.close()
