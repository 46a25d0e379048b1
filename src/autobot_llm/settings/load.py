"""Read the settings: the command line over the environment over `.env` over the defaults.

Knows the sources and their order; knows nothing of what any one setting means.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from dotenv.parser import parse_stream

from autobot_llm.errors import ConfigurationError
from autobot_llm.settings.registry import SETTINGS, CloudSettings, Setting, Settings, complaint, user_cache_dir
from autobot_llm.settings.values import BadValue, HttpUrl, check, expected, parse_text

PREFIX = "AUTOBOT_"
_MODEL_OF_TYPE = re.compile(r"AUTOBOT_([A-Z0-9_]+)_MODEL")
_CLOUD = re.compile(r"AUTOBOT_CLOUD_([A-Z0-9_]+)_(ENDPOINT|API_KEY)")
_FAMILIES = ("models", "clouds")
_SCALARS = tuple(setting for setting in SETTINGS if setting.field not in _FAMILIES)
_VARIABLES = {name: setting for setting in _SCALARS for name in (setting.variable, setting.about.alias) if name}


def load_settings(
    *,
    environ: Mapping[str, str] | None = None,
    env_file: Path | None = Path(".env"),
    overrides: Mapping[str, object] | None = None,
) -> Settings:
    """The settings of this process, typed and checked.

    `overrides` are the command line's: field names of `Settings`, where None means "not given". `environ` defaults to
    the process's environment. A missing `env_file` is no error. Variables that are set to nothing count as unset.
    Raises ConfigurationError with one line for each bad value. An unknown AUTOBOT_ variable is no error, because other
    programs share the prefix: `Settings.warnings` names it, and the one that was perhaps meant.
    """
    environ = os.environ if environ is None else environ
    given = {field: value for field, value in (overrides or {}).items() if value is not None}
    layers = {"environment": _filled(environ), ".env": _filled(_read_env_file(env_file))}
    reading = _Reading()
    reading.models(layers)
    reading.clouds(layers)
    for setting in _SCALARS:
        if setting.field not in given:
            reading.strongest(setting, layers)
    for field, value in given.items():
        reading.override(field, value)
    if reading.problems:
        raise ConfigurationError("\n".join(reading.problems))
    reading.values.setdefault("cache_dir", user_cache_dir(environ))
    fields = {**reading.values, "sources": reading.sources, "warnings": tuple(_unknown_names(layers))}
    return Settings(**fields)  # type: ignore[arg-type]  # each value was made by its own field's type


class _Reading:
    """What was read so far: values by field, sources by variable, and a sentence for everything wrong."""

    def __init__(self) -> None:
        self.values: dict[str, object] = {}
        self.sources: dict[str, str] = {}
        self.problems: list[str] = []

    def strongest(self, setting: Setting, layers: Mapping[str, Mapping[str, str]]) -> None:
        for source, texts in layers.items():
            names = [name for name in (setting.variable, setting.about.alias) if name and name in texts]
            if len({texts[name] for name in names}) > 1:
                self.problems.append(f"{names[0]} and {names[1]} are both set ({source}): set only {names[0]}")
            elif names:
                self._take(setting, names[0], texts[names[0]], source)
            if names:
                return

    def override(self, field: str, value: object) -> None:
        setting = next((one for one in SETTINGS if one.field == field), None)
        if setting is None:
            self.problems.append(f"unknown setting {field!r}{_meant(field, [one.field for one in SETTINGS])}")
        else:
            self._take(setting, setting.variable, value, "command line")

    def _take(self, setting: Setting, variable: str, value: object, source: str) -> None:
        kind = setting.kind
        try:
            self.values[setting.field] = parse_text(kind, value) if isinstance(value, str) else check(kind, value)
            self.sources[setting.variable] = source
        except BadValue:
            origin = "" if source == "environment" else f" ({source})"
            self.problems.append(complaint(setting, variable, value, origin))

    def models(self, layers: Mapping[str, Mapping[str, str]]) -> None:
        found: dict[str, str] = {}
        for variable, text, source in _weakest_first(layers):
            match = _MODEL_OF_TYPE.fullmatch(variable)
            if match and variable not in _VARIABLES:
                found[match[1].lower()] = text
                self.sources[variable] = source
        self.values["models"] = found

    def clouds(self, layers: Mapping[str, Mapping[str, str]]) -> None:
        endpoints: dict[str, str] = {}
        api_keys: dict[str, str] = {}
        for variable, text, source in _weakest_first(layers):
            if match := _CLOUD.fullmatch(variable):
                (endpoints if match[2] == "ENDPOINT" else api_keys)[match[1]] = text
                self.sources[variable] = source
        for name in api_keys.keys() - endpoints.keys():
            self.problems.append(f"AUTOBOT_CLOUD_{name}_API_KEY is set without AUTOBOT_CLOUD_{name}_ENDPOINT")
        clouds: dict[str, CloudSettings] = {}
        for name, endpoint in endpoints.items():
            try:
                clouds[name.lower()] = CloudSettings(endpoint=check(HttpUrl, endpoint), api_key=api_keys.get(name))
            except BadValue:
                self.problems.append(f"AUTOBOT_CLOUD_{name}_ENDPOINT={endpoint!r}: expected {expected(HttpUrl)}")
        self.values["clouds"] = clouds


def _weakest_first(layers: Mapping[str, Mapping[str, str]]) -> Iterable[tuple[str, str, str]]:
    for source, texts in reversed(list(layers.items())):
        for variable, text in texts.items():
            yield variable, text, source


def _filled(texts: Mapping[str, str]) -> dict[str, str]:
    return {name: text.strip() for name, text in texts.items() if is_ours(name) and text.strip()}


def is_ours(name: str) -> bool:
    return name.startswith(PREFIX) or name in _VARIABLES


def is_ours_alone(name: str) -> bool:
    """Whether other programs have no use for it, or should not see it."""
    return is_ours(name) and not (name in _VARIABLES and _VARIABLES[name].about.shared)


def _read_env_file(path: Path | None) -> dict[str, str]:
    """The assignments of a `.env` file, `${...}` taken as it stands; raises ConfigurationError with the line number."""
    if path is None:
        return {}
    try:
        with path.open(encoding="utf-8-sig") as file:
            bindings = list(parse_stream(file))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"{path} cannot be read: {exc}") from exc
    values: dict[str, str] = {}
    for binding in bindings:
        line = f"{path} line {binding.original.line}"
        if binding.error:
            raise ConfigurationError(f"{line}: expected NAME=value, with closed quotes")
        if binding.key is not None and binding.value is None and is_ours(binding.key):
            raise ConfigurationError(f"{line}: expected {binding.key}=value, got no value")
        if binding.key is not None and binding.value is not None:
            values[binding.key] = binding.value
    return values


def _unknown_names(layers: Mapping[str, Mapping[str, str]]) -> Iterable[str]:
    for source, texts in layers.items():
        for name in texts:
            if name in _VARIABLES or _CLOUD.fullmatch(name):
                continue
            origin = "" if source == "environment" else f" ({source})"
            if (of_type := _MODEL_OF_TYPE.fullmatch(name)) is None:
                yield f"unknown setting {name}{origin}{_meant(name, _VARIABLES)}"
            elif of_type[1] in ("DEFAULT", "LLM"):
                yield (
                    f"{name}{origin} is the model of llm_type {of_type[1].lower()!r}; "
                    f"did you mean AUTOBOT_DEFAULT_LLM_MODEL?"
                )


def _meant(name: str, known: Iterable[str]) -> str:
    """The known name that was perhaps meant. The shared prefix is left out: it would make all names alike."""
    by_stem = {one.removeprefix(PREFIX): one for one in known}
    close = difflib.get_close_matches(name.removeprefix(PREFIX), list(by_stem), n=1, cutoff=0.7)
    return f"; did you mean {by_stem[close[0]]}?" if close else ""
