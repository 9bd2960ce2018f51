"""Completions that wait on this machine's disk because the server is away.

One file for each engine boot, locked while the boot lives; a record is on the disk before `add` returns. What
a boot could not commit before it died is committed by the next engine of the same machine, lane and server,
in the dead boot's name: the fence decides, as always, whether the lease still stood. Knows no Redis.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import orjson

from headrace.ledger import Leased
from headrace.messages import Completion

log = logging.getLogger("headrace.engine")

Item = tuple[Leased, Completion]

_SUFFIX = ".spool"


def spool_folder(root: str, server: str, lane: str) -> Path:
    """Where the engines of a lane keep their spools. `root`: the setting; empty: the user's state folder.
    `server` is its URL without a password: entries of one server mean nothing to another."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    name = hashlib.blake2b(f"{server} {lane}".encode(), digest_size=8).hexdigest()
    return Path(root or os.path.join(state, "headrace", "spool")) / f"{lane}-{name}"


class Spool:
    """This boot's file. Used from one thread. Raises OSError where the folder cannot be used."""

    def __init__(self, folder: Path, engine: str, limit: int) -> None:
        """`limit`: bytes that it may hold."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path = folder / f"{engine}{_SUFFIX}"
        self.limit = limit
        self._size = 0
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _sync_folder(folder)

    def add(self, items: Sequence[Item]) -> bool:
        """Write them down; False, and nothing is written, where they do not fit or the disk does not take
        them. They are safe then only as long as this process lives."""
        data = b"".join(map(_record, items))
        if self._size + len(data) > self.limit:
            return False
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]
            os.fsync(self._fd)
        except OSError as e:
            log.error("spool_failed file=%s cause=%s", self.path, e.strerror)
            os.ftruncate(self._fd, self._size)
            return False
        self._size += len(data)
        return True

    def clear(self) -> None:
        """All of it is committed."""
        if self._size:
            os.ftruncate(self._fd, 0)
            self._size = 0

    def close(self) -> None:
        """Keep the file where it holds something."""
        if not self._size:
            self.path.unlink(missing_ok=True)
        os.close(self._fd)


def left_behind(folder: Path) -> Iterator[tuple[str, list[Item]]]:
    """Boot and completions of each spool whose engine is dead. A file is removed when the caller comes back
    for the next one; one that fails with them stays."""
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield path.name.removesuffix(_SUFFIX), _read(path)
            path.unlink(missing_ok=True)
        except BlockingIOError:
            continue  # its engine lives
        finally:
            os.close(fd)


def _record(item: Item) -> bytes:
    one, completion = item
    head = {"stream": one.stream, "entry": one.entry_id, "completion": orjson.Fragment(completion.to_bytes())}
    return orjson.dumps(head, option=orjson.OPT_APPEND_NEWLINE)


def _read(path: Path) -> list[Item]:
    """Whole records; a torn last one was never promised to anybody."""
    items = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            value = orjson.loads(line)
            completion = Completion.model_validate(value["completion"])
            items.append((Leased(value["stream"], value["entry"], b""), completion))
        except (ValueError, KeyError, TypeError) as e:
            log.error("spool_unreadable file=%s cause=%s", path, " ".join(str(e).split())[:200])
    return items


def _sync_folder(folder: Path) -> None:
    """So that the file's name survives a power cut as well as what is in it."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
