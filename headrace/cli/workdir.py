"""The working folder of a run, `OUTPUT.headrace/`: what makes the same command continue.

    manifest.json   run name, lane, model fingerprint, number of passes so far
    rows.sqlite     every row of the input that was ever admitted (the producer's index)
    written.sqlite  every job id in the output (the sink's index)
    server/         the embedded server's append-only file
    engine.log      what the engine process wrote

Knows files only. The two indexes together say what is left to do even where the server's data is gone.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from headrace.cli.common import CommandError, name_from

#: Bytes hashed of each weight file: its first MiB and samples over its length. A whole 28 GB
#: checkpoint would take minutes, and weights that differ at all differ nearly everywhere.
_SAMPLE = 1 << 16
_SAMPLES = 16


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a run was started with. `passes` counts how often the command was given."""

    run: str
    lane: str
    model: str
    fingerprint: str
    passes: int = 1


@dataclass(frozen=True, slots=True)
class Workdir:
    """Paths around one output file."""

    output: Path

    @property
    def folder(self) -> Path:
        return self.output.with_name(self.output.name + ".headrace")

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.json"

    @property
    def rows(self) -> Path:
        return self.folder / "rows.sqlite"

    @property
    def written(self) -> Path:
        return self.folder / "written.sqlite"

    @property
    def server(self) -> Path:
        return self.folder / "server"

    @property
    def log(self) -> Path:
        return self.folder / "engine.log"

    def check(self) -> None:
        """Raises CommandError where the output cannot be written."""
        if self.output.is_dir():
            raise CommandError(f"output {self.output} is a folder: name a file in it")
        if self.output.exists() and not self.output.is_file():
            raise CommandError(f"output {self.output} is not a regular file: resuming needs one")
        parent = self.output.parent
        if not parent.is_dir():
            raise CommandError(f"output folder {parent} does not exist: create it (mkdir -p {parent})")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise CommandError(f"output folder {parent} is not writable: choose another or change its mode")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and hold it against other runs. Raises CommandError where one has it."""
        try:
            self.folder.mkdir(exist_ok=True)
            lock = open(self._lock, "ab")  # noqa: SIM115 - closed below
        except OSError as e:
            raise CommandError(f"working folder {self.folder} cannot be used: {e.strerror}") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CommandError(
                    f"another headrace run writes {self.output}: wait for it or choose another output"
                ) from None
            yield

    @property
    def _lock(self) -> Path:
        return self.folder / "lock"

    def previous(self) -> Manifest | None:
        """The manifest of an earlier pass. Raises CommandError where it does not read as one."""
        try:
            return Manifest(**json.loads(self.manifest.read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as e:
            raise CommandError(f"{self.manifest} is damaged ({e}): --fresh starts over") from None

    def nothing_written(self, error_file: Path | None) -> bool:
        """Whether an earlier pass left no row, so that starting over costs nothing and permits any change."""
        files = [self.output] if error_file is None else [self.output, error_file]
        return self.manifest.exists() and not any(f.exists() and f.stat().st_size for f in files)

    def begin(self, model: str, fingerprint: str, run: str | None, lane: str | None) -> Manifest:
        """The manifest of this pass, written down. Raises CommandError where it cannot continue the last."""
        last = self.previous()
        if last is None:
            if self.output.exists() and self.output.stat().st_size:
                raise CommandError(
                    f"output {self.output} exists, but {self.manifest} does not, so there is nothing to "
                    "continue from: --fresh overwrites it, or choose another output"
                )
            name = run or f"{name_from(str(self.output))}-{secrets.token_hex(3)}"
            now = Manifest(name, lane or name, model, fingerprint)
        else:
            self._same("model", last.model, model, last.fingerprint == fingerprint)
            self._same("run", last.run, run, run in (None, last.run))
            self._same("lane", last.lane, lane, lane in (None, last.lane))
            now = dataclasses.replace(last, model=model, passes=last.passes + 1)
        write_whole(self.manifest, json.dumps(dataclasses.asdict(now), indent=1).encode())
        return now

    def remove(self, *others: Path | None) -> None:
        """Start over: what the folder holds, the output and `others` go away; the manifest last, so that a
        removal that was cut short is still one of this run."""
        for path in (self.output, *others):
            if path is not None:
                path.unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path not in (self._lock, self.manifest):
                path.unlink()
        self.manifest.unlink(missing_ok=True)

    def _same(self, what: str, before: str, now: str | None, same: bool) -> None:
        if not same:
            raise CommandError(
                f"{self.output} was begun with {what} {before}, and this is {now}"
                f"{' with other content' if before == now else ''}: --fresh starts over, "
                "or choose another output"
            )


def write_whole(path: Path, data: bytes) -> None:
    """Replace a small file so that a crash leaves the old one or the new one."""
    temp = path.with_name(path.name + ".tmp")
    with open(temp, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temp, path)


def fingerprint(model: str) -> str:
    """Hash of a model folder's content: small files whole, weights by size and samples."""
    h = hashlib.blake2b(digest_size=16)
    for path in sorted(p for p in Path(model).iterdir() if p.is_file()):
        if path.suffix not in (".json", ".safetensors", ".tiktoken", ".model", ".txt", ".jinja"):
            continue
        size = path.stat().st_size
        h.update(f"{path.name}\0{size}\0".encode())
        with open(path, "rb") as f:
            if size <= _SAMPLE * _SAMPLES * 2:
                h.update(f.read())
                continue
            h.update(f.read(1 << 20))
            for i in range(1, _SAMPLES + 1):
                f.seek((size - _SAMPLE) * i // _SAMPLES)
                h.update(f.read(_SAMPLE))
    return h.hexdigest()
