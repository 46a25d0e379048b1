"""What a method's drafts came to since the start. Knows counts alone."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class MethodFigures:
    """What a method's drafts came to since the start: tokens verified, tokens accepted, drafts, and by position how
    many were looked at and how many were right."""

    num_proposed: int = 0
    num_accepted: int = 0
    num_drafts: int = 0
    tried: list[int] = field(default_factory=list)
    passed: list[int] = field(default_factory=list)

    def record(self, num_proposed: int, depth: int, num_accepted: int) -> None:
        """`depth`: how many of a draft's tokens could have been accepted, which for a line is all of them."""
        self.num_drafts += 1
        self.num_proposed += num_proposed
        self.num_accepted += num_accepted
        missing = depth - len(self.tried)
        if missing > 0:
            self.tried += [0] * missing
            self.passed += [0] * missing
        for position in range(min(depth, num_accepted + 1)):
            self.tried[position] += 1
        for position in range(num_accepted):
            self.passed[position] += 1

    @property
    def by_position(self) -> list[float]:
        """Share of right tokens at each position, among drafts that were right before it."""
        return [passed / tried for passed, tried in zip(self.passed, self.tried, strict=True) if tried]

    def __str__(self) -> str:
        """`83% of 1,204 tokens; by position 90% 80%`."""
        share, by_position = self.num_accepted / max(1, self.num_proposed), map("{:.0%}".format, self.by_position)
        return f"{share:.0%} of {self.num_proposed:,} tokens; by position {' '.join(by_position)}"
