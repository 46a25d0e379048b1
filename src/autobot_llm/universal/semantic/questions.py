"""The kept questions, by what they mean. Knows partitions, meanings and the clock of their use; judges nothing.

What is kept is a question, its answer's key in the response cache, and its vector once that was needed. The answers
themselves stay where they are, so that they expire, and are cleared, like all others.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

from autobot_llm.universal.semantic.meaning import Meaning

MAX_PARTITIONS = 1000  # conversations, settings, tenants
MAX_MEANINGS = 1000  # of a partition
MAX_ALIKE = 32  # questions of one meaning
MAX_QUESTIONS = 10_000  # together


@dataclass(frozen=True, slots=True)
class Vector:
    """A vector of length 1, and what made it: those of two models cannot be compared."""

    maker: tuple[str, str, int]
    numbers: tuple[float, ...]

    @classmethod
    def of(cls, numbers: Sequence[float], *, provider: str, model: str) -> Vector | None:
        """None for one without a direction."""
        length = math.sqrt(sum(map(mul, numbers, numbers)))
        if not math.isfinite(length) or length == 0.0:
            return None
        return cls((provider, model, len(numbers)), tuple(number / length for number in numbers))

    def similarity(self, other: Vector) -> float | None:
        """The cosine of the angle between them; None where another model made the other."""
        if self.maker != other.maker:
            return None
        cosine: float = sum(map(mul, self.numbers, other.numbers))
        return min(1.0, cosine)


@dataclass(slots=True)
class Question:
    """The text of a last turn, and the key of its answer."""

    text: str
    answer: bytes
    vector: Vector | None = None


class Questions:
    """Bounded in all directions. The least recently used go first: a partition's meanings, and then partitions."""

    def __init__(
        self,
        *,
        max_partitions: int = MAX_PARTITIONS,
        max_meanings: int = MAX_MEANINGS,
        max_questions: int = MAX_QUESTIONS,
    ) -> None:
        self._partitions: OrderedDict[bytes, OrderedDict[Meaning, list[Question]]] = OrderedDict()
        self._max_partitions = max_partitions
        self._max_meanings = max_meanings
        self._max_questions = max_questions
        self.num_questions = 0

    def alike(self, partition: bytes, meaning: Meaning) -> list[Question]:
        """The questions kept there that mean this, the latest last."""
        meanings = self._partitions.get(partition)
        if meanings is None or meaning not in meanings:
            return []
        self._partitions.move_to_end(partition)
        meanings.move_to_end(meaning)
        return list(meanings[meaning])

    def keep(self, partition: bytes, meaning: Meaning, question: Question) -> None:
        """Keep `question`, in the place of one with the same text."""
        meanings = self._partitions.setdefault(partition, OrderedDict())
        self._partitions.move_to_end(partition)
        alike = meanings.setdefault(meaning, [])
        meanings.move_to_end(meaning)
        for place, one in enumerate(alike):
            if one.text == question.text:
                alike[place] = question
                return
        alike.append(question)
        self.num_questions += 1
        if len(alike) > MAX_ALIKE:
            del alike[0]
            self.num_questions -= 1
        if len(meanings) > self._max_meanings:
            self._drop_oldest(meanings)
        while len(self._partitions) > self._max_partitions or self.num_questions > self._max_questions:
            oldest = next(iter(self._partitions))
            self._drop_oldest(self._partitions[oldest])
            if not self._partitions[oldest]:
                del self._partitions[oldest]

    def drop(self, partition: bytes, meaning: Meaning, question: Question) -> None:
        """Forget a question whose answer is gone."""
        meanings = self._partitions.get(partition)
        alike = meanings.get(meaning) if meanings is not None else None
        if alike is not None and question in alike:
            alike.remove(question)
            self.num_questions -= 1

    def clear(self) -> None:
        self._partitions.clear()
        self.num_questions = 0

    def _drop_oldest(self, meanings: OrderedDict[Meaning, list[Question]]) -> None:
        _, alike = meanings.popitem(last=False)
        self.num_questions -= len(alike)
