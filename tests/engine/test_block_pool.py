"""The block pool: references, reuse of prefixes, the order of overwriting, and what a hash collision may not do."""

from __future__ import annotations

import itertools
import random

import pytest

from autobot_llm.engine.kv_cache.block_pool import BlockPool, PrefixBlock, blake2b_key
from autobot_llm.errors import ConfigurationError

SIZE = 4


def store(pool: BlockPool, token_ids: list[int], salt: str = "") -> list[int]:
    """Allocate, publish and free the full blocks of a prefix, like a sequence that computed it and left."""
    block_ids = pool.allocate(len(token_ids) // SIZE)
    assert block_ids is not None
    publish(pool, block_ids, token_ids, salt)
    pool.free(block_ids)
    return block_ids


def publish(pool: BlockPool, block_ids: list[int], token_ids: list[int], salt: str = "") -> list[PrefixBlock]:
    chain: list[PrefixBlock] = []
    for i, block_id in enumerate(block_ids):
        tokens = token_ids[i * SIZE : (i + 1) * SIZE]
        chain.append(pool.publish(block_id, tokens, chain[-1] if chain else None, salt))
    return chain


def look_up(pool: BlockPool, token_ids: list[int], salt: str = "") -> list[int]:
    """The blocks a prompt would reuse; the references are given back."""
    block_ids = [entry.block_id for entry in pool.match(token_ids, salt, len(token_ids) - 1)]
    pool.free(block_ids)
    return block_ids


def test_more_blocks_than_are_free_takes_nothing() -> None:
    pool = BlockPool(3, SIZE)
    taken = pool.allocate(2)
    assert taken is not None and len(set(taken)) == 2
    assert pool.allocate(2) is None
    assert pool.num_free == 1
    pool.free(taken)
    assert pool.num_free == 3


def test_freeing_a_free_block_is_a_programming_error() -> None:
    pool = BlockPool(2, SIZE)
    taken = pool.allocate(1)
    assert taken is not None
    pool.free(taken)
    with pytest.raises(AssertionError, match="freed more often"):
        pool.free(taken)


@pytest.mark.parametrize(("num_blocks", "block_size", "name"), [(0, 16, "num_blocks=0"), (4, 0, "block_size=0")])
def test_an_impossible_size_is_refused_by_name(num_blocks: int, block_size: int, name: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        BlockPool(num_blocks, block_size)


def test_a_freed_prefix_is_found_again_and_counts_as_free() -> None:
    pool = BlockPool(8, SIZE)
    prompt = list(range(12))
    stored = store(pool, prompt)
    assert pool.num_free == 8
    found = pool.match([*prompt, 99], "", 12)
    assert [entry.block_id for entry in found] == stored
    assert pool.num_free == 5
    assert [pool.num_references(block_id) for block_id in stored] == [1, 1, 1]


def test_at_least_the_tokens_beyond_max_tokens_are_left_to_compute() -> None:
    pool = BlockPool(8, SIZE)
    prompt = list(range(8))
    stored = store(pool, prompt)
    assert look_up(pool, prompt) == stored[:1], "the block with the last token must be computed"
    assert look_up(pool, [*prompt, 8]) == stored


def test_only_the_common_part_of_two_prefixes_is_shared() -> None:
    pool = BlockPool(8, SIZE)
    stored = store(pool, [1, 2, 3, 4, 5, 6, 7, 8])
    assert look_up(pool, [1, 2, 3, 4, 5, 6, 7, 0, 9]) == stored[:1]
    assert look_up(pool, [0, 2, 3, 4, 5, 6, 7, 8, 9]) == [], "a later block never matches without the ones before it"


def test_another_tenant_never_hits() -> None:
    pool = BlockPool(8, SIZE)
    prompt = list(range(8))
    stored = store(pool, prompt, salt="alice")
    assert look_up(pool, [*prompt, 8], salt="bob") == []
    assert look_up(pool, [*prompt, 8], salt="") == []
    assert look_up(pool, [*prompt, 8], salt="alice") == stored


def test_without_prefix_caching_nothing_is_found() -> None:
    pool = BlockPool(8, SIZE, prefix_caching=False)
    store(pool, list(range(8)))
    assert look_up(pool, list(range(9))) == []


def test_the_least_recently_used_prefix_is_overwritten_first_and_from_its_end() -> None:
    pool = BlockPool(6, SIZE)
    old, new = [1] * 12, [2] * 12
    old_blocks, new_blocks = store(pool, old), store(pool, new)
    look_up(pool, [*old, 0])  # a use: now the other one is older
    assert pool.allocate(2) == [new_blocks[2], new_blocks[1]]
    assert look_up(pool, [*new, 0]) == new_blocks[:1]
    assert look_up(pool, [*old, 0]) == old_blocks


def test_blocks_without_content_are_overwritten_before_published_ones() -> None:
    pool = BlockPool(4, SIZE)
    stored = store(pool, [1] * 4)
    private = pool.allocate(3)
    assert private is not None and stored[0] not in private
    pool.free(private)
    assert set(pool.allocate(3) or ()) == set(private)
    assert look_up(pool, [1] * 5) == stored


def test_two_sequences_that_compute_the_same_block_at_once_keep_their_own() -> None:
    pool = BlockPool(4, SIZE)
    first, second = pool.allocate(1), pool.allocate(2)
    assert first is not None and second is not None
    published = pool.publish(first[0], [1, 2, 3, 4], None, "")
    assert pool.publish(second[0], [1, 2, 3, 4], None, "") is published
    tail = pool.publish(second[1], [5, 6, 7, 8], published, "")
    assert look_up(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == [first[0], second[1]]
    pool.free(second)
    assert look_up(pool, [1, 2, 3, 4, 5]) == first, "the private copy's end does not take the published one away"
    pool.free(first)
    assert pool.num_free == 4 and tail.is_live


def test_a_block_after_an_overwritten_parent_is_not_findable_and_does_not_stand_in_the_way() -> None:
    pool = BlockPool(6, SIZE)
    first, second = pool.allocate(1), pool.allocate(2)
    assert first is not None and second is not None
    parent = pool.publish(first[0], [1] * 4, None, "")
    assert pool.publish(second[0], [1] * 4, None, "") is parent
    leftover = pool.publish(second[1], [2] * 4, parent, "")
    pool.free(first)
    rest = pool.allocate(4)  # overwrites the published parent; its child is still in use
    assert rest is not None and [entry.is_live for entry in (parent, leftover)] == [False, True]
    assert look_up(pool, [1] * 4 + [2] * 4 + [3]) == []
    assert not pool.publish(rest[0], [3] * 4, parent, "").is_live, "published after its parent was gone"
    again = publish(pool, rest[1:3], [1] * 4 + [2] * 4)
    assert [entry.is_live for entry in (*again, leftover)] == [True, True, False]
    assert look_up(pool, [1] * 4 + [2] * 4 + [3]) == rest[1:3]


def test_reset_forgets_prefixes_and_leaves_blocks_with_their_holders() -> None:
    pool = BlockPool(4, SIZE)
    store(pool, [1] * 4)
    held = pool.allocate(1)
    assert held is not None
    entry = pool.publish(held[0], [2] * 4, None, "")
    pool.reset()
    assert look_up(pool, [1] * 5) == [] and look_up(pool, [2] * 5) == []
    assert not entry.is_live and pool.num_references(held[0]) == 1
    pool.free(held)
    assert pool.num_free == 4


def test_the_hit_rate_is_the_share_of_the_tokens_looked_up() -> None:
    pool = BlockPool(4, SIZE)
    assert pool.hit_rate == 0.0
    pool.count_lookup(10, 4)
    pool.count_lookup(6, 4)
    assert (pool.num_query_tokens, pool.num_hit_tokens, pool.hit_rate) == (16, 8, 0.5)


def test_keys_chain_their_whole_prefix() -> None:
    parent = blake2b_key(b"root", b"a")
    assert len(parent) == 16
    assert blake2b_key(parent, b"b") != blake2b_key(blake2b_key(b"other", b"a"), b"b")


@pytest.mark.parametrize("num_key_values", [1, 5, 20])
@pytest.mark.parametrize("seed", range(6))
def test_a_hash_collision_never_returns_another_prefixs_block(num_key_values: int, seed: int) -> None:
    """A hash of 1 to 20 different values, few token ids and two tenants: nearly every look-up collides.

    `content` says what was last written to each block, as the cache itself would know.
    """

    def weak(parent_key: bytes, content: bytes) -> bytes:
        return bytes([sum(blake2b_key(parent_key, content)) % num_key_values])

    rng = random.Random(seed)
    pool = BlockPool(12, SIZE, hash_block=weak)
    content: dict[int, tuple[str, list[int]]] = {}
    held: list[list[int]] = []
    num_hits = 0
    for _ in range(600):
        if held and (rng.random() < 0.4 or pool.num_free < 3):
            pool.free(held.pop(rng.randrange(len(held))))
            continue
        salt = rng.choice(["alice", "bob"])
        prompt = [token for _ in range(rng.randint(1, 3)) for token in [rng.randrange(3)] * SIZE] + [9]
        prefix = pool.match(prompt, salt, len(prompt) - 1)
        for depth, entry in enumerate(prefix, 1):
            assert content[entry.block_id] == (salt, prompt[: depth * SIZE])
        num_hits += len(prefix)
        block_ids = [entry.block_id for entry in prefix]
        fresh = pool.allocate(len(prompt) // SIZE - len(prefix))
        if fresh is None:
            pool.free(block_ids)
            continue
        chain = list(prefix)
        for block_id in fresh:
            depth = len(chain) + 1
            content[block_id] = (salt, prompt[: depth * SIZE])
            parent = chain[-1] if chain else None
            chain.append(pool.publish(block_id, prompt[(depth - 1) * SIZE : depth * SIZE], parent, salt))
        held.append(block_ids + fresh)
    assert num_hits > 0
    for block_ids in held:
        pool.free(block_ids)
    assert pool.num_free == 12


def test_a_pinned_prefix_is_overwritten_by_nobody_until_it_is_unpinned() -> None:
    pool = BlockPool(6, SIZE)
    prompt = list(range(8))
    stored = store(pool, prompt)
    pinned = pool.pin([*prompt, 8], "")
    assert ([entry.block_id for entry in pinned], pool.num_pinned, pool.num_free) == (stored, 2, 4)
    assert pool.allocate(5) is None
    rest = pool.allocate(4)
    assert rest is not None and not set(stored) & set(rest)
    assert look_up(pool, [*prompt, 8]) == stored
    pool.unpin(pinned)
    assert (pool.num_pinned, pool.num_free) == (0, 2)
    assert look_up(pool, [*prompt, 8]) == stored, "unpinned is not forgotten"
    assert pool.allocate(2) == stored[::-1], "the end of the prefix goes first"


def test_a_block_of_two_pinned_prefixes_stays_until_both_are_unpinned() -> None:
    pool = BlockPool(6, SIZE)
    store(pool, [1] * 8)
    store(pool, [1] * 4 + [2] * 4)
    first, second = pool.pin([1] * 8, ""), pool.pin([1] * 4 + [2] * 4, "")
    assert first[0] is second[0] and pool.num_pinned == 3
    assert pool.num_references(first[0].block_id) == 1, "the pool holds one reference, however many prefixes there are"
    pool.unpin(first)
    assert (pool.num_pinned, pool.num_free) == (2, 4)
    pool.unpin(second)
    assert (pool.num_pinned, pool.num_free) == (0, 6)


def test_only_what_is_published_for_the_tenant_is_pinned() -> None:
    pool = BlockPool(6, SIZE)
    store(pool, [1] * 4, salt="alice")
    assert pool.pin([1] * 8, "bob") == []
    assert len(pool.pin([1] * 8, "alice")) == pool.num_pinned == 1


def test_reset_drops_pins_and_a_late_unpin_does_no_harm() -> None:
    pool = BlockPool(4, SIZE)
    store(pool, [1] * 4)
    pinned = pool.pin([1] * 4, "")
    (shared,) = pool.match([1] * 4, "", 4)
    block_id = shared.block_id
    pool.reset()
    assert (pool.num_pinned, pool.num_references(block_id), shared.is_live) == (0, 1, False)
    pool.free([block_id])
    assert pool.num_free == 4
    store(pool, [2] * 4)
    others = pool.pin([2] * 4, "")
    pool.unpin(pinned)
    assert pool.num_pinned == len(others) == 1


@pytest.mark.parametrize("num_key_values", [2, 1000])
@pytest.mark.parametrize("seed", range(6))
def test_pins_lose_no_block_and_keep_what_they_pin(num_key_values: int, seed: int) -> None:
    """Prefixes come, are pinned, unpinned and forgotten in any order; with 2 key values nearly all of them collide."""

    def weak(parent_key: bytes, content: bytes) -> bytes:
        return (int.from_bytes(blake2b_key(parent_key, content), "big") % num_key_values).to_bytes(2, "big")

    rng = random.Random(seed)
    pool = BlockPool(12, SIZE, hash_block=weak)
    pinned: list[tuple[list[PrefixBlock], list[int]]] = []
    for _ in range(500):
        prompt = [token for _ in range(rng.randint(1, 3)) for token in [rng.randrange(3)] * SIZE]
        action = rng.random()
        if action < 0.5 and len(prompt) // SIZE <= pool.num_free:
            store(pool, prompt)
        elif action < 0.75 and pool.num_pinned < 6:
            entries = pool.pin(prompt, "")
            pinned.append((entries, [entry.block_id for entry in entries]))
        elif action < 0.98 and pinned:
            entries, _ = pinned.pop(rng.randrange(len(pinned)))
            pool.unpin(entries)
        elif action > 0.99:
            pool.reset()
            assert pool.num_pinned == 0
        live = {entry.block_id for entries, _ in pinned for entry in entries if entry.is_live}
        assert pool.num_pinned == len(live) and pool.num_free == 12 - len(live)
        for entries, block_ids in pinned:
            assert all(entry.block_id == at for entry, at in zip(entries, block_ids, strict=True) if entry.is_live)
    for entries, _ in pinned:
        pool.unpin(entries)
    assert (pool.num_pinned, pool.num_free) == (0, 12)


def test_a_full_cache_takes_only_what_is_not_pinned() -> None:
    pool = BlockPool(12, SIZE)
    store(pool, [1] * 8)
    pinned = pool.pin([1] * 8, "")
    kept = {entry.block_id for entry in pinned}
    for token in range(2, 40):
        assert not kept & set(store(pool, [token] * 12))
    assert [entry.block_id for entry in pinned] == look_up(pool, [1] * 9)


def test_a_scattered_pool_hands_out_every_block_once_and_rarely_neighbours() -> None:
    pool = BlockPool(200, scattered=True)
    block_ids = pool.allocate(200)
    assert block_ids is not None and sorted(block_ids) == list(range(200))
    assert sum(b == a + 1 for a, b in itertools.pairwise(block_ids)) < 10
    assert pool.allocate(1) is None
