"""`headrace doctor` on real servers: each thing that would lose jobs or let strangers in is refused, with the
fix; a server that is fit passes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from headrace import doctor
from headrace.cli.main import main
from headrace.doctor import Verdict, examine, fit
from headrace.requirements import PATCH_FLOOR, outdated, unsafe
from headrace.rights import Role
from tests.headrace.own_server import started
from tests.headrace.servers import Lane

PARTS = [Role.PRODUCER, Role.ENGINE, Role.SINK]


def refused(url: str, allow_volatile: bool = False, roles: list[Role] = PARTS) -> dict[str, str]:
    """Check -> what was found and the fix, of all that is refused."""
    findings = examine(url, "chat", roles, allow_volatile)
    bad = {f.check: f"{f.found} -> {f.fix}" for f in findings if f.verdict is Verdict.REFUSED}
    assert all("->" in text and not text.endswith("-> ") for text in bad.values()), "each names its fix"
    assert fit(findings) == (not bad)
    return bad


def test_a_server_that_is_fit_passes(lane: Lane) -> None:
    assert refused(lane.url, roles=list(Role)) == {}


def test_a_server_that_evicts_is_refused(lane: Lane) -> None:
    lane.redis.config_set("maxmemory", 1 << 30)
    lane.redis.config_set("maxmemory-policy", "allkeys-lru")
    try:
        assert "set maxmemory-policy noeviction" in refused(lane.url)["eviction"]
    finally:
        lane.redis.config_set("maxmemory", 0)
        lane.redis.config_set("maxmemory-policy", "noeviction")


def test_a_server_that_forgets_is_refused_unless_that_is_accepted(lane: Lane) -> None:
    lane.redis.config_set("appendonly", "no")
    try:
        assert "set appendonly yes" in refused(lane.url)["persistence"]
        assert "persistence" not in refused(lane.url, allow_volatile=True)
    finally:
        lane.redis.config_set("appendonly", "yes")


def test_an_append_only_file_that_is_never_synced_is_refused(lane: Lane) -> None:
    (before,) = lane.redis.config_get("appendfsync").values()
    lane.redis.config_set("appendfsync", "no")
    try:
        assert "set appendfsync everysec" in refused(lane.url)["fsync"]
    finally:
        lane.redis.config_set("appendfsync", before)


@pytest.mark.parametrize(
    ("info", "fix"),
    [
        ({"redis_version": "8.2.2"}, "upgrade to 8.2.9"),
        ({"redis_version": "7.2.4", "valkey_version": "9.0.1"}, "upgrade to 9.0.5"),
        ({"redis_version": "7.4.5"}, "upgrade to 7.4.6"),
    ],
)
def test_a_known_bad_patch_level_names_the_good_one(info: dict[str, str], fix: str) -> None:
    problem = outdated(info)
    assert problem is not None
    assert fix in problem.fix


def test_every_floor_itself_and_lines_not_yet_known_are_good() -> None:
    for (major, minor), patch in PATCH_FLOOR["Redis"].items():
        assert outdated({"redis_version": f"{major}.{minor}.{patch}"}) is None
    assert outdated({"redis_version": "8.12.0"}) is None
    assert unsafe({"redis_version": "7.0.15", "role": "master", "aof_enabled": 1}, False) == []


def test_an_open_default_user_on_a_network_address_is_refused(tmp_path: Path) -> None:
    with started("valkey-9", tmp_path / "a", "--protected-mode", "no", "--bind", "0.0.0.0") as port:
        local = f"redis://127.0.0.1:{port}"
        assert "listens on 0.0.0.0" in refused(local)["open user"]
        redis.Redis(port=port).config_set("protected-mode", "yes")
        assert refused(local) == {}
        redis.Redis(port=port).config_set("protected-mode", "no")
        redis.Redis(port=port).config_set("requirepass", "x")
        assert refused(f"redis://:x@127.0.0.1:{port}") == {}
    with started("valkey-9", tmp_path / "b") as port:
        assert refused(f"redis://127.0.0.1:{port}") == {}, "loopback only"


def test_an_open_server_that_answers_from_another_address_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A managed server does not show where it listens; that we came in by the network says enough."""
    with started("valkey-9", tmp_path) as port:
        monkeypatch.setattr(doctor, "_is_loopback", lambda host: False)
        assert "answers on a network address" in refused(f"redis://127.0.0.1:{port}")["open user"]


def test_a_clock_that_is_off_is_refused(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    here = doctor.time.time
    monkeypatch.setattr(doctor.time, "time", lambda: here() + 60)
    assert "NTP" in refused(lane.url)["clock"]
    monkeypatch.setattr(doctor.time, "time", lambda: here() + 1)
    assert refused(lane.url) == {}


def test_a_missing_right_is_named(tmp_path: Path) -> None:
    with started("valkey-9", tmp_path) as port:
        admin = redis.Redis(port=port)
        user = ["ACL", "SETUSER", "e", "on", ">pw", "~*", "+@all"]
        url = f"redis://e:pw@127.0.0.1:{port}"
        admin.execute_command(*user, "-xclaim", "-hdel")
        assert "lacks hdel, xclaim" in refused(url, roles=[Role.ENGINE])["rights: engine"]
        assert "rights: producer" not in refused(url, roles=[Role.PRODUCER])
        admin.execute_command(*user, "resetkeys", "~hr:{other}:*")
        assert "scripts on hr:{chat}:jobs:normal" in refused(url, roles=[Role.PRODUCER])["rights: producer"]
        admin.execute_command(*user, "~*", "-eval", "-evalsha")
        assert "lacks eval" in refused(url, roles=[Role.SINK])["rights: sink"]


def test_the_command_prints_a_table_and_ends_with_its_verdict(
    lane: Lane, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--redis", lane.url, "--lane", "chat"]) == 0
    assert "rights: engine" in capsys.readouterr().out
    lane.redis.config_set("appendonly", "no")
    try:
        assert main(["doctor", "--redis", lane.url]) == 1
        assert "set appendonly yes" in " ".join(capsys.readouterr().out.split())
        assert main(["doctor", "--redis", lane.url, "--allow-volatile"]) == 0
    finally:
        lane.redis.config_set("appendonly", "yes")
    assert main(["doctor", "--redis", "redis://:secret@127.0.0.1:1"]) == 1
    said = capsys.readouterr()
    assert "cannot reach Redis" in said.err
    assert "secret" not in said.err + said.out


def test_the_table_fits_a_narrow_pipe(lane: Lane) -> None:
    out = subprocess.run(
        [sys.executable, "-m", "headrace.cli.main", "doctor", "--redis", lane.url],
        capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"}, check=True,
    ).stdout  # fmt: skip
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out
