"""GPUs by name: how much memory, which arithmetic. Facts only, from the makers' data sheets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from autobot_llm.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Card:
    """`memory_gib` is the data sheet's; drivers show a per cent less, which a planner's reserve covers.

    `capability` is CUDA's compute capability.
    """

    name: str
    memory_gib: float
    capability: tuple[int, int]

    @property
    def has_fp8(self) -> bool:
        return self.capability >= (8, 9)

    @property
    def is_blackwell(self) -> bool:
        return self.capability >= (10, 0)


CARDS: Mapping[str, Card] = {
    name.lower(): Card(name, memory, capability)
    for name, memory, capability in (
        ("T4", 16, (7, 5)),
        ("V100-16", 16, (7, 0)),
        ("V100-32", 32, (7, 0)),
        ("A10", 24, (8, 6)),
        ("A100-40", 40, (8, 0)),
        ("A100-80", 80, (8, 0)),
        ("A6000", 48, (8, 6)),
        ("L4", 24, (8, 9)),
        ("L40S", 48, (8, 9)),
        ("H100", 80, (9, 0)),
        ("H200", 141, (9, 0)),
        ("B200", 180, (10, 0)),
        ("RTX3060", 12, (8, 6)),
        ("RTX3070", 8, (8, 6)),
        ("RTX3080", 10, (8, 6)),
        ("RTX3090", 24, (8, 6)),
        ("RTX4060", 8, (8, 9)),
        ("RTX4070", 12, (8, 9)),
        ("RTX4080", 16, (8, 9)),
        ("RTX4090", 24, (8, 9)),
        ("RTX5070", 12, (12, 0)),
        ("RTX5080", 16, (12, 0)),
        ("RTX5090", 32, (12, 0)),
        ("RTX6000Ada", 48, (8, 9)),
    )
}


def card_named(name: str) -> Card:
    """The card, however its name is spelt: "RTX 4090", "rtx-4090" and "4090" are one. Raises ConfigurationError."""
    wanted = re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("nvidia").removeprefix("geforce")
    for key, card in CARDS.items():
        plain = re.sub(r"[^a-z0-9]", "", key)
        if wanted in (plain, plain.removeprefix("rtx"), f"{plain}gb"):
            return card
    known = ", ".join(card.name for card in CARDS.values())
    raise ConfigurationError(f"--gpu {name!r}: expected {known}, or --gpu-memory")
