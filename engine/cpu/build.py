"""Builds the C++ kernels for this very machine, once, and loads them. Knows nothing of what they compute.

The library goes into a private folder of the user's cache (mode 0700, owned by the user: whoever could
write there could run code here), under a name that hashes sources, compiler and CPU, so that a home shared
by unlike machines holds one for each. Without a compiler, or where anything fails, `library` says why and
callers use torch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)

_ENGINE = Path(__file__).resolve().parent.parent
SOURCES = (
    _ENGINE / "cpu" / "ops.cpp",
    _ENGINE / "cpu" / "gemm.cpp",
    _ENGINE / "cpu" / "shared.cpp",
    _ENGINE / "attn" / "cpu_heads.cpp",
    _ENGINE / "attn" / "cpu_paged.cpp",
)
HEADERS = (_ENGINE / "cpu" / "vec.h", _ENGINE / "attn" / "cpu_cache.h")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC", "-Wno-psabi")
#: A compilation takes 2 s of CPU time; a minute means that the machine has come to a stop.
COMPILE_TIMEOUT_S = 120.0


class BuildError(Exception):
    """The kernels cannot be had here; the text says why."""


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """(the kernels, how they were made) or (None, why not). Builds at the first call of a process."""
    try:
        compiler = _compiler()
        version = _run([compiler, "--version"]).splitlines()[0]
        path = _folder() / f"kernels-{_key(version)}.so"
        if not path.exists():
            _build(compiler, path)
        return ctypes.CDLL(str(path)), f"built by {version}"
    except (BuildError, OSError) as error:
        log.warning("cpu_kernels_unavailable reason=%r", str(error))
        return None, str(error)


def _compiler() -> str:
    wanted = os.environ.get("CXX", "g++")
    found = shutil.which(wanted)
    if found is None:
        raise BuildError(f"there is no C++ compiler {wanted!r}: install g++ 12 or newer, or set CXX")
    return found


def _key(version: str) -> str:
    digest = hashlib.sha256(repr((version, FLAGS, _cpu(), str(_openmp()))).encode())
    for source in (*SOURCES, *HEADERS):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:24]


def _cpu() -> str:
    """What -march=native looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _openmp() -> Path | None:
    """torch's own copy of libgomp. A second one would bring a second pool of threads, and both would
    spin for the same cores."""
    import torch

    return next(iter(sorted(Path(torch.__file__).parent.parent.glob("torch*/lib*/libgomp*.so*"))), None)


def _folder() -> Path:
    """The private cache folder. Raises BuildError where somebody else could write into it."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base) / "headrace"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = folder.stat()
    if info.st_uid != os.getuid() or info.st_mode & 0o022:
        raise BuildError(f"{folder} could be written by others: chown it to yourself and chmod it to 700")
    return folder


def _build(compiler: str, path: Path) -> None:
    """Compile beside `path` and move it there, so that ranks that build at once do not meet half a file."""
    openmp = _openmp()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="building-") as work:
        flags = [*FLAGS, *(f"-I{header.parent}" for header in HEADERS)]
        objects = [os.path.join(work, f"{source.stem}.o") for source in SOURCES]
        for source, target in zip(SOURCES, objects, strict=True):
            _run([compiler, *flags, "-c", str(source), "-o", target])
        made = os.path.join(work, path.name)
        _run([compiler, "-shared", *objects, str(openmp) if openmp else "-fopenmp", "-o", made])
        os.replace(made, path)
    log.info("cpu_kernels_built path=%s", path)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{' '.join(command)} took over {COMPILE_TIMEOUT_S:.0f} s") from error
    if done.returncode:
        text = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise BuildError(f"{' '.join(command)} failed: {text[0] if text else done.returncode}")
    return done.stdout
