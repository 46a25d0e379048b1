"""What makes drafts. Knows sequences of tokens; knows nothing of who else is in the batch, of costs or of verification.

A method is a class with these few verbs. The speculator (speculator.py) asks the controller whose drafts are worth
their time, sets `Sequence.draft_ids` and `draft_parents`, and the engine verifies them whatever they are.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from autobot_llm.engine.batching import draft_tree
from autobot_llm.engine.executor import FeatureKinds, Features
from autobot_llm.engine.sequence import Sequence


@dataclass(slots=True)  # not frozen: that would double what it takes to make one, for each sequence at each step
class Draft:
    """Tokens that may follow a sequence: a line, or a tree.

    `kind` tells drafts of one free method apart whose chances differ: the controller keeps their acceptance apart.

    `parents` None is a line. Of a tree they say which token each follows (draft_tree.py): its index in the draft, -1
    for the sequence's last token. Parents come before their children, those that follow one token are all different,
    and the first path is the best guess: it is all that an executor gets which knows no trees. Where a step has no room
    for all of a draft, it takes the first tokens.
    """

    token_ids: list[int]
    kind: str = ""
    parents: list[int] | None = None

    def __post_init__(self) -> None:
        if self.parents is not None:
            assert len(self.parents) == len(self.token_ids), "each token of a tree has a parent"
            assert draft_tree.is_tree(self.parents), "parents come before their children"

    def first(self, num_tokens: int) -> Draft:
        """A draft of the first tokens."""
        parents = None if self.parents is None else self.parents[:num_tokens]
        return Draft(self.token_ids[:num_tokens], self.kind, parents)

    def only(self, kept: SequenceABC[int]) -> Draft:
        """A tree of these tokens, given by rising indices, each with its parent."""
        assert self.parents is not None, "a line is cut by `first`"
        if len(kept) == len(self.token_ids):
            return self
        return Draft([self.token_ids[i] for i in kept], self.kind, draft_tree.renumbered(self.parents, kept))

    def as_line(self) -> Draft:
        """The first path of a tree; a line as it is."""
        if self.parents is None:
            return self
        return Draft([self.token_ids[i] for i in draft_tree.first_path(self.parents)], self.kind)


class FreeProposer(Protocol):
    """A method that drafts for next to nothing, so every sequence is asked at every step, and its guesses are compared
    with what came even where they were not verified."""

    name: str

    def read(self, sequence: Sequence, num_tokens: int) -> None:
        """Take in the first tokens of a sequence that has more, ahead of its first draft: no effect but on its time."""
        ...

    def propose(self, sequence: Sequence, num_tokens: int) -> Draft | None:
        """At most that many tokens after the last one that is known; None where it has no idea."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept for a sequence that has left; no effect where nothing is."""
        ...


class Computed(NamedTuple):
    """What a step settled of one sequence: its tokens from index `start` on are computed and stand, and its token ids
    go one further: more only while a later step is under way.

    `token_rows` are their rows in the features of every token, in order. `logit_row` is the row of the logits that its
    last token was chosen from, in the features of those rows; None: the step computed a part of a prompt and chose
    nothing.
    """

    sequence: Sequence
    start: int
    token_rows: list[int]
    logit_row: int | None


class CostlyProposer(Protocol):
    """A method that has a model to run."""

    name: str
    wanted: FeatureKinds | None
    """What the target's steps are to keep for `observe`; None: nothing, and it is not called."""

    def observe(self, computed: SequenceABC[Computed], features: Features) -> None:
        """Take in what a step of the target made of the sequences that go on after it. What comes from the prefix
        cache is never computed, so it is never seen here."""
        ...

    def lag(self, sequence: Sequence) -> int:
        """How many tokens it has to catch up with before it can draft for a sequence, whose last one may not be known
        yet: at least 1."""
        ...

    def propose(self, sequences: SequenceABC[Sequence], num_tokens: int) -> list[Draft | None]:
        """A draft for each, at most that many tokens deep; None where it has no room for a sequence now."""
        ...

    def num_passes(self, num_tokens: int) -> int:
        """How often its model runs for drafts so deep: what a draft costs is measured by the pass."""
        ...

    def forget(self, sequence: Sequence) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class ReadingProposer(CostlyProposer, Protocol):
    """A method that can take in prompts while a device computes them: else they are waited for with the first draft.
    In a step of more than `most_read` sequences they are left for later: most of a crowd is never drafted for."""

    most_read: int

    def take_in(self, computed: SequenceABC[Computed], features: Features) -> None:
        """Observe parts of prompts that a step under way computes, all of whose next tokens are known, and queue what
        drafts after them need, where there is room. `observe` may be told of them again."""
        ...


class LaunchedDrafts(NamedTuple):
    """Drafts that a device computes: `rows` say for each sequence where a step finds the tokens (Sequence.draft_rows).
    `wait`, called once, gives the drafts, and the seconds that they took the device."""

    rows: list[list[int]]
    wait: Callable[[], tuple[list[Draft | None], float]]


@runtime_checkable
class LaunchingProposer(CostlyProposer, Protocol):
    """A method whose drafts may be verified before anybody but the device knows them."""

    def launch(self, sequences: SequenceABC[Sequence], num_tokens: int) -> LaunchedDrafts | None:
        """What `propose` would draft, queued: lines of so many tokens each. None: not now, for all of them; ask
        `propose`. The drafts are waited for before anything else is asked of it, but to `forget` and what follows."""
        ...

    def launch_behind(self, sequences: SequenceABC[Sequence], num_tokens: int, first_rows: list[int]) -> bool:
        """Queue drafts for after the target's step that was launched last, which verifies all of those that were
        launched before: `first_rows` are its rows of the choices after the sequences' last known tokens. `launch` gives
        them out if it is asked for no more and for the same sequences; else they are forgotten. False: it cannot."""
        ...

    def drop_behind(self) -> None:
        """Forget those: the step after that verdict has no drafts of this method."""
        ...
