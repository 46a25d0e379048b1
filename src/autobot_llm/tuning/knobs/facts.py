"""The shapes of the facts about an engine's knobs. Knows how a fact is written down; knows no engine's facts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec

from autobot_llm.tuning.knobs.versions import ALWAYS, Spans, holds

Knobs = Mapping[str, Any]
Place = Literal["argument", "environment", "option", "setting"]
Shape = Literal["value", "switch", "list", "json"]


class Argument(msgspec.Struct, frozen=True, kw_only=True):
    """Something that an engine accepts, and the releases that do.

    `place` says where: an argument of its command line, a variable of its environment, a field of a request's
    options, or one of our settings. A name with a dot is a key of a JSON argument. A switch that is `negatable` has a
    `--no-` form; another one is left out to say no. `values` is a closed list, each value with the releases that take
    it; None takes any value.
    """

    place: Place = "argument"
    shape: Shape = "value"
    spans: Spans = ALWAYS
    values: Mapping[str, Spans] | None = None
    negatable: bool = True

    def accepts(self, value: object, release: str) -> bool:
        """Whether that release has the argument and takes the value."""
        if not holds(self.spans, release):
            return False
        return self.values is None or holds(self.values.get(str(value), ()), release)


class Way(msgspec.Struct, frozen=True):
    """One way to tell a knob to an engine.

    `values` maps the knob's values to the argument's, and no others can be told this way; None tells the value as it
    is, or as `convert` makes it, given the value and all knobs; a `convert` that returns None cannot. `also` holds
    further arguments that the engine needs with it.
    """

    to: str
    values: Mapping[Any, Any] | None = None
    convert: Callable[[Any, Knobs], Any] | None = None
    note: str = ""
    also: Mapping[str, Any] = msgspec.field(default_factory=dict)

    def value_for(self, value: Any, knobs: Knobs) -> Any:
        """The argument's value; None where this way cannot tell the knob's."""
        if self.values is not None:
            return self.values.get(value) if isinstance(value, str | bool | int | float) else None
        return value if self.convert is None else self.convert(value, knobs)


class Instead(msgspec.Struct, frozen=True):
    """What an engine offers in a knob's place, in words, and the releases that do."""

    text: str
    spans: Spans = ALWAYS


class Knob(msgspec.Struct, frozen=True):
    """A name from our settings or from an older configuration: the ways to tell it, the first that works is taken."""

    name: str
    ways: tuple[Way, ...] = ()
    instead: tuple[Instead, ...] = ()

    def replacement(self, release: str) -> str:
        return next((instead.text for instead in self.instead if holds(instead.spans, release)), "")


class Group(msgspec.Struct, frozen=True):
    """A JSON argument that means nothing without one of `one_of` and all of `all_of` among its keys."""

    name: str
    one_of: tuple[str, ...]
    all_of: tuple[str, ...]
    otherwise: str


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Everything known about one engine's knobs.

    `read` are the releases the facts were read from, oldest first. `package` is the Python package whose version is
    the engine's, None where there is none.
    """

    engine: str
    read: tuple[str, ...]
    arguments: Mapping[str, Argument]
    knobs: Mapping[str, Knob]
    groups: tuple[Group, ...] = ()
    package: str | None = None


def same(name: str, *instead: Instead, note: str = "") -> Knob:
    """A knob that the engine calls by the same name."""
    return Knob(name, (Way(name, note=note),), instead)


def table(*knobs: Knob) -> dict[str, Knob]:
    return {knob.name: knob for knob in knobs}
