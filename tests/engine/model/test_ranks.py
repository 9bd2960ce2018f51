"""What real gloo ranks exchange: 2L + 1 all-reduces a forward, a few numbers for sampling, no logits.

One group of two ranks runs every case and leaves its answers in a file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.cpu.kernels import kernel
from engine.parallel.comm import Comm
from engine.parallel.layers import MergedColumnParallelLinear, RowParallelLinear
from engine.parallel.linear import product
from engine.parallel.vocab import ParallelLMHead, VocabParallelEmbedding
from engine.request import Sampling
from tests.engine.model import drive, tiny

PROMPT = tiny.prompt(37)
LAYERS = 40  # Qwen-14B's
SAMPLED = Sampling(temperature=1.0, seed=11)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    tiny.build_qwen1(path / "qwen14b", num_hidden_layers=LAYERS)
    tiny.build(path / "qwen3", "qwen3")
    return path


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[str, Any]:
    drive.spawn(2, rank_answers, folder)
    both = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]
    return {name: [answer[name] for answer in both] for name in both[0]}


def rank_answers(rank: int, world: int, init_method: str, folder: Path) -> None:
    out: dict[str, Any] = {}
    w = drive.worker(folder / "qwen14b", rank, world, init_method)
    driver = drive.Driver(w, 64)
    driver.enter(0, PROMPT)
    driver.enter(1, PROMPT[:9])
    results = [driver.run({0: 37, 1: 4}), driver.run({0: 1, 1: 5}), driver.run({0: 1, 1: 1})]
    out["reduces"] = [r.allreduces if r else None for r in results]
    traffic = w.comm.traffic
    out["traffic"] = (traffic.all_reduces, traffic.gathers, traffic.gather_bytes)

    w = drive.worker(folder / "qwen3", rank, world, group=w)
    driver = drive.Driver(w, 64)
    driver.enter(0, PROMPT, sampling=SAMPLED)
    driver.enter(1, PROMPT[:20])
    driver.run({0: 37, 1: 20})
    own = [w.rows.last_R[:2].tolist()]
    for _ in range(30):
        driver.run({0: 1, 1: 1})
        own.append(w.rows.last_R[:2].tolist())
    out["ids"] = own
    out["layers"] = layer_answers(w.comm)
    torch.save(out, folder / f"rank{rank}.pt")
    w.close()


def layer_answers(comm: Comm) -> dict[str, torch.Tensor]:
    """This rank's layers, cut by hand from full matrices that every rank draws alike."""
    g = torch.Generator().manual_seed(3)
    x, w1, b1, w2, b2, table = (torch.randn(s, generator=g) for s in SIZES)
    r, n = comm.rank, comm.world
    half = 12 // n
    mine = slice(r * half, (r + 1) * half)
    tensors = {
        "up.weight": torch.cat([w1[:12][mine], w1[12:][mine]]),
        "up.bias": torch.cat([b1[:12][mine], b1[12:][mine]]),
        "down.weight": w2[:, mine].contiguous(),
    }  # fmt: skip
    if r == 0:
        tensors["down.bias"] = b2
    down = RowParallelLinear(tensors, "down", comm)(MergedColumnParallelLinear(tensors, "up")(x))
    long_x, long_w = (torch.randn(s, generator=g).bfloat16() for s in ((5, 256), (48, 256)))
    part = {"long.weight": long_w.chunk(n, 1)[r].contiguous()}
    long = RowParallelLinear(part, "long", comm)(long_x.chunk(n, 1)[r].contiguous())
    rows = 8 if n > 1 else 13
    padded = torch.cat([table, torch.full((16 - 13, 6), torch.nan)])[r * rows : (r + 1) * rows]
    ids = torch.tensor([0, 7, 8, 12, 3])
    embedded = VocabParallelEmbedding(padded.nan_to_num(), 13, comm)(ids)
    logits = ParallelLMHead(product({}, padded), 13, comm)(x)
    return {
        "down": down,
        "long": long,
        "embedded": embedded,
        "logits": logits,
        "left": torch.tensor(len(tensors)),
    }


SIZES = [(5, 6), (24, 6), (24,), (6, 12), (6,), (13, 6)]


def test_a_forward_of_qwen14b_makes_81_all_reduces(answers: dict[str, Any]) -> None:
    assert answers["reduces"][0] == [2 * LAYERS + 1] * 3 == [81] * 3
    assert answers["reduces"][1] == [None] * 3, "only rank 0 answers"
    assert [t[0] for t in answers["traffic"]] == [3 * 81] * 2


def test_sampling_exchanges_bytes_not_logits(answers: dict[str, Any]) -> None:
    _, gathers, size = answers["traffic"][0]
    sampled = 4  # rows that drew a token over the three steps
    assert gathers > 0
    assert size <= 64 * sampled, f"{size} bytes from one rank for {sampled} tokens of {tiny.VOCAB} logits"


def test_ranks_hold_the_same_ids_and_tp_changes_none(answers: dict[str, Any], folder: Path) -> None:
    assert answers["ids"][0] == answers["ids"][1]
    driver = drive.Driver(drive.worker(folder / "qwen3"), 64)
    driver.enter(0, PROMPT, sampling=SAMPLED)
    driver.enter(1, PROMPT[:20])
    driver.run({0: 37, 1: 20})
    for _ in range(30):
        driver.run({0: 1, 1: 1})
    alone = [list(pair) for pair in zip(driver.tokens[0][37:], driver.tokens[1][20:], strict=True)]
    assert answers["ids"][0] == alone


def test_parallel_layers_equal_whole_ones(answers: dict[str, Any]) -> None:
    whole = layer_answers(Comm())
    for rank in (0, 1):
        mine = answers["layers"][rank]
        torch.testing.assert_close(mine["down"], whole["down"], rtol=1e-5, atol=1e-5)
        assert torch.equal(mine["embedded"], whole["embedded"])
        if kernel("linear", torch.bfloat16) is not None:
            assert torch.equal(mine["long"], whole["long"]), "the split changed a bit"
        assert mine["left"] == 0, "a layer left a tensor behind"
    logits = torch.cat([answers["layers"][rank]["logits"] for rank in (0, 1)], dim=1)
    assert logits.shape[1] == 13, "padding ids are cut off"
    torch.testing.assert_close(logits, whole["logits"], rtol=1e-5, atol=1e-5)
