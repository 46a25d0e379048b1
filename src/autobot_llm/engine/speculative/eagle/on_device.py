"""What passes between the proposer of EAGLE-3's trees and the device that grows them. Knows arrays of tokens, places
and rows; computes nothing, and knows nothing of sequences.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from typing import NamedTuple, Protocol

import torch

from autobot_llm.engine.batching.plan import Int32Array
from autobot_llm.engine.sequence import SamplingParams


# T tokens, F three times the target's hidden size, S sequences, B blocks of the longest
class Streams(NamedTuple):
    """Rows of a step's features: the target's three streams side by side, where they were computed."""

    streams_TF: torch.Tensor
    rows: SequenceABC[int]


class Taken(NamedTuple):
    """Tokens that the layer takes in, each with the target's features of the position before it: the target's ids,
    where they stand and which slots of the cache they go to."""

    streams: list[Streams]
    ids_T: Int32Array
    positions_T: Int32Array
    slots_T: Int32Array


class Roots(NamedTuple):
    """Where trees begin: the last token of each sequence among those that are taken in with them, and its cache with
    that token. The table has blocks for `EagleDevice.num_tree_rows` more. `draws`: how the target chooses, and the
    index in its sequence of what it will choose first."""

    last_rows_S: Int32Array
    context_lens_S: Int32Array
    block_tables_SB: Int32Array
    draws: SequenceABC[tuple[SamplingParams, int]]


class Tree(NamedTuple):
    """The most probable nodes that were found, without the root: the target's ids, the parents as of Draft, and the
    logarithms of the chances that the whole path is right."""

    tokens: list[int]
    parents: list[int]
    log_chances: list[float]


class EagleDevice(Protocol):
    """Passes of the draft's layer on the stream that computes the target's features."""

    max_tokens: int
    """Tokens that are taken in at a time."""
    max_sequences: int
    """Trees that grow at a time."""
    max_depth: int

    def most_root_rows(self, num_sequences: int) -> int:
        """Tokens of each sequence that are taken in with its root, where so many trees grow."""
        ...

    def num_tree_rows(self, depth: int) -> int:
        """Rows behind its own that a sequence's tree of so many levels takes in the cache."""
        ...

    def keep(self, streams: list[Streams]) -> torch.Tensor:
        """These rows alone, one after the other in a tensor of their own; queued behind what computes them."""
        ...

    def take_in(self, taken: Taken) -> None:
        """Write the keys and values of tokens that are no roots; queued."""
        ...

    def grow(self, taken: Taken, roots: Roots, depth: int, num_nodes: int) -> list[Tree]:
        """Take the last tokens in, grow so many levels, and wait for the best nodes of each sequence."""
        ...

    def close(self) -> None: ...
