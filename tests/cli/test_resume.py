"""`headrace run` through kills, crashes, full disks and lost state: no row lost, none twice."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from headrace.cli.main import main
from headrace.embedded import EmbeddedServer
from tests.cli.trees import Job, children, ended, kill_tree, wait_for


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


@pytest.mark.slow
def test_a_tree_killed_at_random_moments_ends_with_every_row_once(job: Job) -> None:
    n, seed = 5000, random.randrange(1 << 30)
    rng = random.Random(seed)
    job.write_many(n)
    for goal in sorted(rng.randrange(n) for _ in range(5)):
        process = job.start(engine="--per-second 3000")
        wait_for(lambda goal=goal, process=process: len(job.ids()) >= goal or process.poll() is not None)
        kill_tree(process)
    result = job.run()
    assert result.code == 0, (seed, result.err)
    counts = Counter(row["custom_id"] for row in job.rows())
    assert len(counts) == n, f"seed {seed}: {n - len(counts)} rows lost"
    assert max(counts.values()) == 1, f"seed {seed}: doubled {[i for i, c in counts.items() if c > 1][:5]}"


def test_a_run_killed_before_its_first_row_starts_like_new(job: Job) -> None:
    job.write_many(50)
    process = job.start(engine="--per-second 1")
    wait_for(job.state.exists)
    kill_tree(process)
    assert job.run().code == 0
    assert len(job.ids()) == 50


@pytest.mark.parametrize("kind", ["embedded", "outside"])
def test_when_the_command_is_killed_its_children_die_too(job: Job, tmp_path: Path, kind: str) -> None:
    job.write_many(2000)
    with EmbeddedServer(tmp_path / "elsewhere") as server:
        # an engine whose server is still there has no other reason to end
        process = job.start(
            *([f"redis={server.url}"] if kind == "outside" else []), engine="--per-second 500"
        )
        wait_for(job.ids)
        left = children(process)
        assert len(left) == (2 if kind == "embedded" else 1), left
        process.kill()
        process.communicate()
        assert not psutil.wait_procs(left, timeout=10)[1]


def test_ctrl_c_says_how_to_continue_and_leaves_no_process(job: Job) -> None:
    job.write_many(2000)
    process = job.start(engine="--per-second 500")
    wait_for(job.ids)
    left = children(process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to the whole foreground group
    result = ended(process)
    assert result.code == 130
    assert "started again" not in result.err
    assert "the same command continues" in result.err
    assert "Traceback" not in result.err
    assert not psutil.wait_procs(left, timeout=5)[1]
    assert job.run().code == 0
    assert Counter(job.ids()) == Counter(f"q-{i}" for i in range(2000))


def test_an_engine_that_dies_is_started_again(job: Job) -> None:
    job.write_many(1000)
    result = job.run(engine="--crash-after 400")
    assert result.code == 0, result.err
    assert "killed by SIGKILL: started again" in result.err
    assert Counter(job.ids()) == Counter(f"q-{i}" for i in range(1000))


def test_an_engine_that_dies_without_finishing_rows_is_given_up(job: Job) -> None:
    job.write({"prompt": "CRASH"})
    result = job.run()
    assert result.code == 1
    assert "3 restarts finished no row" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("lost", ["server", "written.sqlite", "rows.sqlite"])
def test_state_that_was_lost_costs_work_but_no_row(job: Job, lost: str) -> None:
    job.write_many(1500)
    process = job.start(engine="--per-second 2000")
    wait_for(lambda: len(job.ids()) > 100)
    kill_tree(process)
    path = job.state / lost
    for companion in job.state.glob(f"{lost}*"):
        shutil.rmtree(companion) if companion.is_dir() else companion.unlink()
    assert not path.exists()
    result = job.run()
    assert result.code == 0, result.err
    assert Counter(job.ids()) == Counter(f"q-{i}" for i in range(1500))


def test_an_output_that_was_deleted_is_made_again(job: Job) -> None:
    job.write_many(20)
    assert job.run().code == 0
    job.output.unlink()
    assert job.run().code == 0
    assert len(job.ids()) == 20


def test_rows_whose_answers_were_thrown_away_are_named_instead_of_awaited(job: Job, tmp_path: Path) -> None:
    job.write_many(20)
    with EmbeddedServer(tmp_path / "elsewhere") as server:  # it remembers that they ended, for others
        assert job.run(f"redis={server.url}").code == 0
        first = job.output.read_bytes().splitlines(keepends=True)[0]
        job.output.write_bytes(first)
        result = job.run(f"redis={server.url}")
    assert result.code == 1
    assert "19 rows ended in an earlier run" in result.err
    assert "--fresh" in result.err


def test_a_full_disk_ends_the_run_clearly_and_room_lets_it_continue(job: Job) -> None:
    job.write_many(2000)
    process = job.start(engine="--per-second 1000")
    wait_for(lambda: len(job.ids()) > 100)
    limit = job.output.stat().st_size + 3000
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))  # of this process alone
    result = ended(process)
    assert result.code == 1
    assert "nothing of it was acknowledged: make room and run the same command again" in result.err
    assert "Traceback" not in result.err
    assert job.output.read_bytes().endswith(b"}\n")
    assert job.run().code == 0
    assert Counter(job.ids()) == Counter(f"q-{i}" for i in range(2000))


def test_a_finished_run_is_proven_by_its_audit(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.write(*({"custom_id": f"q-{i}", "prompt": "FAIL" if i == 3 else "p"} for i in range(50)), b"{")
    errors = job.folder / "errors.jsonl"
    assert job.run(f"error_file={errors}").code == 2
    run = json.loads((job.state / "manifest.json").read_text())["run"]
    words = ["audit", run, "--output", str(job.output), "--error-file", str(errors)]
    assert main(words) == 0
    assert "submitted 51 = 49 ok + 2 error" in capsys.readouterr().out
    lines = job.output.read_bytes().splitlines(keepends=True)
    job.output.write_bytes(b"".join(lines[1:]))
    assert main(words) == 1
    assert "lost 1, doubled 0" in capsys.readouterr().out
    assert main(["audit", "another", "--output", str(job.output)]) == 1


def test_a_run_outlives_the_death_of_its_embedded_server(job: Job) -> None:
    job.write_many(400)
    process = job.start(engine="--per-second 150")
    for goal in (30, 150):
        wait_for(lambda goal=goal: len(job.ids()) >= goal)
        (server,) = [p for p in children(process) if "valkey" in p.name()]
        os.kill(server.pid, signal.SIGKILL)
    result = ended(process)
    assert result.code == 0, result.err
    assert result.err.count("the embedded server was killed by SIGKILL: started again") == 2
    assert "Traceback" not in result.err
    assert Counter(job.ids()) == Counter(f"q-{i}" for i in range(400))


def test_a_server_that_keeps_dying_is_one_line(job: Job) -> None:
    job.write_many(50)
    process = job.start(engine="--per-second 1")
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        for p in children(process) if process.poll() is None else []:
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if "valkey" in p.name():
                    os.kill(p.pid, signal.SIGKILL)
        time.sleep(0.05)
    result = ended(process)
    assert result.code == 1
    assert "Traceback" not in result.err
    assert result.err.splitlines()[-1].startswith("headrace: error: ")
    assert "the same command continues" in result.err or "embedded server" in result.err
