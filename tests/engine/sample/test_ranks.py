"""Two and four ranks choose what one rank chooses, exchange little, and all know the same token."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from engine.load.shards import vocab_range
from engine.parallel.comm import Comm
from engine.request import Sampling
from engine.sample.chunks import padded
from engine.sample.limits import top_k_floor, top_p_floor
from engine.sample.sampler import Sampler
from engine.sample.shard import Shard
from tests.engine.sample.cases import draw, make

VOCABS = {  # several sizes: odd ones, one with a rank that has no ids, one large enough for all paths
    6: torch.float32, 1003: torch.float32, 20_011: torch.bfloat16, 30_000: torch.float32,
}  # fmt: skip


def everything(comm: Comm) -> dict[str, object]:
    """All that this rank answers, as JSON."""
    answers: dict[str, object] = {}
    for vocab, dtype in VOCABS.items():
        start, end, _ = vocab_range(vocab, comm.rank, comm.world)
        cases = make(vocab, seed=vocab, dtype=dtype)
        sampler = Sampler(comm, vocab, start, end, len(cases), "cpu")
        answers[f"ids {vocab}"] = draw(sampler, cases)

        logits = torch.stack([c.logits_V for c in cases])
        ids = torch.arange(len(cases)) % vocab
        entries = sampler.logprobs_of(logits[:, start:end], ids, 6)
        answers[f"logprobs {vocab}"] = [(e.token_id, e.logprob, e.rank, e.top) for e in entries]

        poisoned = logits.clone()
        poisoned[2, vocab - 2] = torch.nan
        for row, case in enumerate(cases):
            sampler.add_row(row, case.sampling, case.tokens, case.prompt_len)
        out = sampler.sample(
            poisoned[:, start:end], list(range(len(cases))), torch.tensor([len(c.tokens) for c in cases])
        )
        answers[f"bad {vocab}"] = out.bad_rows
        answers[f"ids beside a bad row {vocab}"] = out.token_ids.tolist()

    answers["penalised"] = _penalised(comm)
    answers["floors"] = _floors(comm)
    return answers


def _floors(comm: Comm) -> list[list[float]]:
    """The edges of top_k and top_p, where one rank holds far more of the best ids than it may send."""
    start, end, _ = vocab_range(30_000, comm.rank, comm.world)
    values = torch.randn(5, 30_000, generator=torch.Generator().manual_seed(2)).sort(descending=True).values
    values[1:] *= torch.tensor([[0.01], [3.0], [0.0], [1.0]])
    values[4] = values[4].flip(0)
    shard = Shard(comm, start, end, torch.device("cpu"))
    own, best = padded(values[:, start:end]), values.amax(dim=1)
    floors = [top_p_floor(shard, own, best, torch.full((5,), p).double()) for p in (0.1, 0.5, 0.9, 0.999)]
    floors += [top_k_floor(shard, own, best, torch.full((5,), k), k) for k in (1, 256, 257, 5000, 29_999)]
    return [f.tolist() for f in floors]


def _penalised(comm: Comm) -> list[list[int]]:
    """Counts follow tokens that another rank owns."""
    start, end, _ = vocab_range(50, comm.rank, comm.world)
    sampler = Sampler(comm, 50, start, end, 2, "cpu")
    sampler.add_row(0, Sampling(temperature=0.0, frequency_penalty=1.0), [1, 2], 2)
    sampler.add_row(1, Sampling(temperature=1.0, seed=3, repetition_penalty=2.0), [1, 2], 2)
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    logits[:, [0, 13, 25, 26, 39]] += 3  # each rank's first id, where a stranger's token must not be counted
    logits = logits[:, start:end]
    return [sampler.sample(logits, [0, 1], torch.tensor([p, p])).token_ids.tolist() for p in range(2, 40)]


def bytes_per_row(comm: Comm, sampling: Sampling, vocab: int) -> float:
    start, end, _ = vocab_range(vocab, comm.rank, comm.world)
    sampler = Sampler(comm, vocab, start, end, 8, "cpu")
    for row in range(8):
        sampler.add_row(row, sampling, [1], 1)
    logits = torch.randn(8, vocab, generator=torch.Generator().manual_seed(1))[:, start:end] * 8
    before = comm.traffic.gather_bytes
    sampler.sample(logits, list(range(8)), torch.ones(8, dtype=torch.int64))
    return (comm.traffic.gather_bytes - before) / 8


def rank_main(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    comm = Comm(rank, world)
    answers = everything(comm)
    vocab = 40_000
    answers["bytes"] = {
        "greedy": bytes_per_row(comm, Sampling(temperature=0.0), vocab),
        "free": bytes_per_row(comm, Sampling(seed=1), vocab),
        "limited": bytes_per_row(comm, Sampling(seed=1, top_k=40, top_p=0.9, min_p=0.01), vocab),
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(answers))
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_choose_what_one_rank_chooses(world, tmp_path):
    mp.start_processes(rank_main, (world, str(tmp_path)), nprocs=world, start_method="spawn")
    want = json.loads(json.dumps(everything(Comm())))
    for rank in range(world):
        got = json.loads(Path(tmp_path, f"{rank}.json").read_text())
        sent = got.pop("bytes")
        assert got.keys() == want.keys()
        for what in want:
            assert got[what] == want[what], f"{what} on rank {rank} of {world}"
        # A row's logits would be 160,000 bytes.
        assert (sent["greedy"], sent["free"]) == (16, 32)
        assert sent["limited"] < 8_000
