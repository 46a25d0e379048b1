"""What speculation adds to decoding and saves of it, told apart from what else a busy machine does meanwhile.

A plain step is the same with and without speculation, so its seconds say nothing about it, and their noise is larger
than what is looked for. Here it counts as what plain steps without speculation took for as many sequences, on the
average of all answers; only what the speculator does in a plain step, and whole steps with drafts, are measured. All of
it is time of the processor.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from autobot_llm.engine.engine import Engine
from autobot_llm.engine.request import Output
from autobot_llm.engine.speculative.speculator import Speculator

KEPT = 0.95
"""Of plain steps, those that took least: the others met something else."""


class Ledger:
    """Steps of one method: those without drafts by the number of sequences that decode in them, and what it took to
    look for drafts in vain; the seconds of those with drafts."""

    def __init__(self) -> None:
        self.plain: dict[int, list[float]] = defaultdict(list)
        self.drafted_seconds = 0.0
        self.looking_seconds = 0.0

    def step(self, engine: Engine) -> list[Output]:
        """A step of the engine. Of one that computes a prompt only what was looked for in vain is booked."""
        speculator, sequences = engine.speculator, [choice.sequence for choice in engine._choices.values()]
        is_prompt = any(s.num_computed_tokens < s.num_prompt_tokens for s in sequences)
        num_drafted = 0 if speculator is None else speculator.num_steps
        looking = _looking(speculator)
        start = time.process_time()
        outputs = engine.step()
        seconds = time.process_time() - start
        is_drafted = speculator is not None and speculator.num_steps > num_drafted
        if is_drafted and not is_prompt:
            self.drafted_seconds += seconds
        if not is_drafted:
            self.looking_seconds += _looking(speculator) - looking
            if not is_prompt:
                self.plain[len(sequences)].append(seconds)
        return outputs

    def seconds(self, prices: dict[int, float]) -> float:
        plain = sum(prices[number] * len(steps) for number, steps in self.plain.items() if number in prices)
        return plain + self.looking_seconds + self.drafted_seconds


def prices(ledgers: list[Ledger]) -> dict[int, float]:
    """Seconds of plain steps by number of sequences, the mean of all but the longest."""
    found: dict[int, list[float]] = defaultdict(list)
    for ledger in ledgers:
        for number, steps in ledger.plain.items():
            found[number] += steps
    means = {}
    for number, steps in found.items():
        kept = sorted(steps)[: max(1, int(KEPT * len(steps)))]
        means[number] = sum(kept) / len(kept)
    return means


class _Timed:
    """A speculator's method that counts its seconds; those of models that draft among them, but then there are drafts,
    and the step counts whole."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method
        self.seconds = 0.0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        start = time.thread_time()
        found = self._method(*arguments, **named)
        self.seconds += time.thread_time() - start
        return found


def timed(speculator: Speculator | None) -> Speculator | None:
    """The speculator, which counts from now on what it does in steps without drafts."""
    for name in ("propose", "record_plain"):
        if speculator is not None:
            setattr(speculator, name, _Timed(getattr(speculator, name)))
    return speculator


def _looking(speculator: Speculator | None) -> float:
    if speculator is None:
        return 0.0
    methods = (speculator.__dict__.get(name) for name in ("propose", "record_plain"))
    return sum(method.seconds for method in methods if isinstance(method, _Timed))
