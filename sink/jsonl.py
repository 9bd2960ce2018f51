"""Completions as OpenAI batch output lines in a file, each job once.

Rule of this store: append, fsync, note the ids, acknowledge. At start the tail that was never
acknowledged is read back: whole lines count, the first broken one and all behind it are cut. The ids
live in an index beside the output, which is rebuilt from the file when it is missing or behind.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import orjson

from headrace.index import IdIndex
from headrace.messages import Completion, Status
from sink.base import Tally
from sink.files import AppendFile, SinkError
from sink.openai import batch_line

log = logging.getLogger("headrace.sink")

_PREFIX = "batch_req_"
#: Status of a failed row that is read back from the file; any other code is an error.
_STATUS = {"batch_expired": Status.EXPIRED, "batch_cancelled": Status.CANCELLED, "dead": Status.DEAD}
#: Reserved key of the index: lengths of the files and the tally, as JSON.
_STATE = b"\0" * 16
#: Lines read back in one transaction.
_BATCH = 2000


class JsonlTarget:
    """One output file, and a file for failed rows where one is named. Used from one thread.

    `index` is the path of the index of written job ids.
    """

    def __init__(self, output: Path, index: Path, error_file: Path | None = None) -> None:
        self.tally = Tally()
        self._index_path = index
        self._output = AppendFile(output)
        self._failed = AppendFile(error_file) if error_file else self._output
        self._files = [self._output] if error_file is None else [self._output, self._failed]
        self._staged: dict[bytes, Completion] = {}
        self._index: IdIndex | None = None

    def recover(self) -> None:
        self._index_path.parent.mkdir(parents=True, exist_ok=True)
        self._index = IdIndex(self._index_path)
        state = self._state()
        lengths = state.get("lengths", {})
        if any(f.size < lengths.get(f.path.name, 0) for f in self._files):
            log.warning("index_rebuilt index=%s cause=output_is_shorter", self._index_path)
            self._index.close()
            self._index_path.unlink()
            self._index = IdIndex(self._index_path)
            state, lengths = {}, {}
        self.tally = Tally(**state["tally"]) if "tally" in state else Tally()
        for f in self._files:
            self._read_back(f, lengths.get(f.path.name, 0), rebuilding=not state)

    def write(self, batch: list[Completion]) -> None:
        keys = {IdIndex.key(c.id): c for c in batch}
        known = self._require_index().get_many(keys)
        for key, completion in keys.items():
            if key in known or key in self._staged:
                continue
            self._staged[key] = completion
            f = self._output if completion.status is Status.OK else self._failed
            f.append(orjson.dumps(batch_line(completion), option=orjson.OPT_APPEND_NEWLINE))

    def commit(self) -> None:
        staged, self._staged = self._staged, {}
        before = [f.committed for f in self._files]
        try:
            for f in self._files:
                f.commit()
        except SinkError:
            for f, length in zip(self._files, before, strict=True):
                f.cut(length)  # none of the batch stays, also where one of two files took it
            raise
        for completion in staged.values():
            self.tally.add(completion)
        self._note(list(staged))

    def written(self, ids: Collection[str]) -> set[str]:
        """Those of some job ids that are in the output. May be called from any thread."""
        keys = {IdIndex.key(i): i for i in ids}
        return {keys[k] for k in self._require_index().get_many(keys)}

    def close(self) -> None:
        for f in self._files:
            f.close()
        if self._index is not None:
            self._index.close()

    def _read_back(self, f: AppendFile, offset: int, rebuilding: bool) -> None:
        """Bring index and tally up to the file's whole lines behind `offset`; cut what follows them."""
        keys: list[bytes] = []
        end = offset
        for behind, line in f.lines_from(offset):
            read = _parse(line)
            if read is None:
                if rebuilding:
                    raise SinkError(
                        f"{f.path} holds at byte {end} a line that headrace did not write: "
                        "move the file away or choose another output"
                    )
                break
            end = behind
            key = IdIndex.key(read[0])
            keys.append(key)
            self.tally.count(*read[1:])
            if len(keys) >= _BATCH:
                f.committed = end
                self._note(keys)
                keys = []
        if f.size > end:
            log.warning("torn_tail_cut file=%s bytes=%d", f.path, f.size - end)
        f.cut(end)
        self._note(keys)

    def _note(self, keys: list[bytes]) -> None:
        """Ids and state in one transaction; the files are durable by now, so that it may lag but not lead."""
        state = {
            "lengths": {f.path.name: f.committed for f in self._files},
            "tally": {name: getattr(self.tally, name) for name in Tally.__slots__},
        }
        try:
            self._require_index().add_many([*((k, b"") for k in keys), (_STATE, orjson.dumps(state))])
        except sqlite3.Error as e:
            raise SinkError(f"cannot write {self._index_path}: {e}; make room and run again") from None

    def _state(self) -> dict[str, Any]:
        raw = self._require_index().get(_STATE)
        return orjson.loads(raw) if raw else {}

    def _require_index(self) -> IdIndex:
        if self._index is None:
            raise RuntimeError("recover() comes before the first write")
        return self._index


def written_ids(path: Path) -> Iterator[str]:
    """Job ids of every whole line of an output, in order, each as often as it stands there. Raises SinkError
    for a file that cannot be read or that headrace did not write."""
    try:
        with open(path, "rb") as f:
            for number, line in enumerate(f, start=1):
                if not line.endswith(b"\n"):
                    return  # the sink is about to write it, or cuts it at its next start
                if (read := _parse(line[:-1])) is None:
                    raise SinkError(
                        f"line {number} of {path} is not an output line of headrace: give another file"
                    )
                yield read[0]
    except OSError as e:
        raise SinkError(f"output {path} cannot be read: {e.strerror}") from None


def _parse(line: bytes) -> tuple[str, Status, int, int, int] | None:
    """(job id, status, prompt, cached, completion tokens) of a line that headrace wrote, else None."""
    try:
        row = orjson.loads(line)
        job_id = row["id"]
        if not job_id.startswith(_PREFIX):
            return None
        job_id = job_id.removeprefix(_PREFIX)
        if row["response"] is None:
            return job_id, _STATUS.get(row["error"]["code"], Status.ERROR), 0, 0, 0
        usage = row["response"]["body"]["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return job_id, Status.OK, usage["prompt_tokens"], cached, usage["completion_tokens"]
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return None
