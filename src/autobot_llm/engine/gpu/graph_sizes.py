"""Which steps are captured as CUDA graphs, by their size. Knows numbers; knows no torch."""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise

DECODE_SIZES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 160, 192, 224, 256)
"""Numbers of sequences with a graph of their own; others are padded to the next."""

LONG_SIZES = (4, 8, 16, 32, 64)
LONG_CONTEXT = 4096
"""These numbers of sequences have a second graph, for contexts of so many tokens on average: the tile that reads short
ones best takes a quarter longer for 16,384."""

PROMPT_SIZES = (16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
"""Numbers of tokens in a step with prompts that has a graph: up to there, it takes about as long to launch as to
compute."""

MAX_PROMPTS = 64
"""Sequences of such a step at most, those that decode included."""

CROWD_SIZES = (192, 256, 384, 512, 640, 768, 1024)
"""Numbers of tokens of a step with prompts beside more sequences than that, as many as there may be. It has a graph of
its own, because its block tables and logits would be a burden for a single prompt."""

MAX_ROWS = 128
"""Tokens of such a step up to which it may want the logits of all of them, to verify drafts."""

CHAIN_SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of sequences with graphs for the passes of a draft, one for each number of passes: every draft that a step
has room to verify is one launch."""

LONGEST_CHAIN = 15
"""Passes of such a graph at most."""

BYTES_PER_GRAPH = 16 * 2**20
"""What a captured graph of some hundred kernels holds beside the tensors, which all of them share: measured on an H200,
docs/log.md."""

BYTES_PER_CHAIN = 10 * 2**20
"""The same for a chain of a draft's passes, of two layers and three passes on average."""


def padded_size(num_sequences: int, sizes: tuple[int, ...] = DECODE_SIZES) -> int | None:
    """The smallest of the sizes, which ascend, that holds so many sequences; None where there is none."""
    place = bisect_left(sizes, num_sequences)
    return sizes[place] if place < len(sizes) else None


def decode_graph_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """The sizes to capture for so many sequences at most: the last one holds them all, up to the largest size."""
    last = padded_size(max_num_seqs) or DECODE_SIZES[-1]
    return tuple(size for size in DECODE_SIZES if size <= last)


def long_graph_sizes(max_num_seqs: int, max_model_len: int) -> tuple[int, ...]:
    """Of these, the ones with a second graph for long contexts."""
    if max_model_len < LONG_CONTEXT:
        return ()
    return tuple(size for size in decode_graph_sizes(max_num_seqs) if size in LONG_SIZES)


def prompt_graph_sizes(max_num_batched_tokens: int) -> tuple[int, ...]:
    """The numbers of tokens to capture a step with prompts for."""
    return tuple(size for size in PROMPT_SIZES if size <= max_num_batched_tokens)


def crowd_graph_sizes(max_num_batched_tokens: int, max_num_seqs: int) -> tuple[int, ...]:
    """The same for those with more than MAX_PROMPTS sequences."""
    if max_num_seqs <= MAX_PROMPTS:
        return ()
    return tuple(size for size in CROWD_SIZES if size <= max_num_batched_tokens)


def chain_sizes(max_num_seqs: int, longest: int) -> dict[int, int]:
    """The numbers of sequences to capture a draft's passes for, and the most passes: a step has MAX_ROWS rows for the
    drafts of the fewest sequences that are padded to a size."""
    last = padded_size(max_num_seqs, CHAIN_SIZES) or CHAIN_SIZES[-1]
    pairs = pairwise((0, *(size for size in CHAIN_SIZES if size <= last)))
    lengths = {size: min(longest, LONGEST_CHAIN, MAX_ROWS // (before + 1) - 1) for before, size in pairs}
    return {size: length for size, length in lengths.items() if length > 0}


def most_chain_rows() -> int:
    """Tokens of the largest chain, padding included."""
    return max(size * length for size, length in chain_sizes(CHAIN_SIZES[-1], LONGEST_CHAIN).items())


def tree_graph_sizes(max_num_batched_tokens: int) -> tuple[int, ...]:
    """The same for steps in which drafts are trees: the logits of all their tokens are wanted."""
    return prompt_graph_sizes(min(max_num_batched_tokens, MAX_ROWS))
