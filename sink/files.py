"""A file that only grows, commit by commit: what a crash or a full disk leaves behind is cut off again.

Knows bytes and offsets, nothing of completions. `sink.jsonl` builds on it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from headrace.errors import HeadraceError


class SinkError(HeadraceError):
    """The sink cannot write. What was not committed is not acknowledged and comes again."""


class AppendFile:
    """Owned by one process at a time (flock). `committed` is the length that survives whatever happens.

    Raises SinkError with the path and the fix from every method that touches the disk.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.committed = 0
        self._buffer: list[bytes] = []
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as e:
            raise SinkError(f"output {path} cannot be opened: {e.strerror}") from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise SinkError(
                f"output {path} is being written by another process: wait for it or choose another output"
            ) from None

    @property
    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def lines_from(self, offset: int) -> Iterator[tuple[int, bytes]]:
        """(offset behind the line, line without its end) of every whole line from `offset` on."""
        with open(self.path, "rb", buffering=1 << 18) as f:
            f.seek(offset)
            for line in f:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                yield offset, line[:-1]

    def cut(self, length: int) -> None:
        """Drop everything behind `length`, which becomes the committed length."""
        try:
            if self.size != length:
                os.ftruncate(self._fd, length)
                os.fsync(self._fd)
        except OSError as e:
            raise SinkError(f"cannot cut {self.path} to {length} bytes: {e.strerror}") from None
        self.committed = length

    def append(self, data: bytes) -> None:
        self._buffer.append(data)

    def commit(self) -> None:
        """Write what was appended and wait until it is on the disk. After SinkError the file may end in a
        part of it: the owner cuts it back, together with its other files."""
        data, self._buffer = b"".join(self._buffer), []
        if not data:
            return
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
            os.fsync(self._fd)
        except OSError as e:
            raise SinkError(
                f"cannot write {len(data)} bytes to {self.path} after byte {self.committed}: {e.strerror}; "
                "nothing of it was acknowledged: make room and run the same command again"
            ) from None
        self.committed += len(data)

    def close(self) -> None:
        os.close(self._fd)
