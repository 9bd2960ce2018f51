"""The prefix cache: the longest prefix is found, and never another one's, whatever the hash function does."""

from __future__ import annotations

import hashlib
import struct

import pytest

from engine.request import Request, Sampling
from engine.sched.prefix import Chain, PrefixCache
from engine.sched.sharing import reusable

SIZE = 4
A, B, C = [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]


def publish(cache: PrefixCache, tokens: list[int], blocks: list[int], salt: bytes = b"") -> Chain:
    chain = cache.chain(tokens, [], salt)
    cache.publish(chain, blocks, len(tokens) // SIZE)
    return chain


def found(cache: PrefixCache, tokens: list[int], salt: bytes = b"") -> list[int]:
    return cache.match(cache.chain(tokens, [], salt), len(tokens) // SIZE)[0]


def test_the_longest_cached_prefix_is_found() -> None:
    cache = PrefixCache(SIZE)
    publish(cache, A + B, [11, 12])
    assert found(cache, A + B + C) == [11, 12]
    assert found(cache, A + C) == [11]
    assert found(cache, B) == []
    assert cache.match(cache.chain(A + B, [], b""), 1)[0] == [11], "no more than asked for"


def test_digests_are_the_documented_sha256_chain() -> None:
    chain = PrefixCache(SIZE).chain(A + B, [], b"tenant")
    root = hashlib.sha256(b"roottenant").digest()
    first = hashlib.sha256(root + struct.pack("4I", *A)).digest()
    assert chain.digest(1) == hashlib.sha256(first + struct.pack("4I", *B)).digest()
    assert chain.digest(0) == first


@pytest.mark.parametrize("prompt_len", range(9))
def test_a_block_may_span_prompt_and_output(prompt_len: int) -> None:
    tokens = A + B
    chain = PrefixCache(SIZE).chain(tokens[:prompt_len], tokens[prompt_len:], b"")
    whole = PrefixCache(SIZE).chain(tokens, [], b"")
    assert [chain.digest(i) for i in (0, 1)] == [whole.digest(i) for i in (0, 1)]


def test_another_salt_finds_nothing() -> None:
    cache = PrefixCache(SIZE)
    publish(cache, A + B, [11, 12], salt=b"one")
    assert found(cache, A + B, salt=b"two") == []
    assert found(cache, A + B) == []
    assert found(cache, A + B, salt=b"one") == [11, 12]


def test_an_evicted_block_ends_the_prefix_before_it() -> None:
    cache = PrefixCache(SIZE)
    publish(cache, A + B + C, [11, 12, 13])
    cache.forget(12)
    assert found(cache, A + B + C) == [11]


def test_a_prefix_that_is_cached_already_keeps_its_blocks() -> None:
    cache = PrefixCache(SIZE)
    publish(cache, A, [11])
    publish(cache, A + B, [21, 22])
    assert found(cache, A + B) == [11, 22]
    assert cache.blocks() == {11, 22}


def test_a_hash_that_always_collides_gives_misses_and_never_wrong_blocks() -> None:
    cache = PrefixCache(SIZE, lambda _: b"same")
    publish(cache, A, [11])
    assert found(cache, B) == []
    assert found(cache, A, salt=b"other") == [], "the salt is compared, not only hashed"
    publish(cache, B + C, [21, 22])
    assert found(cache, B + C) == []
    assert found(cache, A) == [11]


def colliding_first_blocks(data: bytes) -> bytes:
    """A and B collide as first blocks; everything else is sha256."""
    digest = hashlib.sha256(data).digest()
    first_of = {
        hashlib.sha256(hashlib.sha256(b"root").digest() + struct.pack("4I", *x)).digest() for x in (A, B)
    }
    return b"collision" if digest in first_of else digest


def test_what_follows_a_colliding_block_is_not_found_behind_the_other_one() -> None:
    """C after B has the digest of C after A: it holds keys that depend on B."""
    cache = PrefixCache(SIZE, colliding_first_blocks)
    publish(cache, A, [11])
    publish(cache, B + C, [21, 22])
    assert found(cache, A + C) == [11]


def test_what_followed_an_evicted_block_is_not_found_behind_its_collision() -> None:
    cache = PrefixCache(SIZE, colliding_first_blocks)
    publish(cache, A + C, [11, 12])
    cache.forget(11)  # its tail stays, as it may where another row shares it
    publish(cache, B, [21])
    assert found(cache, B + C) == [21]


def test_a_prefix_computed_anew_does_not_inherit_what_hung_below_the_old_one() -> None:
    """Such a block holds the right keys, but nothing that we keep proves it."""
    cache = PrefixCache(SIZE)
    publish(cache, A + B, [11, 12])
    cache.forget(11)
    publish(cache, A, [21])
    assert found(cache, A + B) == [21]


@pytest.mark.parametrize(
    ("sampling", "limit"),
    [
        (Sampling(), 7),  # the last token is always computed
        (Sampling(prompt_logprobs=0), 0),
        (Sampling(score_from=5), 4),  # position 4 is computed: its logits score token 5
        (Sampling(score_from=1), 0),
        (Sampling(score_from=5, prompt_logprobs=2), 4),
    ],
)
def test_tokens_whose_logits_are_needed_are_never_taken_from_the_cache(
    sampling: Sampling, limit: int
) -> None:
    assert reusable(Request("r", A + B, sampling)) == limit
