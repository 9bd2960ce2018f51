"""Loading into a real server: bounded, repeatable, each bad row answered once."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

import orjson
import pytest

from headrace.connection import connect
from headrace.embedded import EmbeddedServer
from headrace.ledger import Ledger
from headrace.messages import Completion, Job
from headrace.store import Store
from producer.admitted import AdmittedRows, RowChanged
from producer.lines import InputError
from producer.load import Loader, parser_for

LEDGER = Ledger("lane")


class Lane:
    """A server, an input file, and what ended up where."""

    def __init__(self, folder: Path, store: Store) -> None:
        self.folder, self.store = folder, store
        self.input = folder / "in.jsonl"
        self.generation = 0

    def write(self, *rows: dict[str, object] | bytes) -> None:
        self.input.write_bytes(b"\n".join(r if isinstance(r, bytes) else orjson.dumps(r) for r in rows))

    def loader(self, bound: int = 10_000, written: Collection[str] = ()) -> Loader:
        self.generation += 1
        admitted = AdmittedRows(self.folder / "rows.sqlite", self.generation)
        parser = parser_for(str(self.input), "run", "lane", "run")
        return Loader(
            self.store, LEDGER, parser, admitted, lambda ids: [i for i in ids if i in written], bound
        )

    def load(self, **settings: object) -> Loader:
        loader = self.loader(**settings)  # type: ignore[arg-type]
        loader.run(str(self.input))
        loader.admitted.close()
        return loader

    def jobs(self) -> list[Job]:
        """Everything queued, taken off the lane."""
        out: list[Job] = []
        while leased := self.store.run(LEDGER.lease("engine", 200)):
            out += [Job.parse(one.raw) for one in leased]
        return out

    def completions(self) -> list[Completion]:
        self.store.run(LEDGER.ensure_sink("run", "test"))
        read = self.store.run(LEDGER.read_results("run", "test", "me", 1000, 1))
        return [Completion.parse(d.raw) for d in read]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(tmp_path_factory.mktemp("valkey"), appendfsync="everysec") as running:
        yield running


@pytest.fixture
def lane(tmp_path: Path, server: EmbeddedServer) -> Iterator[Lane]:
    store = Store(connect(server.url))
    store.connections.idempotent.flushall()
    yield Lane(tmp_path, store)
    store.close()


def test_rows_are_queued_once_however_often_the_file_is_loaded(lane: Lane) -> None:
    lane.write(*({"custom_id": f"q{i}", "prompt": f"p{i}"} for i in range(450)), b"{", {"prompt": ""})
    first = lane.load()
    again = lane.load()
    assert (first.loaded.rows, first.loaded.queued, first.loaded.rejected) == (452, 450, 2)
    assert (again.loaded.queued, again.loaded.known) == (0, 450)
    assert Counter(job.meta["custom_id"] for job in lane.jobs()) == {f"q{i}": 1 for i in range(450)}
    assert [c.error.code for c in lane.completions() if c.error] == ["invalid_json", "empty_prompt"]
    assert lane.store.run(LEDGER.progress("run")).total == 452


def test_a_custom_id_that_occurs_twice_gets_one_job_and_one_error(lane: Lane) -> None:
    filler = ({"prompt": str(i)} for i in range(300))  # so that the two stand in different batches
    lane.write({"custom_id": "a", "prompt": "x"}, {"custom_id": "a", "prompt": "x"}, *filler)
    with open(lane.input, "ab") as f:
        f.write(b'\n{"custom_id": "a", "prompt": "y"}\n')
    for _ in range(2):
        lane.load()
    assert [job.prompt for job in lane.jobs() if job.meta["custom_id"] == "a"] == ["x"]
    errors = lane.completions()
    assert [(c.error.code, c.meta["line"]) for c in errors if c.error] == [
        ("duplicate_custom_id", 2),
        ("duplicate_custom_id", 303),
    ]
    assert "occurs twice" in errors[0].error.message  # type: ignore[union-attr]


def test_rows_that_the_output_holds_are_not_sent(lane: Lane) -> None:
    lane.write(*({"custom_id": f"q{i}", "prompt": f"p{i}"} for i in range(10)), b"{")
    lane.load()
    ids = [job.id for job in lane.jobs()]
    bad = lane.completions()[0].id
    lane.store.connections.idempotent.flushall()
    loader = lane.load(written={*ids[:4], bad})
    assert (loader.loaded.queued, loader.loaded.rejected) == (6, 0)


def test_a_changed_row_stops_the_load_before_anything_of_its_batch_is_sent(lane: Lane) -> None:
    lane.write({"custom_id": "a", "prompt": "x"})
    lane.load()
    lane.write({"custom_id": "new", "prompt": "n"}, {"custom_id": "a", "prompt": "changed"})
    with pytest.raises(RowChanged, match="line 2: the row with custom_id 'a' changed"):
        lane.load()
    assert [job.prompt for job in lane.jobs()] == ["x"]


def test_a_full_lane_makes_the_loader_wait(lane: Lane) -> None:
    lane.write(*({"prompt": f"p{i}"} for i in range(500)))
    loader = lane.loader(bound=50)
    thread = threading.Thread(target=loader.run, args=(str(lane.input),))
    thread.start()
    seen: list[Job] = []
    deadline = time.monotonic() + 60
    while thread.is_alive():
        assert time.monotonic() < deadline, loader.loaded
        waiting = lane.store.run(LEDGER.jobs_waiting())
        assert waiting <= 50, waiting
        leased = lane.store.run(LEDGER.lease("engine", 30))
        ended = [(one, _done(Job.parse(one.raw))) for one in leased]
        lane.store.run(LEDGER.finish("engine", ended))
        seen += [Job.parse(one.raw) for one in leased]
        time.sleep(0.01)
    thread.join()
    seen += lane.jobs()
    assert Counter(job.prompt for job in seen) == {f"p{i}": 1 for i in range(500)}
    assert loader.loaded.complete


def test_a_stopped_load_leaves_the_rest_for_the_next(lane: Lane) -> None:
    lane.write(*({"prompt": f"p{i}"} for i in range(1000)))
    loader = lane.loader(bound=300)
    thread = threading.Thread(target=loader.run, args=(str(lane.input),))
    thread.start()
    while not loader.loaded.full:
        time.sleep(0.01)
    loader.stop.set()
    thread.join(10)
    assert not loader.loaded.complete
    assert loader.loaded.queued == 300
    assert lane.load().loaded.queued == 700
    assert len(lane.jobs()) == 1000


def test_an_input_that_is_not_there_is_named(lane: Lane) -> None:
    with pytest.raises(InputError, match="does not exist"):
        lane.load()


def _done(job: Job) -> Completion:
    return Completion(id=job.id, run=job.run, lane=job.lane, status="ok", reply_to=job.reply_to)
