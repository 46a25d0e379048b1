"""The phrases of phrases.toml, and the words that rules must know. Data only."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def words(text: str) -> frozenset[str]:
    """The words of a list that is written as text."""
    return frozenset(text.split())


_READ: Mapping[str, Any] = tomllib.loads(Path(__file__).with_name("phrases.toml").read_text(encoding="utf-8"))
FILLERS: tuple[str, ...] = tuple(_READ["fillers"])
GREETINGS: tuple[str, ...] = tuple(_READ["greetings"])
CLOSINGS: tuple[str, ...] = tuple(_READ["closings"])
OPENINGS: Mapping[str, str] = _READ["openings"]
WORDY: Mapping[str, str] = _READ["wordy"]
REDUNDANT: Mapping[str, str] = _READ["redundant"]

# What "ensure" stands before once "make sure to" has become it; "ensure quality" is not among them.
BARE_VERBS = words(
    "add answer ask avoid be check cite describe do end explain follow give have include keep list make mention name "
    "number provide return review say set show start state tell test use verify write"
)

# Words that turn a sentence round. No rule may remove one, or add one.
NEGATIONS = words(
    "not no never none nor neither nobody nothing nowhere cannot without unless except only hardly barely"
)
