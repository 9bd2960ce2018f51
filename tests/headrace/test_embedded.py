"""The embedded server: what it acknowledged survives kill -9, and nobody shares its folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import redis

from headrace.embedded import EmbeddedServer
from headrace.errors import StoreError

LINGERING = """
import sys, os
from headrace.embedded import EmbeddedServer
import headrace.embedded as e
e._LAUNCH = "import os, sys; os.execv(sys.argv[2], sys.argv[2:])"
server = EmbeddedServer(sys.argv[1])
print(server.pid, flush=True)
os._exit(0)
"""


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path) as server:
        client = redis.Redis.from_url(server.url, retry=None)
        for i in range(500):
            client.xadd("s", {"i": i})
        os.kill(server.pid, signal.SIGKILL)
    with EmbeddedServer(tmp_path) as server:
        assert redis.Redis.from_url(server.url).xlen("s") == 500


def test_a_torn_append_only_file_is_loaded(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path) as server:
        redis.Redis.from_url(server.url).set("a", "1")
    tail = next((tmp_path / "appendonlydir").glob("*.incr.aof"))
    with open(tail, "ab") as f:
        f.write(b"*3\r\n$3\r\nSET\r\n$1")
    with EmbeddedServer(tmp_path) as server:
        assert redis.Redis.from_url(server.url).get("a") == b"1"


def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom headrace.embedded import EmbeddedServer\n"
        "s = EmbeddedServer(sys.argv[1])\nprint(s.pid, flush=True)\ntime.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    _gone(pid)


def test_a_server_that_was_left_running_is_replaced(tmp_path: Path) -> None:
    left = subprocess.run(
        [sys.executable, "-c", LINGERING, str(tmp_path)], capture_output=True, text=True, check=True
    )
    old = int(left.stdout)
    assert psutil.pid_exists(old)
    with EmbeddedServer(tmp_path) as server:
        assert server.pid != old
        _gone(old)
        assert redis.Redis.from_url(server.url).ping()


def test_it_outlives_the_thread_that_made_it(tmp_path: Path) -> None:
    made: list[EmbeddedServer] = []
    thread = threading.Thread(target=lambda: made.append(EmbeddedServer(tmp_path)))
    thread.start()
    thread.join()
    with made[0] as server:
        time.sleep(0.2)
        assert redis.Redis.from_url(server.url).ping()


def test_the_server_of_another_folder_is_left_alone(tmp_path: Path) -> None:
    """Process numbers are given again: the number in a stale pid file may be anybody's by now."""
    (tmp_path / "mine").mkdir()
    with EmbeddedServer(tmp_path / "other") as other:
        (tmp_path / "mine" / "valkey.pid").write_text(str(other.pid))
        with EmbeddedServer(tmp_path / "mine"):
            assert redis.Redis.from_url(other.url).ping()


def test_it_leaves_no_socket_folder_behind_even_after_kill_9(tmp_path: Path) -> None:
    left = subprocess.run(
        [sys.executable, "-c", LINGERING, str(tmp_path)], capture_output=True, text=True, check=True
    )
    os.kill(int(left.stdout), signal.SIGKILL)
    old = Path((tmp_path / "socket").read_text()).parent
    assert old.is_dir()
    with EmbeddedServer(tmp_path) as server:
        assert not old.exists()
    assert not Path(server.socket).parent.exists()


def test_a_folder_it_cannot_start_on_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "appendonlydir").write_text("a file where the server wants a folder")
    with pytest.raises(StoreError, match=f"the embedded server on {tmp_path} did not start: .+") as caught:
        EmbeddedServer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_in_use_is_refused_by_the_number_of_its_process(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path), pytest.raises(StoreError, match=f"in use by process {os.getpid()}"):
        EmbeddedServer(tmp_path)
    with EmbeddedServer(tmp_path):
        pass


def _gone(pid: int) -> None:
    deadline = time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_server_that_died_by_itself_is_revived_with_what_it_acknowledged(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path) as server:
        assert server.revive() is None
        redis.Redis.from_url(server.url).set("a", "1")
        os.kill(server.pid, signal.SIGKILL)
        while (how := server.revive()) is None:
            time.sleep(0.02)
        assert how == "the embedded server was killed by SIGKILL"
        assert redis.Redis.from_url(server.url).get("a") == b"1", "on the same URL"
