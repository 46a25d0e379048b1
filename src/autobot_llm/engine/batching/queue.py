"""Who waits, and in which order. Knows sequences, their priorities and their leaders; knows nothing of blocks.

Within one priority it is first come, first served; a sequence that was running before goes to the head. A follower
(another choice of one request) stands aside until its leader's prompt is computed, and then takes the leader's place.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict

from autobot_llm.engine.sequence import Sequence


class WaitingQueue:
    """The sequences that are not running. Every operation costs O(1) per sequence it names, and in the number of
    different priorities that wait. `heeds_priority` false: all priorities count as one."""

    def __init__(self, *, heeds_priority: bool) -> None:
        self.heeds_priority = heeds_priority
        self._levels: dict[int, OrderedDict[int, Sequence]] = {}
        self._order: list[int] = []  # the levels with somebody in them, soonest first
        self._followers: dict[int, OrderedDict[int, Sequence]] = {}  # by their leader's id
        self._num_followers = 0

    def __len__(self) -> int:
        return sum(map(len, list(self._levels.values()))) + self._num_followers

    def __contains__(self, sequence: Sequence) -> bool:
        level = self._levels.get(self.level_of(sequence))
        return (level is not None and sequence.id in level) or self._is_held(sequence)

    @property
    def head(self) -> Sequence | None:
        """The next one to be admitted; None where nobody waits, or followers alone."""
        return next(iter(self._levels[self._order[0]].values())) if self._order else None

    def join(self, running: OrderedDict[int, Sequence], sequence: Sequence) -> None:
        """Put a sequence behind the running ones of its own priority, and before those of lower ones."""
        level = self.level_of(sequence)
        later = [s.id for s in running.values() if self.level_of(s) > level] if self.heeds_priority else ()
        running[sequence.id] = sequence
        for sequence_id in later:
            running.move_to_end(sequence_id)

    def level_of(self, sequence: Sequence) -> int:
        """A sequence's place among the priorities; lower goes sooner."""
        return sequence.priority if self.heeds_priority else 0

    def num_before(self, sequence: Sequence) -> int:
        """How many would go before this sequence if it were pushed now."""
        level = self.level_of(sequence)
        return sum(len(self._levels[other]) for other in self._order if other <= level) + self._num_followers

    def push(self, sequence: Sequence) -> None:
        self._level(sequence)[sequence.id] = sequence

    def push_front(self, sequence: Sequence) -> None:
        """Put a sequence before all others of its priority."""
        level = self._level(sequence)
        level[sequence.id] = sequence
        level.move_to_end(sequence.id, last=False)

    def hold(self, follower: Sequence) -> None:
        """Let a follower stand aside until its leader is `release`d."""
        assert follower.leader is not None
        self._followers.setdefault(follower.leader.id, OrderedDict())[follower.id] = follower
        self._num_followers += 1

    def release(self, leader: Sequence) -> None:
        """Queue the followers where their leader stood: at the head, in their order. No effect where it has none."""
        followers = self._followers.pop(leader.id, None)
        if followers is None:
            return
        self._num_followers -= len(followers)
        for follower in reversed(followers.values()):
            self.push_front(follower)

    def has_followers(self, leader: Sequence) -> bool:
        return leader.id in self._followers

    def remove(self, sequence: Sequence) -> bool:
        """Take a sequence out, wherever it stands; False where it does not wait."""
        key = self.level_of(sequence)
        level = self._levels.get(key)
        if level is not None and level.pop(sequence.id, None) is not None:
            if not level:
                del self._levels[key]
                self._order.remove(key)
            return True
        if not self._is_held(sequence):
            return False
        assert sequence.leader is not None
        del self._followers[sequence.leader.id][sequence.id]
        self._num_followers -= 1
        return True

    def _is_held(self, sequence: Sequence) -> bool:
        return sequence.leader is not None and sequence.id in self._followers.get(sequence.leader.id, ())

    def _level(self, sequence: Sequence) -> OrderedDict[int, Sequence]:
        key = self.level_of(sequence)
        if key not in self._levels:
            self._levels[key] = OrderedDict()
            insort(self._order, key)
        return self._levels[key]
