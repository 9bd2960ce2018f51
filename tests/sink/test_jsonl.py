"""The JSONL sink's promise: every committed row is in the file once, whatever it was interrupted by."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from headrace.messages import Choice, Completion, ErrorInfo, Kind, Status, Usage
from sink.files import SinkError
from sink.jsonl import JsonlTarget


def completion(i: int, status: Status = Status.OK) -> Completion:
    fields: dict[str, Any] = {"id": f"{i:032x}", "run": "r", "lane": "l", "kind": Kind.COMPLETION}
    fields |= {"status": status, "meta": {"custom_id": f"row-{i}"}, "model": "m"}
    if status is Status.OK:
        usage = Usage(prompt_tokens=5, cached_tokens=2, completion_tokens=3)
        fields |= {"choices": [Choice(text="x", finish_reason="stop")], "usage": usage}
    else:
        fields |= {"error": ErrorInfo(code="bad", message="why")}
    return Completion(**fields)


class Output:
    """One output in a folder, opened as often as a test likes."""

    def __init__(self, folder: Path, errors: bool = False) -> None:
        self.path = folder / "out.jsonl"
        self.errors = folder / "err.jsonl" if errors else None
        self.index = folder / "index" / "written.sqlite"

    def open(self) -> JsonlTarget:
        target = JsonlTarget(self.path, self.index, self.errors)
        target.recover()
        return target

    def add(self, *numbers: int, status: Status = Status.OK) -> None:
        target = self.open()
        target.write([completion(i, status) for i in numbers])
        target.commit()
        target.close()

    def ids(self, path: Path | None = None) -> list[str]:
        return [orjson.loads(line)["custom_id"] for line in (path or self.path).read_bytes().splitlines()]


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return Output(tmp_path)


def test_a_row_is_written_once_however_often_it_comes(output: Output) -> None:
    target = output.open()
    target.write([completion(1), completion(1), completion(2)])
    target.write([completion(2)])
    target.commit()
    target.write([completion(1)])
    target.commit()
    target.close()
    output.add(1, 2, 3)
    assert output.ids() == ["row-1", "row-2", "row-3"]


def test_nothing_is_in_the_file_before_commit(output: Output) -> None:
    target = output.open()
    target.write([completion(1)])
    assert output.path.read_bytes() == b""
    target.close()


def test_the_tally_counts_all_passes(output: Output) -> None:
    output.add(1, 2)
    output.add(3, status=Status.ERROR)
    output.add(4, status=Status.EXPIRED)
    target = output.open()
    assert target.tally.rows == {"ok": 2, "error": 1, "expired": 1}
    assert (target.tally.total, target.tally.failed) == (4, 2)
    assert (target.tally.prompt_tokens, target.tally.cached_tokens) == (10, 4)


def test_failed_rows_go_to_the_error_file_where_there_is_one(tmp_path: Path) -> None:
    output = Output(tmp_path, errors=True)
    output.add(1)
    output.add(2, status=Status.ERROR)
    output.add(1, 2, 3)
    assert output.errors is not None
    assert (output.ids(), output.ids(output.errors)) == (["row-1", "row-3"], ["row-2"])


@pytest.mark.parametrize("torn", [b"x", b'{"id": "batch_req_7', b"\0" * 300, b"\0\n" + b"\xff" * 10 + b"\n"])
def test_a_torn_tail_is_cut_at_start_and_its_rows_come_again(output: Output, torn: bytes) -> None:
    output.add(1, 2)
    with open(output.path, "ab") as f:
        f.write(torn)
    output.add(2, 3)
    assert output.ids() == ["row-1", "row-2", "row-3"]


def test_rows_that_reached_the_file_but_not_the_index_are_not_doubled(output: Output) -> None:
    output.add(1)
    behind = output.index.read_bytes()
    output.add(2, 3)
    output.index.write_bytes(behind)
    output.add(2, 3, 4)
    assert output.ids() == ["row-1", "row-2", "row-3", "row-4"]


def test_a_missing_index_is_rebuilt_from_the_file(tmp_path: Path) -> None:
    output = Output(tmp_path, errors=True)
    output.add(*range(5000))
    output.add(6000, status=Status.CANCELLED)
    output.index.unlink()
    with open(output.path, "ab") as f:
        f.write(b'{"id": "batch_req_')
    target = output.open()
    assert target.tally.rows == {"ok": 5000, "cancelled": 1}
    assert target.tally.completion_tokens == 15000
    target.write([completion(i) for i in range(5000)] + [completion(6000, Status.CANCELLED)])
    target.commit()
    target.close()
    assert len(output.ids()) == 5000


def test_an_output_that_was_replaced_by_a_shorter_file_is_read_anew(output: Output) -> None:
    output.add(1, 2, 3)
    output.path.write_bytes(b"".join(output.path.read_bytes().splitlines(keepends=True)[:1]))
    output.add(1, 2)
    assert output.ids() == ["row-1", "row-2"]


def test_a_file_of_somebody_else_is_left_alone(output: Output) -> None:
    output.path.write_bytes(b'{"name": "mine"}\n')
    with pytest.raises(SinkError, match="did not write"):
        output.open()
    assert output.path.read_bytes() == b'{"name": "mine"}\n'


def test_two_sinks_cannot_share_an_output(output: Output) -> None:
    first = output.open()
    with pytest.raises(SinkError, match="another process"):
        output.open()
    first.close()
    output.open().close()


_FULL_DISK = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.sink.test_jsonl import Output, completion
from sink.files import SinkError
output = Output(Path(sys.argv[1]))
target = output.open()
target.write([completion(i) for i in range(10)]); target.commit()
before = output.path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (before + 1000, before + 1000))
target.write([completion(i) for i in range(10, 100)])
try:
    target.commit()
except SinkError as e:
    print(e)
assert output.path.stat().st_size == before
assert target.tally.total == 10, target.tally
"""


def test_a_full_disk_leaves_the_last_commit_and_says_what_to_do(output: Output) -> None:
    root = str(Path(__file__).parents[2])
    run = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(output.path.parent), root],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "nothing of it was acknowledged" in run.stdout
    output.add(*range(100))
    assert output.ids() == [f"row-{i}" for i in range(100)]


def test_memory_does_not_grow_with_the_output(output: Output) -> None:
    output.add(*range(2000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    target = output.open()
    for start in range(2000, 32_000, 200):
        target.write([completion(i) for i in range(start, start + 200)])
        target.commit()
    target.close()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 10_000, f"{grown} KiB"
    assert target.tally.total == 32_000
