"""The form in which a setting is told of, and the providers by name. Knows no setting."""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

ProviderName = Literal["native", "vllm", "ollama", "openai", "anthropic", "cloud"]

EVERY = frozenset(get_args(ProviderName))
NATIVE = frozenset({"native"})
VLLM = frozenset({"vllm"})
OLLAMA = frozenset({"ollama"})
OPENAI = frozenset({"openai"})
ANTHROPIC = frozenset({"anthropic"})
CLOUD = frozenset({"cloud"})
ENGINES = NATIVE | VLLM
LOCAL = ENGINES | OLLAMA
PAID = OPENAI | ANTHROPIC | CLOUD
OVER_HTTP = EVERY - NATIVE


class About(msgspec.Struct, frozen=True):
    """One setting in words. `read_by` is the part that acts on it, `on` the providers it can act on.

    `told_on` are those of them whose server has such a setting of its own: the knobs say how it is told, and nothing
    here tells it.
    `shared` is what other programs read too, so that our child processes keep it.
    `variable` is AUTOBOT_ and the field's name unless it is given.
    """

    doc: str
    read_by: str
    on: frozenset[str] = EVERY
    told_on: frozenset[str] = frozenset()
    secret: bool = False
    shared: bool = False
    variable: str = ""
    alias: str | None = None


def proxy(doc: str, *, variable: str, secret: bool = False) -> About:
    """A setting that other programs share, so that it may be written in lower case too."""
    alias = variable.lower()
    return About(doc, "transport/proxy", OVER_HTTP, secret=secret, shared=True, variable=variable, alias=alias)
