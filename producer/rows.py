"""One line of an input file -> one job, or the completion that says why it is none.

Every line ends as exactly one of the two, so a bad row is answered like any other and hurts no
neighbour. Three forms are understood: OpenAI batch lines, bare JSON rows and, in .txt files, plain
prompts. This file knows no Redis; the loader asks it for each line.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import Any

import orjson

from headrace.errors import InvalidJob
from headrace.messages import Completion, ErrorInfo, Job, Kind, Priority, Status, job_id
from producer.lines import MAX_LINE_BYTES, Line
from producer.openai import URLS, from_body, from_flat

#: Longest custom_id; OpenAI's own files stay far below.
MAX_CUSTOM_ID = 512
_BATCH_KEYS = frozenset(("custom_id", "method", "url", "body"))


@dataclass(frozen=True, slots=True)
class Row:
    """A line's outcome. `key` names the row inside its input: 16 bytes of its custom_id."""

    line: int
    custom_id: str
    key: bytes
    item: Job | Completion

    @property
    def id(self) -> str:
        return self.item.id


@dataclass(frozen=True, slots=True)
class RowParser:
    """What all rows of one load share."""

    run: str
    lane: str
    reply_to: str | None = None
    priority: Priority = Priority.NORMAL
    text: bool = False  # one prompt a line instead of JSON

    def parse(self, line: Line) -> Row:
        """Never raises for what a line holds."""
        custom_id = f"row-{line.number}"
        row: dict[str, Any] | None = None
        meta: dict[str, Any] = {"custom_id": custom_id, "line": line.number}
        try:
            row = self._decode(line)
            custom_id = meta["custom_id"] = _custom_id(row, custom_id)
            fields = _fields(row, meta)
            identity = job_id(self.run, custom_id, fields)
            job = Job.build(self._envelope(identity, fields, meta))
            job.to_bytes()  # the size limit, while the row can still be answered
        except InvalidJob as e:
            return self._reject(line, meta, e.code, str(e), named=row is not None)
        return Row(line.number, custom_id, row_key(custom_id), job)

    def duplicate(self, row: Row, line: Line) -> Row:
        """The answer to a row whose custom_id stood before it in the same input."""
        message = f"custom_id {row.custom_id[:80]!r} occurs twice in this input: make it unique"
        return self._reject(line, row.item.meta, "duplicate_custom_id", message, named=False)

    def _decode(self, line: Line) -> dict[str, Any]:
        if line.too_long:
            raise InvalidJob(
                f"line of {line.size} bytes exceeds the limit of {MAX_LINE_BYTES}: shorten the row",
                "line_too_long",
            )
        if self.text:
            return {"prompt": _utf8(line.data)}
        try:
            row = orjson.loads(line.data)
        except orjson.JSONDecodeError as e:
            _utf8(line.data)  # names the byte where the encoding is what is wrong
            raise InvalidJob(f"malformed JSON: {e}", "invalid_json") from None
        if not isinstance(row, dict):
            raise InvalidJob("the line is JSON, but not an object", "invalid_json")
        return row

    def _envelope(self, identity: str, fields: dict[str, Any], meta: dict[str, Any]) -> dict[str, Any]:
        return fields | {
            "id": identity,
            "run": self.run,
            "lane": self.lane,
            "priority": self.priority.value,
            "reply_to": self.reply_to,
            "meta": meta,
            "enqueued": time.time(),
        }

    def _reject(self, line: Line, meta: dict[str, Any], code: str, message: str, named: bool) -> Row:
        """`named`: the row has a custom_id of its own and keeps it as identity when lines move."""
        place = meta["custom_id"] if named else f"line {line.number}"
        identity = job_id(self.run, place, ["rejected", line.digest.hex()])
        completion = Completion(
            id=identity,
            run=self.run,
            lane=self.lane,
            kind=Kind.CHAT if URLS.get(meta.get("endpoint", "")) is Kind.CHAT else None,
            status=Status.ERROR,
            error=ErrorInfo(code=code, message=f"line {line.number}: {message}"),
            attempts=0,
            reply_to=self.reply_to,
            meta=meta,
        )
        key = row_key(meta["custom_id"]) if named else bytes.fromhex(identity)
        return Row(line.number, meta["custom_id"], key, completion)


def row_key(custom_id: str) -> bytes:
    """16 bytes that stand for a custom_id in an index."""
    return hashlib.blake2b(custom_id.encode(), digest_size=16).digest()


def _custom_id(row: dict[str, Any], default: str) -> str:
    value = row.get("custom_id")
    if value is None:
        return default
    if not isinstance(value, str) or not value:
        raise InvalidJob("custom_id is not a string with something in it")
    if len(value) > MAX_CUSTOM_ID:
        raise InvalidJob(f"custom_id of {len(value)} characters exceeds the limit of {MAX_CUSTOM_ID}")
    return value


def _fields(row: dict[str, Any], meta: dict[str, Any]) -> dict[str, Any]:
    """Job fields of a decoded row; `meta` learns the endpoint of a batch line."""
    if not any(name in row for name in ("url", "method", "body")):
        return from_flat({name: value for name, value in row.items() if name != "custom_id"})
    if extra := row.keys() - _BATCH_KEYS:
        raise InvalidJob(f"unknown field {sorted(extra)[0][:80]!r} beside body", "unknown_field")
    if missing := [name for name in ("custom_id", "method", "url", "body") if row.get(name) is None]:
        raise InvalidJob(f"a batch line needs {', '.join(missing)}")
    if row["method"] != "POST":
        raise InvalidJob(f"method {str(row['method'])[:32]!r} is not POST")
    if not isinstance(row["url"], str):
        raise InvalidJob("url is not a string")
    meta["endpoint"] = row["url"][:128]
    return from_body(row["url"], row["body"])


def _utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise InvalidJob(
            f"not UTF-8: byte 0x{data[e.start]:02x} at position {e.start}", "invalid_utf8"
        ) from None
