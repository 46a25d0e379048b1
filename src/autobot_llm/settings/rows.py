"""Show the settings: each with its value, where it came from and whether it does anything here.

Knows the registry; knows nothing of terminals. Secrets leave this module masked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from autobot_llm.settings.meaning import EVERY
from autobot_llm.settings.registry import MASK, SETTINGS, Setting, Settings
from autobot_llm.settings.values import HttpUrl, expected, show


class SettingRow(msgspec.Struct, frozen=True, kw_only=True):
    """One line about a setting. `effect` is empty where the setting acts, else says why it does not."""

    variable: str
    value: str
    source: str
    default: str
    doc: str
    read_by: str
    effect: str


def describe_settings(settings: Settings) -> list[SettingRow]:
    """One row for each setting in the registry's order; families (`AUTOBOT_<TYPE>_MODEL`) one for each member set."""
    return [row for setting in SETTINGS for row in _rows(setting, settings)]


def ineffective_settings(settings: Settings) -> list[SettingRow]:
    """The settings that the user set and that do nothing on the chosen provider."""
    return [row for row in describe_settings(settings) if row.source != "default" and row.effect]


def _rows(setting: Setting, settings: Settings) -> Iterator[SettingRow]:
    if setting.field == "models":
        members = {f"AUTOBOT_{name.upper()}_MODEL": model for name, model in settings.models.items()}
    elif setting.field == "clouds":
        members = {}
        for name, cloud in settings.clouds.items():
            members[f"AUTOBOT_CLOUD_{name.upper()}_ENDPOINT"] = _without_password(cloud.endpoint)
            if cloud.api_key:
                members[f"AUTOBOT_CLOUD_{name.upper()}_API_KEY"] = MASK
    else:
        members = {setting.variable: _value(setting, settings)}
    for variable, value in (members or {setting.variable: "unset"}).items():
        yield SettingRow(
            variable=variable,
            value=value,
            source=_source(setting, settings, variable, is_set=bool(members)),
            default=_default(setting),
            doc=setting.about.doc,
            read_by=setting.about.read_by,
            effect=_effect(setting, settings),
        )


def _value(setting: Setting, settings: Settings) -> str:
    value = getattr(settings, setting.field)
    return MASK if setting.about.secret and value else _without_password(show(setting.kind, value))


def _without_password(text: str) -> str:
    return re.sub(r"://[^@/\s]+@", f"://{MASK}@", text)


def _source(setting: Setting, settings: Settings, variable: str, *, is_set: bool) -> str:
    if source := settings.sources.get(variable) or settings.sources.get(setting.variable):
        return source
    if setting.field == "cache_dir" or not is_set:
        return "default"
    return "default" if getattr(settings, setting.field) == setting.default else "program"


def _default(setting: Setting) -> str:
    return "the user's cache folder" if setting.field == "cache_dir" else show(setting.kind, setting.default)


def _effect(setting: Setting, settings: Settings) -> str:
    if settings.provider in setting.about.told_on:
        return f"no effect here: `autobot-llm knobs --engine {settings.provider}` says how its server is told"
    if settings.provider in setting.about.on:
        return ""
    return f"no effect on provider {settings.provider}, only on {', '.join(sorted(setting.about.on))}"


PAGE_HEAD = """# Settings

Made by `python -m autobot_llm.settings > docs/settings.md`; a test fails when this page is out of date.

A setting is looked for on the command line, then in the environment, then in the file `.env` of the working
directory, then it has its default. A variable that is set to nothing counts as unset. In `.env`, values are taken as
they stand: `${NAME}` is not replaced. `autobot-llm config` prints every value and where it came from. A bad value stops
the program with a message that names the variable, the value and what is accepted; an unknown `AUTOBOT_` name is
reported and ignored, because other programs share the prefix.

Sizes are bytes, or a number with KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024). "unset" as a
default means that there is no value; `off` sets such a setting back to that, over a weaker source. "lossy" marks what
can change an answer: all of it is off by default.

"""


def settings_page() -> str:
    """The page docs/settings.md: every setting, in a Markdown table."""
    lines = ["| Variable | Default | Accepted | Meaning | Acts on | Read by |", "|---|---|---|---|---|---|"]
    for setting in SETTINGS:
        about = setting.about
        variable = f"`{setting.variable}`" + (f" or `{about.alias}`" if about.alias else "")
        accepted = expected(HttpUrl) if setting.field == "clouds" else expected(setting.kind)
        told = f" On {', '.join(sorted(about.told_on))}, `autobot-llm knobs` says how the server is told."
        doc = about.doc + (told if about.told_on else "")
        acts_on = "every provider" if about.on == EVERY else ", ".join(sorted(about.on))
        lines.append(f"| {variable} | {_default(setting)} | {accepted} | {doc} | {acts_on} | {about.read_by} |")
    return PAGE_HEAD + "\n".join(lines) + "\n"
