"""Hand out the blocks of the paged KV cache and find prefixes already in it. Knows blocks, token ids and reference
counts; knows nothing of tensors, sequences or schedules.

A block is *in use* (somebody holds a reference) or *free*. A free block that was published keeps its content, and a
later sequence with the same prefix takes it back; allocation overwrites the least recently used one last of all.

Published blocks form chains, and a chain is trusted by identity, never by hash: a lookup finds a candidate by its
key, then checks its salt, its token ids, and that its parent is the very entry the walk came from. So a collision
costs a miss and cannot return another prefix's block. An entry whose parent was overwritten can no longer be
reached; whoever publishes the same prefix next replaces it.

A *pinned* prefix stays: the pool itself holds a reference on each of its blocks, until it is unpinned, or forgotten
because its content is suspect.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from random import Random

from autobot_llm.engine.kv_cache.policy import BLOCK_SIZE
from autobot_llm.errors import ConfigurationError

_NOWHERE = -1


def blake2b_key(parent_key: bytes, content: bytes) -> bytes:
    """128-bit key of a block, from its parent's key and its own token ids."""
    return blake2b(parent_key + content, digest_size=16).digest()


class PrefixBlock:
    """One full block of a known prefix: which tokens, after which parent, and where it is stored.

    `block_id` holds its keys and values. An entry that is not in the pool's index (overwritten, or published after
    its parent was) has none, and `is_live` is false.
    """

    __slots__ = ("block_id", "key", "parent", "salt", "tokens")

    def __init__(self, key: bytes, parent: PrefixBlock | None, salt: str, tokens: bytes) -> None:
        self.key = key
        self.parent = parent
        self.salt = salt
        self.tokens = tokens
        self.block_id = _NOWHERE

    @property
    def is_live(self) -> bool:
        return self.block_id != _NOWHERE

    def continues(self, parent: PrefixBlock | None, salt: str, tokens: bytes) -> bool:
        """Whether this entry is the block of these tokens after this parent, for this tenant."""
        return self.parent is parent and self.tokens == tokens and self.salt == salt


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens each. Every operation costs O(1) per block it names.

    `num_query_tokens` and `num_hit_tokens` count prompt tokens looked up and found, as told to `count_lookup`.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int = BLOCK_SIZE,
        *,
        prefix_caching: bool = True,
        scattered: bool = False,
        hash_block: Callable[[bytes, bytes], bytes] = blake2b_key,
    ) -> None:
        if num_blocks < 1:
            raise ConfigurationError(f"num_blocks={num_blocks}: expected at least 1")
        if block_size < 1:
            raise ConfigurationError(f"block_size={block_size}: expected at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.num_hit_tokens = 0
        self.num_query_tokens = 0
        self._hash_block = hash_block
        self._num_references = [0] * num_blocks
        # Free blocks. Blank ones are taken first, in order, so that a lone sequence's blocks lie in a row, which spares
        # attention on a CPU a gather; then those with a prefix worth keeping, by last use. A GPU wants them scattered:
        # parts of long contexts that start at regular distances would queue for the same channels of its memory.
        order = range(num_blocks)
        self._blank: OrderedDict[int, None] = OrderedDict.fromkeys(
            Random(0).sample(order, num_blocks) if scattered else order
        )
        self._reusable: OrderedDict[int, None] = OrderedDict()
        self._index: dict[bytes, PrefixBlock] = {}
        self._entry_of: list[PrefixBlock | None] = [None] * num_blocks
        self._num_pins: dict[int, int] = {}  # by block; the pool holds one reference however many prefixes share it

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out, those with a reusable prefix included."""
        return len(self._blank) + len(self._reusable)

    @property
    def num_pinned(self) -> int:
        """Blocks that stay where they are because a pinned prefix needs them."""
        return len(self._num_pins)

    @property
    def hit_rate(self) -> float:
        """Share of the looked-up prompt tokens that were found, 0 to 1."""
        return self.num_hit_tokens / self.num_query_tokens if self.num_query_tokens else 0.0

    def num_references(self, block_id: int) -> int:
        return self._num_references[block_id]

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Take blocks to write to, one reference each; None, and nothing taken, where fewer are free."""
        if num_blocks > self.num_free:
            return None
        block_ids = []
        for _ in range(num_blocks):
            if not self._blank:
                self._unpublish(next(iter(self._reusable)))
            block_id, _nothing = self._blank.popitem(last=False)
            self._num_references[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def free(self, block_ids: Sequence[int]) -> None:
        """Give back one reference on each block of a sequence, listed from its first block to its last.

        The last ones become the first to be overwritten: a prefix without its tail is useful, a tail without its
        prefix is not.
        """
        for block_id in reversed(block_ids):
            count = self._num_references[block_id] - 1
            assert count >= 0, f"block {block_id} was freed more often than it was taken"
            self._num_references[block_id] = count
            if count == 0:
                free = self._blank if self._entry_of[block_id] is None else self._reusable
                free[block_id] = None

    def match(self, token_ids: Sequence[int], salt: str, max_tokens: int) -> list[PrefixBlock]:
        """Find the longest published prefix of at most `max_tokens` tokens and take a reference on each block of it.

        Only entries published under the same salt are found. The caller frees the blocks like allocated ones; they
        are full and shared, and must not be written to.
        """
        found: list[PrefixBlock] = []
        if not self.prefix_caching:
            return found
        parent: PrefixBlock | None = None
        packed, size = _pack(token_ids[:max_tokens]), self.block_size * _BYTES_PER_TOKEN
        for start in range(0, len(packed) - size + 1, size):
            tokens = packed[start : start + size]
            entry = self._index.get(self._key(parent, salt, tokens))
            if entry is None or not entry.continues(parent, salt, tokens):
                break
            found.append(entry)
            parent = entry
        self._take(found)
        return found

    def publish(self, block_id: int, token_ids: Sequence[int], parent: PrefixBlock | None, salt: str) -> PrefixBlock:
        """Make a full, computed block in use findable by later sequences; returns its entry, the next one's parent.

        `token_ids` are the block's own; `parent` is the entry of the sequence's previous block (None for its first).
        Where the same prefix is published already, that entry is returned and `block_id` stays private.
        """
        assert self._num_references[block_id] > 0, f"block {block_id} is free"
        assert len(token_ids) == self.block_size, f"{len(token_ids)} tokens are not a full block"
        tokens = _pack(token_ids)
        key = self._key(parent, salt, tokens)
        incumbent = self._index.get(key)
        if incumbent is not None and incumbent.continues(parent, salt, tokens):
            return incumbent
        entry = PrefixBlock(key, parent, salt, tokens)
        if parent is not None and not parent.is_live:
            return entry  # no walk from the root can reach it
        if incumbent is not None:  # a collision, or a leftover that lost its parent
            self._unpublish(incumbent.block_id)
        assert self._entry_of[block_id] is None, f"block {block_id} was published already"
        entry.block_id = block_id
        self._entry_of[block_id] = entry
        self._index[key] = entry
        return entry

    def pin(self, token_ids: Sequence[int], salt: str) -> list[PrefixBlock]:
        """Keep the longest published prefix from being overwritten; returns its entries, which `unpin` takes.

        How much may be pinned is the caller's to decide: pinned blocks are missing to everybody else.
        """
        entries = self.match(token_ids, salt, len(token_ids))
        for entry in entries:
            count = self._num_pins.get(entry.block_id, 0)
            self._num_pins[entry.block_id] = count + 1
            if count:
                self.free([entry.block_id])
        return entries

    def unpin(self, entries: Sequence[PrefixBlock]) -> None:
        """Let a pinned prefix be overwritten again, from its end; entries that were forgotten meanwhile are skipped."""
        for entry in reversed(entries):
            if entry.block_id in self._num_pins:
                self._num_pins[entry.block_id] -= 1
                if self._num_pins[entry.block_id] == 0:
                    self._drop_pins(entry.block_id)

    def count_lookup(self, num_query_tokens: int, num_hit_tokens: int) -> None:
        """Record one admitted prompt for `hit_rate`; a lookup repeated for the same prompt is not counted again."""
        self.num_query_tokens += num_query_tokens
        self.num_hit_tokens += num_hit_tokens

    def reset(self) -> None:
        """Forget every published prefix, pinned ones too. Blocks in use stay with their holders, as private ones."""
        for entry in list(self._index.values()):
            self._unpublish(entry.block_id)

    def _take(self, entries: Iterable[PrefixBlock]) -> None:
        for entry in entries:
            if self._num_references[entry.block_id] == 0:
                del self._reusable[entry.block_id]
            self._num_references[entry.block_id] += 1

    def _key(self, parent: PrefixBlock | None, salt: str, tokens: bytes) -> bytes:
        parent_key = self._hash_block(b"", salt.encode()) if parent is None else parent.key
        return self._hash_block(parent_key, tokens)

    def _unpublish(self, block_id: int) -> None:
        entry = self._entry_of[block_id]
        assert entry is not None
        del self._index[entry.key]
        entry.block_id = _NOWHERE
        self._entry_of[block_id] = None
        if block_id in self._reusable:
            del self._reusable[block_id]
            self._blank[block_id] = None
        elif block_id in self._num_pins:
            self._drop_pins(block_id)

    def _drop_pins(self, block_id: int) -> None:
        del self._num_pins[block_id]
        self.free([block_id])


_BYTES_PER_TOKEN = array("q").itemsize


def _pack(token_ids: Sequence[int]) -> bytes:
    return array("q", token_ids).tobytes()
