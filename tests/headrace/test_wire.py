"""docs/wire.md is true: its commands do what it says, and it names every script, key and argument."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from headrace.keys import Keys
from headrace.messages import Completion, Job, Priority, SamplingParams
from tests.headrace.servers import Lane

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "wire.md").read_text()
SCRIPTS = sorted((ROOT / "headrace" / "scripts").glob("*.lua"))


@pytest.mark.skipif(
    not shutil.which("redis-cli"), reason="redis-cli comes with redis-server, which is missing"
)
def test_the_shell_session_of_the_page_runs(lane: Lane) -> None:
    session = PAGE[PAGE.index("## From a shell") : PAGE.index("## Keys and arguments")]
    blocks = re.findall(r"```\n(.*?)```", session, re.DOTALL)
    submit, lease, renew, finish, read, ack, look, destroy = blocks
    assert shell(lane, submit) == "new"
    assert shell(lane, submit) == "queued"
    leased = shell(lane, lease)
    entry = re.search(r"\d+-\d+", leased)
    assert entry, leased
    assert '"prompt":"1 + 1 ="' in leased
    assert shell(lane, renew.replace("ENTRY-ID", entry[0])) == ""
    assert shell(lane, finish.replace("ENTRY-ID", entry[0])) == "done"
    assert shell(lane, finish.replace("ENTRY-ID", entry[0])) == "duplicate"
    completion = re.search(r"(\d+-\d+)\nm\n(.*)", shell(lane, read))
    assert completion
    assert Completion.parse(completion[2].encode()).choices[0].text == " 2"
    assert shell(lane, ack.replace("ENTRY-ID", completion[1])) == "1"
    counters = shell(lane, look).splitlines()
    assert counters[-1] == "ok"
    assert dict(zip(counters[:-1:2], counters[1::2], strict=False))["completion_tokens"] == "1"
    assert shell(lane, destroy) == "1"


def shell(lane: Lane, commands: str) -> str:
    socket = lane.url.removeprefix("unix://")
    words = commands.replace("redis-cli ", f"redis-cli -s {socket} ")
    done = subprocess.run(
        ["bash", "-ec", words], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
    )
    return done.stdout.strip()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_every_script_is_described_as_its_file_does(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("#!lua"), "without it a full server stops the script half-way"
    header = []
    for line in lines[1:]:
        if not line.startswith("-- "):
            break
        header.append(line.removeprefix("-- "))
    text = "\n".join(header)
    for part in ("KEYS:", "ARGV:", "Returns"):
        assert part in text
    assert f"`{path.stem}.lua`\n\n```\n{text}\n```" in PAGE


def test_every_field_and_key_is_named() -> None:
    for model in (Job, SamplingParams, Completion):
        for field in model.model_fields:
            assert f"`{field}`" in PAGE, f"{model.__name__}.{field}"
    keys = Keys("L")
    named = [
        keys.marks("RUN"),
        keys.run("RUN"),
        keys.runs,
        keys.results("NAME"),
        keys.kept("JOB"),
        keys.attempts,
    ]
    for key in [*named, keys.engines, keys.jobs(Priority.INTERACTIVE)]:
        assert f"`{key}`" in PAGE, key
