"""Shard plans: which slice of which source tensor becomes which tensor of one rank. Pure arithmetic.

Knows nothing of files, torch or process groups. `engine.models` declares every tensor of a model with
the verbs of `Cut`; `engine.load.checkpoint` reads what the plan says. The scheme is Megatron-LM's
(Shoeybi et al., 2019): matrices before a non-linearity are cut by output rows, those after it by input
columns, so that a layer needs one sum over the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """`source[start : start + length]` along `dim`, copied to `at` along the same dimension.

    A length of 0 copies nothing, but the source must still exist with that shape: every rank checks the
    whole checkpoint, so that all of them fail alike.
    """

    source: str
    source_shape: tuple[int, ...]
    dim: int
    start: int
    length: int
    at: int = 0


@dataclass(frozen=True, slots=True)
class Shard:
    """One tensor of one rank. What no piece covers is zero; a shape with a 0 means "not on this rank"."""

    target: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A run of output rows that is cut by itself: `units` heads (or single rows) of `unit` rows each.

    It begins at row `first` of a source of `source_rows` rows (a fused tensor holds several parts).
    Fewer units than ranks are replicated: KV heads are, when there are fewer than ranks.
    """

    source: str
    units: int
    unit: int = 1
    first: int = 0
    source_rows: int | None = None


def owned(units: int, rank: int, world: int) -> tuple[int, int]:
    """(first, count) of the units that `rank` holds; neighbours share one where there are too few."""
    if units >= world:
        count = units // world
        return rank * count, count
    return rank * units // world, 1


def vocab_range(vocab_size: int, rank: int, world: int) -> tuple[int, int, int]:
    """(start, end, rows) of a vocabulary shard: ids [start, end) in a table padded to `rows` rows.

    All ranks have equally many rows, a multiple of 8 (whole vector registers) unless that would leave
    the last rank without a single id.
    """
    rows = -(-vocab_size // world)
    padded = -(-rows // 8) * 8
    if padded * (world - 1) < vocab_size:
        rows = padded
    start = min(rank * rows, vocab_size)
    return start, min(start + rows, vocab_size), rows


@dataclass(frozen=True, slots=True)
class Cut:
    """The verbs of a shard plan, for one rank of `world`."""

    rank: int
    world: int

    def replicated(self, target: str, source: str, shape: tuple[int, ...]) -> Shard:
        """The whole tensor on every rank."""
        return Shard(target, shape, (Piece(source, shape, 0, 0, shape[0]),))

    def columns(self, target: str, parts: list[Part], in_features: int | None) -> Shard:
        """Output rows of the parts, one below the other; `in_features` None means a bias."""
        tail = () if in_features is None else (in_features,)
        pieces: list[Piece] = []
        at = 0
        for part in parts:
            first, count = owned(part.units, self.rank, self.world)
            rows = part.source_rows or part.units * part.unit
            length = count * part.unit
            start = part.first + first * part.unit
            pieces.append(Piece(part.source, (rows, *tail), 0, start, length, at))
            at += length
        return Shard(target, (at, *tail), tuple(pieces))

    def rows(self, target: str, source: str, out_features: int, in_features: int) -> Shard:
        """Input columns: each rank multiplies its slice of the input, and the products are summed."""
        first, count = owned(in_features, self.rank, self.world)
        return Shard(
            target, (out_features, count), (Piece(source, (out_features, in_features), 1, first, count),)
        )

    def first_rank_only(self, target: str, source: str, size: int) -> Shard:
        """The bias of a row-parallel layer: added once, before the sum over ranks."""
        size_here = size if self.rank == 0 else 0
        return Shard(target, (size_here,), (Piece(source, (size,), 0, 0, size_here),))

    def vocab(self, target: str, source: str, vocab_size: int, hidden_size: int) -> Shard:
        """Rows of the embedding or the head; the padding behind the last id stays zero."""
        start, end, rows = vocab_range(vocab_size, self.rank, self.world)
        return Shard(
            target, (rows, hidden_size), (Piece(source, (vocab_size, hidden_size), 0, start, end - start),)
        )
