"""Options that stand for settings. Knows which were given; knows nothing of their values."""

from __future__ import annotations


def given(**overrides: object) -> dict[str, object]:
    """The settings that the command line names: an option that was left out overrides nothing."""
    return {name: value for name, value in overrides.items() if value is not None}
