"""Reading an input file line by line in constant memory, whatever the file holds.

A line longer than `MAX_LINE_BYTES` is skipped in pieces and handed on as too long, so that one row of
10 GB costs neither memory nor its neighbours. This file knows bytes and line numbers only; what a line
means is `producer.rows`' business.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, FileIO
from pathlib import Path
from typing import IO

from headrace.errors import HeadraceError

#: Longest line that is parsed. A job's ceiling is 1 MiB, which JSON escapes may spell six times longer.
MAX_LINE_BYTES = 6 << 20
#: Piece in which the rest of a longer line is skipped.
SKIP_BYTES = 1 << 16
#: Name of standard input on the command line.
STDIN = "-"
_BUFFER = 1 << 18


class InputError(HeadraceError):
    """The input cannot be read at all: nothing is started."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line without its end. `data` is empty where `size` exceeds the limit; `digest` covers all of it."""

    number: int  # from 1
    data: bytes
    size: int
    digest: bytes

    @property
    def too_long(self) -> bool:
        return self.size > MAX_LINE_BYTES


@contextmanager
def open_input(path: str) -> Iterator[IO[bytes]]:
    """The input as a buffered byte stream; `-` is standard input. Raises InputError with the fix."""
    if path == STDIN:
        # Not sys.stdin: a thread still reading from that one at exit makes the interpreter abort.
        yield BufferedReader(FileIO(0, closefd=False), _BUFFER)
        return
    try:
        stream = BufferedReader(FileIO(path), _BUFFER)
    except FileNotFoundError:
        raise InputError(f"input file {path} does not exist: check the path") from None
    except IsADirectoryError:
        raise InputError(f"input {path} is a folder: name a .jsonl or .txt file, or - for stdin") from None
    except OSError as e:
        raise InputError(f"input file {path} cannot be read: {e.strerror}") from None
    with stream:
        if stream.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise InputError(f"input file {path} is UTF-16: convert it to UTF-8 (iconv -f utf-16 -t utf-8)")
        yield stream


def is_text(path: str) -> bool:
    """Whether the file holds one prompt a line; everything else, stdin included, is JSON lines."""
    return path != STDIN and Path(path).suffix.lower() == ".txt"


def read_lines(stream: IO[bytes]) -> Iterator[Line]:
    """Lines that hold something, numbered as an editor numbers them. Blank lines are passed over.

    Ends are LF or CRLF; a UTF-8 byte order mark at the very start is dropped.
    """
    number = 0
    while raw := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        hashed = hashlib.blake2b(raw, digest_size=16)
        size = len(raw)
        if size > MAX_LINE_BYTES and not raw.endswith(b"\n"):
            while not raw.endswith(b"\n") and (raw := stream.readline(SKIP_BYTES)):
                hashed.update(raw)
                size += len(raw)
            yield Line(number, b"", size, hashed.digest())
            continue
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        raw = raw.removesuffix(b"\n").removesuffix(b"\r")
        if raw.strip():
            yield Line(number, raw, len(raw), hashed.digest())
