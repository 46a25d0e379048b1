"""Tables, figures and a section's time. Knows how results are shown and kept; knows nothing of engines."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Table:
    """Rows under a title, with notes below. A cell is text, a number, or None for what could not be measured."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[object, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *cells: object) -> None:
        if len(cells) != len(self.columns):
            raise ValueError(f"{self.title!r}: {len(cells)} cells for the {len(self.columns)} columns {self.columns}")
        self.rows.append(cells)

    def render(self) -> str:
        """Plain text; the first column is aligned left, the others right."""
        lines = [list(self.columns), *([as_text(cell) for cell in row] for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        aligned = (
            "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zipped)).rstrip()
            for zipped in (list(zip(line, widths, strict=True)) for line in lines)
        )
        return "\n".join([self.title, *aligned, *(f"({note})" for note in self.notes)])


def as_text(cell: object) -> str:
    """A cell as it is shown: floats with three significant digits or so, "-" for None."""
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "NO"
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}" if abs(cell) < 1 else f"{cell:.2f}"
    return str(cell)


@dataclass(slots=True)
class Report:
    """What a section has found so far: tables to read, figures for the JSON line. Filled row by row, so that a section
    that fails leaves what it had."""

    tables: list[Table] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def table(self, title: str, *columns: str) -> Table:
        table = Table(title, columns)
        self.tables.append(table)
        return table


class Clock:
    """The time a section may take, in seconds. Everything is measured once; repeats stop when time runs out."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._start = now()
        self.seconds = seconds

    @property
    def elapsed(self) -> float:
        return self._now() - self._start

    def repeat(self, measure: Callable[[], Any], times: int, *, until: float = 1.0) -> list[Any]:
        """Results of at most `times` calls, and at least one; none begins that would pass `until` (share of the time).

        Giving each row its own `until` keeps the first from using up the time of all.
        """
        results: list[Any] = []
        longest = 0.0
        while len(results) < times:
            start = self.elapsed
            if results and start + longest > until * self.seconds:
                break
            results.append(measure())
            longest = max(longest, self.elapsed - start)
        return results


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    """p50 and p95 (nearest rank) of at least one value."""
    ordered = sorted(values)
    return statistics.median(ordered), ordered[max(0, -(-95 * len(ordered) // 100) - 1)]
