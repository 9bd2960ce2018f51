"""Shard plans: the ranks' slices tile every source tensor, for every architecture, without a rank running."""

from __future__ import annotations

import dataclasses

import pytest

from engine.config import ModelSpec, RopeSpec
from engine.load.shards import Cut, Part, owned, vocab_range
from engine.models.registry import shards_of

SPEC = ModelSpec(
    architecture="LlamaForCausalLM", vocab_size=1003, hidden_size=64, intermediate_size=96, num_layers=2,
    num_heads=8, num_kv_heads=2, head_dim=16, max_position=512, rms_eps=1e-6, rope=RopeSpec(),
    qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True,
)  # fmt: skip
QWEN1 = dataclasses.replace(SPEC, architecture="QWenLMHeadModel", num_kv_heads=8, qk_norm=False)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("spec", [SPEC, QWEN1], ids=lambda s: s.architecture)
def test_the_ranks_together_read_every_element_and_only_kv_heads_and_norms_twice(
    spec: ModelSpec, world: int
) -> None:
    times: dict[str, list[int]] = {}  # by source: how often each index along the cut dimension is read
    for rank in range(world):
        for shard in shards_of(spec, Cut(rank, world)):
            for p in shard.pieces:
                counts = times.setdefault(p.source, [0] * p.source_shape[p.dim])
                for i in range(p.start, p.start + p.length):
                    counts[i] += 1
                assert p.at + p.length <= shard.shape[p.dim]
    for source, counts in times.items():
        copies = 1
        if "norm" in source or ".ln_" in source:
            copies = world
        elif "k_proj" in source or "v_proj" in source:
            copies = max(1, world // spec.num_kv_heads)
        assert set(counts) == {copies}, f"{source} at TP {world}"


def test_pieces_of_one_shard_do_not_overlap_and_fill_it() -> None:
    for rank in range(4):
        for shard in shards_of(QWEN1, Cut(rank, 4)):
            if len(shard.pieces) > 1:
                ends = [0]
                for p in shard.pieces:
                    assert p.at == ends[-1], shard
                    ends.append(p.at + p.length)
                assert ends[-1] == shard.shape[0], shard


def test_fewer_kv_heads_than_ranks_are_replicated_to_neighbours() -> None:
    assert [owned(2, rank, 8) for rank in range(8)] == [(0, 1)] * 4 + [(1, 1)] * 4
    assert [owned(8, rank, 4) for rank in range(4)] == [(0, 2), (2, 2), (4, 2), (6, 2)]


def test_fused_qkv_takes_each_ranks_heads_from_three_places() -> None:
    parts = [Part("c_attn", 4, 16, first * 64, 192) for first in range(3)]
    shard = Cut(1, 2).columns("qkv", parts, 10)
    assert shard.shape == (96, 10)
    assert [(p.start, p.length, p.at) for p in shard.pieces] == [(32, 32, 0), (96, 32, 32), (160, 32, 64)]
    assert {p.source_shape for p in shard.pieces} == {(192, 10)}


def test_row_parallel_bias_is_on_rank_0_only_but_checked_on_all() -> None:
    shards = [Cut(rank, 4).first_rank_only("o.bias", "b", 7) for rank in range(4)]
    assert [s.shape for s in shards] == [(7,), (0,), (0,), (0,)]
    assert {p.source_shape for s in shards for p in s.pieces} == {(7,)}


@pytest.mark.parametrize("vocab", [10, 64, 100, 1000, 1003, 151936])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_vocabulary_ranges_are_consecutive_and_every_rank_has_some(vocab: int, world: int) -> None:
    ranges = [vocab_range(vocab, rank, world) for rank in range(world)]
    assert [r[0] for r in ranges] == [0] + [r[1] for r in ranges[:-1]]
    assert ranges[-1][1] == vocab
    assert len({rows for _, _, rows in ranges}) == 1
    assert all(0 < end - start <= rows for start, end, rows in ranges)
