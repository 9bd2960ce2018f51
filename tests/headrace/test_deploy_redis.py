"""deploy/redis on real servers: each user can do its part and nothing else, and TLS clients get through."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

import pytest
import redis
from redis.exceptions import NoPermissionError

from headrace.connection import connect
from headrace.doctor import examine, fit
from headrace.errors import StoreError
from headrace.ledger import Ledger
from headrace.messages import Completion, Status
from headrace.rights import SCRIPTS, Role, refused, rights
from headrace.store import Store
from headrace.sync import SyncClient
from tests.headrace.own_server import DEPLOY, USERS, started, user_file
from tests.headrace.servers import LANE, answer, job

#: What no part but the admin may do, and what nobody may.
FORBIDDEN = [
    "FLUSHALL", "FLUSHDB", "CONFIG SET maxmemory 1", "CONFIG GET dir", "KEYS *", "SHUTDOWN",
    "ACL LIST", "ACL SETUSER x", "SCRIPT FLUSH", "REPLICAOF NO ONE", "MODULE LIST", "CLIENT KILL TYPE normal",
    "CLIENT PAUSE 1", "MONITOR", "SCAN 0", "GET other", "SET other 1", "XADD other * a b", "SAVE",
    "BGREWRITEAOF",
]  # fmt: skip
NOBODY = [
    "FLUSHALL",
    "CONFIG SET maxmemory 1",
    "SHUTDOWN",
    "ACL SETUSER x",
    "SET other 1",
    "KEYS *",
]


@pytest.fixture(scope="module", params=["valkey-9", "redis-7.0"])
def port(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("acl")
    users = user_file(folder / "users.acl")
    with started(request.param, folder / "data", "--aclfile", str(users)) as running:
        yield running


def url(port: int, user: str) -> str:
    return f"redis://{user}:pw-{user}@127.0.0.1:{port}/0"


def client(port: int, user: str) -> redis.Redis:
    return redis.Redis.from_url(url(port, user), protocol=2)


def test_every_part_runs_with_its_own_user(port: int) -> None:
    ledger = Ledger(LANE)
    producer, engine, sink = (Store(connect(url(port, u))) for u in ("producer", "engine", "sink"))
    sink.run(ledger.ensure_sink("night", "s"))
    jobs = [job(f"j{i}", reply_to="night") for i in range(5)]
    assert producer.run(ledger.submit(jobs, 10)) == ["new"] * 5
    assert producer.run(ledger.reject([answer_of("bad")])) == ["done"]
    leased = engine.run(ledger.lease("e", 3))
    assert engine.run(ledger.wait_for_jobs("e", 0, 1)) == []
    assert engine.run(ledger.renew("e", leased)) == []
    engine.run(ledger.heartbeat("e", {"state": "ready"}))
    assert engine.run(ledger.finish("e", [(leased[0], answer(leased[0]))])) == ["done"]
    assert engine.run(ledger.release("e", leased[1:2])) == 1
    assert len(engine.run(ledger.held_by("e"))) == 1
    assert engine.run(ledger.release_dead("e")) == 1
    engine.run(ledger.leave("e"))
    delivered = sink.run(ledger.read_results("night", "s", "sink", 10, 1))
    assert len(delivered) == 2
    assert len(sink.run(ledger.unacknowledged("night", "s", "sink"))) == 2
    assert sink.run(ledger.ack_results("night", "s", [d.entry_id for d in delivered])) == 2
    assert producer.run(ledger.progress("r")).submitted == 6
    for store in (producer, engine, sink):
        store.close()


def answer_of(job_id: str) -> Completion:
    return Completion(id=job_id, run="r", lane=LANE, status=Status.ERROR, reply_to="night")


def test_an_application_awaits_its_answer_as_producer(port: int) -> None:
    with SyncClient(url(port, "producer"), "asks") as asking, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(asking.generate, "1 + 1 =")
        engine, ledger = Store(connect(url(port, "engine"))), Ledger("asks")
        while not (leased := engine.run(ledger.wait_for_jobs("e", 1, 200))):
            assert not waiting.done(), waiting.result()
        engine.run(ledger.finish("e", [(leased[0], answer(leased[0]))]))
        assert waiting.result(20).usage.completion_tokens == 2
        engine.close()


@pytest.mark.parametrize("user", USERS)
def test_a_user_can_do_what_its_part_needs(port: int, user: str) -> None:
    assert [r.name for r in refused(client(port, user), rights(Role(user), LANE))] == []


@pytest.mark.parametrize("user", ["producer", "engine", "sink"])
def test_a_user_can_do_nothing_else(port: int, user: str) -> None:
    asking = client(port, user)
    for command in FORBIDDEN:
        with pytest.raises(NoPermissionError):
            asking.execute_command(*command.split())
    others = [r for role in ("producer", "engine", "sink") if role != user for r in rights(Role(role), LANE)]
    denied = {r.name for r in refused(asking, others)}
    alien = {
        "producer": {"xreadgroup", "xack", "xclaim", "xtrim", "xgroup delconsumer", "xrange"},
        "engine": {"xtrim", "xgroup setid", "xrevrange"},
        "sink": {"xadd", "xclaim", "hset", "xdel", "set"},
    }
    assert alien[user] <= denied


def test_the_admin_may_look_and_mend_but_not_wipe(port: int) -> None:
    asking = client(port, "admin")
    for command in NOBODY:
        with pytest.raises(NoPermissionError):
            asking.execute_command(*command.split())
    assert asking.config_get("appendonly")


def test_the_default_user_is_shut_out(port: int) -> None:
    with pytest.raises(redis.AuthenticationError):
        redis.Redis(port=port).ping()
    with pytest.raises(StoreError, match="refuses this user"):
        connect(f"redis://127.0.0.1:{port}/0")


def test_the_user_file_is_refused_as_it_is_shipped(tmp_path: Path) -> None:
    """Nobody runs with a password that stands in a repository."""
    with (
        pytest.raises(AssertionError, match="ACL"),
        started("valkey-9", tmp_path / "d", "--aclfile", str(DEPLOY / "users.acl")),
    ):
        pass


def test_every_script_is_some_roles() -> None:
    """A new script goes into headrace/rights.py, and its commands into deploy/redis/users.acl."""
    files = {p.name.removesuffix(".lua") for p in resources.files("headrace").joinpath("scripts").iterdir()}
    assert files == {name for names in SCRIPTS.values() for name in names}


def test_the_shipped_settings_with_tls_make_a_server_that_the_doctor_passes(tmp_path: Path) -> None:
    certs = tmp_path / "tls"
    made = subprocess.run(
        [DEPLOY / "make-certs.sh", certs, "localhost", "127.0.0.1"], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    assert os.stat(certs / "server.key").st_mode & 0o077 == 0
    data = tmp_path / "data"
    data.mkdir()
    users = user_file(tmp_path / "users.acl")
    main = (DEPLOY / "redis.conf").read_text().replace("# include /etc/redis/tls.conf", "include tls.conf")
    tls = (DEPLOY / "tls.conf").read_text().replace("/etc/redis/tls", str(certs))
    conf = tmp_path / "redis.conf"
    conf.write_text(
        main.replace("include tls.conf", f"include {tmp_path / 'tls.conf'}")
        .replace("/etc/redis/users.acl", str(users))
        .replace("/var/lib/redis", str(data))
    )
    (tmp_path / "tls.conf").write_text(tls)
    options = f"ssl_ca_certs={certs / 'ca.crt'}"
    probe = f"rediss://localhost:PORT/0?{options}"
    with started("redis-7.0", data, str(conf), "--tls-port", "PORT", probe=probe) as port:
        safe = f"rediss://engine:pw-engine@localhost:{port}/0?{options}"
        store = Store(connect(safe))
        assert store.run(Ledger(LANE).lease("e", 1)) == []
        store.close()
        findings = examine(safe, LANE, [Role.ENGINE])
        assert fit(findings), findings
        for bad in (
            f"redis://engine:pw-engine@localhost:{port}/0",
            f"rediss://engine:pw-engine@localhost:{port}/0",
        ):
            with pytest.raises(StoreError, match="cannot reach Redis"):
                connect(bad)
