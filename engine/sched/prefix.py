"""The prefix cache: which block holds the keys and values of which prefix.

A full block is named by a chain: sha256(digest of the block before it, its token ids as 4-byte words);
the chain starts at sha256 of the salt, so tenants with different salts share nothing. As in vLLM
(`v1/core/kv_cache_utils.py`), but a hit does not rest on the hash: the token ids, the block before and
the salt are compared as well, so a collision is a miss and never another user's keys
(GHSA-rm76-4mrf-v9r8). Knows nothing of rows or of reference counts.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


class Chain:
    """One row's side of the cache: the digests of its full blocks, and how far they are published."""

    __slots__ = (
        "_block_size", "_digests", "_hash", "_output", "_prompt", "_root",
        "above", "awaited", "patience_at", "published", "salt", "waited",
    )  # fmt: skip

    def __init__(
        self,
        prompt: list[int],
        output: list[int],
        salt: bytes,
        block_size: int,
        hash_: Callable[[bytes], bytes],
    ) -> None:
        """`prompt` and `output` are the row's own lists; the second may grow."""
        self._prompt, self._output = prompt, output
        self._block_size = block_size
        self._hash = hash_
        self._root = hash_(b"root" + salt)
        self._digests: list[bytes] = []
        self.salt = salt
        #: Blocks known to the cache, counted from the first, and the uid of the last of them: the salt
        #: before the first block, None where another prefix stands in the way and nothing can follow.
        self.published = 0
        self.above: int | bytes | None = salt
        # Book-keeping of the scheduler: see Scheduler._hits.
        self.awaited: bytes | None = None
        self.patience_at = -1
        self.waited = 0

    def words(self, index: int) -> bytes:
        """Token ids of the row's block `index`, which must be full."""
        start, end = index * self._block_size, (index + 1) * self._block_size
        known = len(self._prompt)
        if end <= known:
            ids = self._prompt[start:end]
        else:
            ids = self._prompt[start:] + self._output[max(0, start - known) : end - known]
        return array("I", ids).tobytes()

    def digest(self, index: int) -> bytes:
        """Name of the row's block `index`, which must be full."""
        digests = self._digests
        while len(digests) <= index:
            before = digests[-1] if digests else self._root
            digests.append(self._hash(before + self.words(len(digests))))
        return digests[index]


@dataclass(frozen=True, slots=True)
class _Entry:
    uid: int  # never used twice
    above: int | bytes  # uid of the entry before it, or the salt
    words: bytes
    block: int


class PrefixCache:
    """Index of the full blocks whose content is known to be computed."""

    def __init__(self, block_size: int, hash_: Callable[[bytes], bytes] = sha256) -> None:
        self.block_size = block_size
        self._hash = hash_
        self._entries: dict[bytes, _Entry] = {}
        self._digest_of: dict[int, bytes] = {}
        self._next_uid = 0

    def chain(self, prompt: list[int], output: list[int], salt: bytes) -> Chain:
        return Chain(prompt, output, salt, self.block_size, self._hash)

    def match(self, chain: Chain, limit: int) -> tuple[list[int], int | bytes]:
        """(blocks of the longest cached prefix of at most `limit` blocks, uid of the last of them)."""
        blocks: list[int] = []
        above: int | bytes = chain.salt
        while len(blocks) < limit:
            entry = self._entries.get(chain.digest(len(blocks)))
            if entry is None or entry.above != above or entry.words != chain.words(len(blocks)):
                break
            blocks.append(entry.block)
            above = entry.uid
        return blocks, above

    def publish(self, chain: Chain, blocks: list[int], count: int) -> list[int]:
        """The row's first `count` blocks are full and computed; returns those that are now indexed.

        A prefix that is cached already keeps its first block. Where another prefix has the digest, this
        row publishes no more: what would hang below it could be found under the wrong parent.
        """
        fresh = []
        while chain.published < count and chain.above is not None:
            index = chain.published
            digest, words = chain.digest(index), chain.words(index)
            entry = self._entries.get(digest)
            if entry is None:
                entry = _Entry(self._next_uid, chain.above, words, blocks[index])
                self._next_uid += 1
                self._entries[digest] = entry
                self._digest_of[entry.block] = digest
                fresh.append(entry.block)
            elif entry.above != chain.above or entry.words != words:
                chain.above = None
                break
            chain.above = entry.uid
            chain.published += 1
        return fresh

    def forget(self, block: int) -> None:
        """The block's content is about to be overwritten."""
        del self._entries[self._digest_of.pop(block)]

    def clear(self) -> None:
        self._entries.clear()
        self._digest_of.clear()

    def blocks(self) -> set[int]:
        """Blocks that are indexed."""
        return set(self._digest_of)
