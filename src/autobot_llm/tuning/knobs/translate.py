"""Turn knobs into what one release of an engine accepts, and say what became of each.

Knows the rules; knows no engine's names.
"""

from __future__ import annotations

import difflib
import enum
import shlex
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import msgspec

from autobot_llm.errors import ConfigurationError
from autobot_llm.tuning.knobs.facts import Argument, EngineFacts, Knob, Way
from autobot_llm.tuning.knobs.versions import Reading, reading_of


class Fate(enum.StrEnum):
    """What becomes of a knob. REMOVED and NEVER_EXISTED are not told to the engine."""

    PASSED = "passed"
    RENAMED = "renamed"
    REMOVED = "removed"
    NEVER_EXISTED = "never existed"


class KnobAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """One knob of the input and its fate.

    `variable` is the setting that asked for it, where one did. `to` is what the engine is told, as "name=value", None
    where it is told nothing. `removed_in` is the first read release without the knob, `instead` what that engine
    offers in its place, and `note` what else is to be known.
    """

    name: str
    value: Any
    fate: Fate
    to: str | None = None
    removed_in: str | None = None
    instead: str = ""
    note: str = ""
    variable: str = ""


class Translation(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine of `version` is told. `facts_from` is the read release that the answers come from.

    `arguments` belong on its command line, `environment` into its process's environment, `options` into a request's
    options, `settings` are ours. `notes` concern all of it.
    """

    engine: str
    version: str
    facts_from: str
    knobs: tuple[KnobAnswer, ...]
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = msgspec.field(default_factory=dict)
    options: Mapping[str, Any] = msgspec.field(default_factory=dict)
    settings: Mapping[str, Any] = msgspec.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def command_line(self, *command: str) -> str:
        """`command` with the arguments, and the environment before it, as a shell takes it."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join([*command, *self.arguments])])


def translate(facts: EngineFacts, version: str, knobs: Mapping[str, Any]) -> Translation:
    """Tell `knobs`, by name, to that version of the engine. Nested knobs may be a mapping in the mapping.

    Raises ConfigurationError for a version that is too old or no version at all, for a name that is no knob, and for
    two knobs that say different things about one argument.
    """
    reading = reading_of(version, facts.read, facts.engine)
    flat = dict(_flattened(knobs))
    _refuse_unknown(facts, flat)
    telling = _Telling(facts, flat)
    answers = [telling.answer(facts.knobs[name], reading) for name in flat]
    said = telling.said(reading.release)
    left_out = _meaningless(facts, said)
    answers = [_with_note(one, left_out.get(_root(one.to))) for one in answers]
    kept = {name: value for name, value in said.items() if _root(name) not in left_out}
    return _assemble(facts, version, reading, answers, kept)


class _Telling:
    """Tells all knobs of one input to the releases of one engine."""

    def __init__(self, facts: EngineFacts, knobs: Mapping[str, Any]) -> None:
        self._facts = facts
        self._knobs = knobs

    def said(self, release: str) -> dict[str, Any]:
        """Every argument that the release is told."""
        said: dict[str, Any] = {}
        by_whom: dict[str, str] = {}
        for name in self._knobs:
            for argument, value in self._says(self._facts.knobs[name], release):
                if argument in said and said[argument] != value:
                    raise ConfigurationError(
                        f"{by_whom[argument]} and {name} contradict each other: {argument} would be "
                        f"{said[argument]!r} and {value!r}"
                    )
                said[argument], by_whom[argument] = value, name
        return said

    def _says(self, knob: Knob, release: str) -> list[tuple[str, Any]]:
        told = self._told(knob, release)
        if told is None:
            return []
        way, value = told
        return [(way.to, value), *way.also.items()]

    def answer(self, knob: Knob, reading: Reading) -> KnobAnswer:
        """The fate at the release that was read for a version, with a word where the next read one differs."""
        answer = self._answer_at(knob, reading.release)
        if reading.following is None:
            return answer
        later = self._answer_at(knob, reading.following)
        if (later.fate, later.to) == (answer.fate, answer.to):
            return answer
        return _with_note(answer, f"by {reading.following}, which was read next: {later.to or later.fate}")

    def _answer_at(self, knob: Knob, release: str) -> KnobAnswer:
        asked = self._knobs[knob.name]
        told = self._told(knob, release)
        if told is not None:
            way, value = told
            unchanged = way.to == knob.name and value == asked
            fate = Fate.PASSED if unchanged else Fate.RENAMED
            return KnobAnswer(name=knob.name, value=asked, fate=fate, to=_in_words(way.to, value), note=way.note)
        read = self._facts.read
        before, after = read[: read.index(release) + 1], read[read.index(release) + 1 :]
        takes = {one for one in read if self._told(knob, one) is not None}
        removed_in = next((late for early, late in reversed([*pairwise(before)]) if early in takes), None)
        coming = next((one for one in after if one in takes), None)
        return KnobAnswer(
            name=knob.name,
            value=asked,
            fate=Fate.REMOVED if removed_in else Fate.NEVER_EXISTED,
            removed_in=removed_in,
            instead=knob.replacement(release),
            note=f"comes in {coming}" if coming else "",
        )

    def _told(self, knob: Knob, release: str) -> tuple[Way, Any] | None:
        """The first way that the release understands, and the value it is told; None where there is none."""
        for way in knob.ways:
            value = way.value_for(self._knobs[knob.name], self._knobs)
            if value is not None and self._facts.arguments[way.to].accepts(value, release):
                return way, value
        return None


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _in_words(argument: str, value: Any) -> str:
    return f"{argument}={value if isinstance(value, str) else _json(value)}"


def _flattened(knobs: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in knobs.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


def _refuse_unknown(facts: EngineFacts, knobs: Mapping[str, Any]) -> None:
    for name in knobs:
        if name not in facts.knobs:
            close = difflib.get_close_matches(name, facts.knobs, n=1)
            meant = f"; did you mean {close[0]}?" if close else ""
            raise ConfigurationError(f"unknown knob {name!r} for {facts.engine}{meant}")


def _root(argument: str | None) -> str:
    return (argument or "").partition("=")[0].partition(".")[0]


def _meaningless(facts: EngineFacts, told: Mapping[str, Any]) -> dict[str, str]:
    """JSON arguments that lack what gives them a meaning, and what to say about them."""
    left_out = {}
    for group in facts.groups:
        keys = {name.partition(".")[2] for name in told if _root(name) == group.name}
        if keys and not (keys & set(group.one_of) and keys >= set(group.all_of)):
            left_out[group.name] = group.otherwise
    return left_out


def _with_note(answer: KnobAnswer, note: str | None) -> KnobAnswer:
    if not note:
        return answer
    return msgspec.structs.replace(answer, note="; ".join(part for part in (answer.note, note) if part))


def _assemble(
    facts: EngineFacts, version: str, reading: Reading, answers: list[KnobAnswer], told: Mapping[str, Any]
) -> Translation:
    by_place: dict[str, dict[str, Any]] = {"argument": {}, "environment": {}, "option": {}, "setting": {}}
    for name, value in told.items():
        by_place[facts.arguments[name].place][name] = value
    return Translation(
        engine=facts.engine,
        version=version,
        facts_from=reading.release,
        knobs=tuple(answers),
        arguments=tuple(_command_line(facts.arguments, by_place["argument"])),
        environment={name: str(value) for name, value in by_place["environment"].items()},
        options=by_place["option"],
        settings=by_place["setting"],
        notes=(reading.note,) if reading.note else (),
    )


def _command_line(arguments: Mapping[str, Argument], told: Mapping[str, Any]) -> Iterator[str]:
    documents: dict[str, dict[str, Any]] = {}
    for name, value in told.items():
        flag = "--" + name.replace("_", "-")
        match arguments[name].shape:
            case "json":
                root, _, key = name.partition(".")
                documents.setdefault(root, {})[key] = value
            case "switch":
                if value:
                    yield flag
                elif arguments[name].negatable:
                    yield "--no-" + flag.removeprefix("--")
            case "list":
                yield flag
                yield from map(str, value if isinstance(value, list) else [value])
            case "value":
                yield flag
                yield str(value)
    for root, document in documents.items():
        yield "--" + root.replace("_", "-")
        yield _json(document)
