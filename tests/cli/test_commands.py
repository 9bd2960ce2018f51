"""The other commands: separate processes for submitting, sinking and serving, and what is refused at once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from headrace.cli.demo import table
from headrace.cli.main import main
from headrace.embedded import EmbeddedServer
from headrace.ledger import Ledger
from headrace.messages import Completion
from producer.lines import open_input, read_lines
from producer.load import parser_for
from tests.cli.trees import ECHO_ENGINE, ENV, ROOT, Job, ended, wait_for


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(tmp_path / "valkey") as running:
        yield running


def start(*words: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "headrace.cli.main", *map(str, words)]
    return subprocess.Popen(command, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def echo_engine(url: str, lane: str) -> subprocess.Popen[str]:
    command = [sys.executable, ECHO_ENGINE, "--redis", url, "--lane", lane]
    return subprocess.Popen(command, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """The one line of a command that fails; run in this process."""
    code = main([str(w) for w in words])
    err = capsys.readouterr().err
    assert code == 1
    assert err.startswith("headrace: error: ")
    assert err.count("\n") == 1
    return err


def test_separate_processes_answer_every_row_once(job: Job, server: EmbeddedServer) -> None:
    rows = [{"custom_id": f"q-{i}", "prompt": "FAIL" if i == 7 else f"p {i}"} for i in range(400)]
    job.write(*rows, b"{")
    queue = ["--redis", server.url, "--lane", "chat"]
    engine = echo_engine(server.url, "chat")
    sink = start("sink", "jsonl", job.output, *queue, "--follow")
    submitted = ended(start("submit", job.input, *queue, "--wait"))
    assert submitted.code == 2, submitted.err
    assert "401 rows, 400 queued" in submitted.err
    assert "ok                         399" in submitted.out
    wait_for(lambda: len(job.ids()) == 401)
    again = ended(start("submit", job.input, *queue))
    assert (again.code, "0 queued" in again.err) == (0, True), again.err
    for process in (sink, engine):
        process.send_signal(signal.SIGTERM)
        result = ended(process)
        assert result.code == 0, result.err
    assert Counter(job.ids()) == Counter([f"q-{i}" for i in range(400)] + ["row-401"])


def test_a_killed_sink_goes_on_where_it_was(job: Job, server: EmbeddedServer) -> None:
    job.write_many(3000)
    queue = ["--redis", server.url, "--lane", "l"]
    engine = echo_engine(server.url, "l")
    assert ended(start("submit", job.input, *queue, "--wait")).code == 0
    for _ in range(3):
        before = len(job.ids())
        sink = start("sink", "jsonl", job.output, *queue)
        wait_for(lambda before=before: len(job.ids()) > before or len(job.ids()) == 3000)
        sink.kill()
        ended(sink)
    assert ended(start("sink", "jsonl", job.output, *queue, "--until-idle", "1")).code == 0
    engine.kill()
    ended(engine)
    assert Counter(job.ids()) == Counter(f"q-{i}" for i in range(3000))


def test_two_sinks_with_names_of_their_own_both_get_everything(job: Job, server: EmbeddedServer) -> None:
    job.write_many(50)
    queue = ["--redis", server.url, "--lane", "l"]
    first, second = job.folder / "a.jsonl", job.folder / "b.jsonl"
    sinks = [start("sink", "jsonl", path, *queue) for path in (first, second)]
    client = redis.Redis.from_url(server.url)
    results = Ledger("l").keys.results(None)
    # both groups must stand before the first entry may be trimmed
    wait_for(lambda: client.exists(results) and len(client.xinfo_groups(results)) == 2)
    engine = echo_engine(server.url, "l")
    assert ended(start("submit", job.input, *queue, "--wait")).code == 0
    wait_for(lambda: all(path.exists() and path.read_bytes().count(b"\n") >= 50 for path in (first, second)))
    for sink in sinks:
        sink.terminate()
        result = ended(sink)
        assert result.code == 0, result.err
    engine.kill()
    ended(engine)
    assert len(job.rows(first)) == len(job.rows(second)) == 50


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from headrace.cli.main import build_parser; build_parser()\n"
        "heavy = ('torch', 'ray', 'transformers', 'redis', 'pydantic', 'rich')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "command", [[], ["run"], ["engine"], ["submit"], ["sink"], ["demo"], ["doctor"], ["audit"]]
)
def test_help_teaches_by_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        main([*command, "--help"])
    assert e.value.code == 0
    out = capsys.readouterr().out
    assert "example" in out
    assert f"headrace {' '.join(command)}".strip() in out


def test_a_wrong_flag_is_exit_1_in_headraces_form(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        main(["run", "in.jsonl", "--colour", "red"])
    assert e.value.code == 1
    assert capsys.readouterr().err.startswith("headrace: error: ")


def tiny_model(folder: Path, heads: int = 4) -> Path:
    model = folder / "model"
    model.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": heads,
        "num_key_value_heads": heads, "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(config))
    return model


def test_a_run_that_cannot_be_done_is_refused_before_anything_starts(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    job.write({"prompt": "a"})
    model = tiny_model(job.folder, heads=40)
    run = ["run", job.input, "-o", job.output, "--model", model]
    assert "does not exist" in refused(
        capsys, "run", job.folder / "no.jsonl", "-o", job.output, "--model", model
    )
    assert "missing" in refused(capsys, *run[:-1], job.folder / "missing")
    assert "mkdir -p" in refused(capsys, "run", job.input, "-o", job.folder / "no" / "o", "--model", model)
    assert "is a folder" in refused(capsys, "run", job.input, "-o", job.folder, "--model", model)
    heads = refused(capsys, *run, "--tensor-parallel-size", "3")
    assert heads == (
        "headrace: error: Total number of attention heads (40) must be divisible by "
        "tensor parallel size (3).\n"
    )
    assert "--dtype float7" in refused(capsys, *run, "--dtype", "float7")
    assert "--max-model-len 999" in refused(capsys, *run, "--max-model-len", "999")
    assert "cannot reach Redis" in refused(capsys, *run, "--redis", "redis://127.0.0.1:1")
    assert not job.output.exists()


@pytest.mark.parametrize("command", ["submit", "sink", "engine"])
def test_long_lived_commands_name_a_server_that_cannot_be_reached(
    command: str, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    job.write({"prompt": "a"})
    words: dict[str, list[str | Path]] = {
        "submit": ["submit", job.input],
        "sink": ["sink", "jsonl", job.output],
        "engine": ["engine", "--model", tiny_model(job.folder)],
    }
    assert "cannot reach Redis" in refused(capsys, *words[command], "--redis", "redis://127.0.0.1:1")


def test_the_demo_table_counts_exact_answers_by_task() -> None:
    def line(custom_id: str, said: str | None) -> str:
        body = {"choices": [{"message": {"content": said}}]}
        return json.dumps({"custom_id": custom_id, "response": None if said is None else {"body": body}})

    answers = [("a", "sum", "4"), ("b", "sum", "5"), ("c", "copy", "x"), ("d", "copy", "y")]
    wanted = "\n".join(json.dumps({"custom_id": i, "task": t, "answer": a}) for i, t, a in answers)
    output = "\n".join([line("a", " 4"), line("b", "6"), line("c", "x"), line("d", None)])
    assert table(output, wanted).splitlines() == [
        "copy                  1 of    2    50.0%",
        "sum                   1 of    2    50.0%",
        "answered exactly      2 of    4    50.0%",
    ]


@pytest.mark.parametrize("name", ["batch.jsonl", "rows.jsonl", "prompts.txt", "questions.jsonl"])
def test_the_shipped_inputs_hold_no_bad_row(name: str) -> None:
    path = str(ROOT / "examples" / name)
    parser = parser_for(path, "run", "lane", None)
    with open_input(path) as stream:
        rows = [parser.parse(line) for line in read_lines(stream)]
    assert len(rows) >= 3
    assert len({row.key for row in rows}) == len(rows)
    assert [row.item.error for row in rows if isinstance(row.item, Completion)] == []
