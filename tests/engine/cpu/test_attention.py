"""The paged kernel answers what gathering and SDPA answer, and a row's bits depend on that row only."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.attn.base import AttentionBackend, AttnShape, AttnStep, HeadWork, choose
from engine.attn.cpu_paged import CpuPagedBackend, refusal
from engine.attn.sdpa import SdpaBackend
from engine.cpu import ops
from engine.models.rope import rotate

SHAPE = AttnShape(4, 2, 64, 16, (None,), torch.float32, torch.device("cpu"))
pytestmark = pytest.mark.skipif(refusal(SHAPE) is not None, reason=f"no kernels: {refusal(SHAPE)}")


class Rows:
    """Rows with random queries, keys and values for all their tokens, and blocks in random places."""

    def __init__(self, shape: AttnShape, lengths: list[int], seed: int = 0) -> None:
        self.shape, self.lengths = shape, lengths
        g = torch.Generator().manual_seed(seed)
        rng = np.random.default_rng(seed)
        sizes = [-(-n // shape.block_size) for n in lengths]
        self.num_blocks = 1 + sum(sizes) + 3
        free = rng.permutation(np.arange(1, self.num_blocks))
        self.tables = np.zeros((len(lengths), max(sizes)), np.int32)
        for r, size in enumerate(sizes):
            self.tables[r, :size], free = free[:size], free[size:]

        def heads(n: int, number: int) -> torch.Tensor:
            return torch.randn(n, number, shape.head_dim, generator=g).to(shape.dtype)

        self.q = [heads(n, shape.num_heads) for n in lengths]
        self.k = [heads(n, shape.num_kv_heads) for n in lengths]
        self.v = [heads(n, shape.num_kv_heads) for n in lengths]

    def backend(self, make: type, poison: bool = False) -> AttentionBackend:
        backend = make(self.shape)
        backend.allocate(self.num_blocks)
        if poison:
            for x in (*backend.cache.k, *backend.cache.v):
                x.fill_(torch.nan)
        return backend

    def begin(self, backend: AttentionBackend, parts: list[tuple[int, int, int]]) -> np.ndarray:
        """Announce a step of (row, start, count) parts; where each part's tokens begin."""
        rows, starts, counts = (np.array(x, dtype=np.int64) for x in zip(*parts, strict=True))
        cu = np.concatenate([[0], np.cumsum(counts)])
        slots = [
            self.tables[r, p // self.shape.block_size] * self.shape.block_size + p % self.shape.block_size
            for r, s, n in parts
            for p in range(s, s + n)
        ]
        backend.begin(
            AttnStep(
                starts,
                counts,
                cu,
                torch.from_numpy(self.tables[rows]),
                torch.tensor(slots, dtype=torch.int64),
            )
        )
        return cu

    def step(self, backend: AttentionBackend, parts: list[tuple[int, int, int]]) -> list[torch.Tensor]:
        """Compute (row, start, count) parts in one step, padded to a multiple of 8; the parts' outputs."""
        cu = self.begin(backend, parts)
        padding = -int(cu[-1]) % 8

        def packed(x: list[torch.Tensor]) -> torch.Tensor:
            real = torch.cat([x[r][s : s + n] for r, s, n in parts])
            return torch.cat([real, torch.full((padding, *real.shape[1:]), torch.nan, dtype=real.dtype)])

        out = backend.attend(0, packed(self.q), packed(self.k), packed(self.v))
        assert not out[int(cu[-1]) :].isnan().any(), "padding tokens carry NaN on"
        return [out[cu[i] : cu[i + 1]] for i in range(len(parts))]

    def whole(self, backend: AttentionBackend) -> list[torch.Tensor]:
        return self.step(backend, [(r, 0, n) for r, n in enumerate(self.lengths)])


#: Rotations of 20 pairs are scalar in one way and torch's in the other.
TIGHT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
LENGTHS = [1, 7, 16, 33, 128, 129, 300]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size", "window"),
    [
        (4, 2, 64, 16, None), (2, 2, 128, 16, None), (8, 1, 32, 32, None), (6, 2, 16, 16, None),
        (4, 4, 48, 48, None), (4, 2, 80, 16, 20), (4, 1, 64, 16, 1), (64, 1, 64, 32, 130),
        (7, 1, 64, 16, None), (16, 8, 128, 16, None),
    ],
)  # fmt: skip
def test_the_kernel_agrees_with_gathered_sdpa(heads, kv_heads, head_dim, block_size, window, dtype):
    shape = AttnShape(heads, kv_heads, head_dim, block_size, (window,), dtype, torch.device("cpu"))
    assert refusal(shape) is None
    rows = Rows(shape, LENGTHS)
    got, want = rows.whole(rows.backend(CpuPagedBackend)), rows.whole(rows.backend(SdpaBackend))
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 50])
def test_chunks_batches_and_single_tokens_change_no_bit(dtype, window):
    rows = Rows(replace(SHAPE, dtype=dtype, windows=(window,)), LENGTHS, seed=1)
    together = rows.whole(rows.backend(CpuPagedBackend))
    for r, n in enumerate(LENGTHS):
        backend = rows.backend(CpuPagedBackend)
        assert torch.equal(rows.step(backend, [(r, 0, n)])[0], together[r]), "alone"
        backend = rows.backend(CpuPagedBackend, poison=True)
        chunks = [rows.step(backend, [(r, at, min(5, n - at))])[0] for at in range(0, n, 5)]
        assert torch.equal(torch.cat(chunks), together[r]), "chunks of 5"
    backend = rows.backend(CpuPagedBackend)
    rows.step(backend, [(r, 0, n - 1) for r, n in enumerate(LENGTHS) if n > 1])
    last = rows.step(backend, [(r, n - 1, 1) for r, n in enumerate(LENGTHS)])
    assert all(torch.equal(x[0], t[-1]) for x, t in zip(last, together, strict=True)), "decoding"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("half", [32, 16, 20, 0], ids=lambda h: f"{h} pairs rotated")
def test_work_on_heads_while_they_are_stored_changes_no_bit(half, dtype):
    shape = replace(SHAPE, dtype=dtype)
    rows = Rows(shape, [5, 40], seed=6)
    g = torch.Generator().manual_seed(1)
    raw = torch.cat([torch.cat([x[r] for r in (0, 1)]) for x in (rows.q, rows.k, rows.v)], dim=1)
    raw = torch.cat([raw, torch.full((3, *raw.shape[1:]), torch.nan, dtype=dtype)])  # padding tokens
    angles, factor = torch.rand(48, 1, half, generator=g) * 6, torch.rand(48, 1, 1, generator=g) + 0.5
    weights = [torch.rand(64, generator=g).to(dtype) + 0.5 for _ in range(2)]
    for norms, logn in (([None, None], None), (weights, None), (weights, factor)):
        cos, sin = (angles.cos(), angles.sin()) if half else (None, None)
        q, k, v = raw.split([4, 2, 2], dim=1)
        if norms[0] is not None:
            q, k = (ops.rms_norm(x, w, 1e-5) for x, w in zip((q, k), norms, strict=True))
        if half:
            q, k = (rotate(x, cos, sin) for x in (q, k))
        if logn is not None:
            q = (q * logn).to(dtype)
        backends = [rows.backend(CpuPagedBackend) for _ in range(2)]
        for backend in backends:
            rows.begin(backend, [(0, 0, 5), (1, 0, 40)])
        single = backends[0].attend(0, q, k, v)
        fused = backends[1].attend_heads(0, raw, HeadWork(cos, sin, logn, *norms, eps=1e-5))
        assert torch.equal(backends[0].cache.v[0], backends[1].cache.v[0])
        torch.testing.assert_close(fused, single, rtol=TIGHT[dtype], atol=TIGHT[dtype])


def test_threads_change_no_bit():
    rows = Rows(SHAPE, LENGTHS, seed=2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = rows.whole(rows.backend(CpuPagedBackend))
        torch.set_num_threads(2)
        two = rows.whole(rows.backend(CpuPagedBackend))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_nan_in_blocks_that_no_row_has_written_reaches_no_output():
    for dtype in (torch.float32, torch.bfloat16):
        rows = Rows(replace(SHAPE, dtype=dtype), LENGTHS, seed=3)
        clean = rows.whole(rows.backend(CpuPagedBackend))
        poisoned = rows.whole(rows.backend(CpuPagedBackend, poison=True))
        assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))


def test_a_row_of_nan_harms_no_other():
    rows = Rows(SHAPE, LENGTHS, seed=4)
    clean = rows.whole(rows.backend(CpuPagedBackend))
    rows.q[3][:] = torch.nan
    rows.v[3][:] = torch.nan
    got = rows.whole(rows.backend(CpuPagedBackend))
    assert got[3].isnan().all()
    assert all(torch.equal(a, b) for r, (a, b) in enumerate(zip(got, clean, strict=True)) if r != 3)


def test_the_choice_names_the_kernel_or_the_reason_against_it():
    assert choose(SHAPE)[0].name == "cpu_paged"
    backend, reason = choose(replace(SHAPE, head_dim=20))
    assert (backend.name, reason) == (
        "sdpa",
        "sdpa: gathered blocks, because head size 20 is no multiple of 16",
    )
    assert choose(replace(SHAPE, block_size=8))[1].endswith("because block size 8 is no multiple of 16")
    assert choose(replace(SHAPE, dtype=torch.float64))[0].name == "sdpa"
