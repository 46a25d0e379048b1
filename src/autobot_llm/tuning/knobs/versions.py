"""Compare versions, and find the release whose facts answer for another. Knows numbers; knows no engine."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from autobot_llm.errors import ConfigurationError

_RELEASE = re.compile(r"v?(\d+(?:\.\d+)+)(?:(?:[._-]?[a-z]+|[+-])[\w.+-]*)?", re.IGNORECASE)

Release = tuple[int, ...]


def release_of(version: str) -> Release:
    """The numbers of "0.33", "v0.10.1.1" or "0.33.0rc1+cu129". Raises ConfigurationError for anything else."""
    found = _RELEASE.fullmatch(version.strip())
    if found is None:
        raise ConfigurationError(f"version {version!r}: expected numbers with dots, such as 0.33 or 0.10.1.1")
    return tuple(int(number) for number in found[1].split("."))


def is_before(one: str, other: str) -> bool:
    """Whether version `one` is older than `other`; 0.33 and 0.33.0 are equal."""
    left, right = release_of(one), release_of(other)
    length = max(len(left), len(right))
    return _padded(left, length) < _padded(right, length)


def _padded(release: Release, length: int) -> Release:
    return release + (0,) * (length - len(release))


class Span(msgspec.Struct, frozen=True):
    """The releases for which a fact holds: from the first read one that has it until the first that lacks it."""

    since: str | None = None
    gone_by: str | None = None

    def holds(self, version: str) -> bool:
        begun = self.since is None or not is_before(version, self.since)
        return begun and (self.gone_by is None or is_before(version, self.gone_by))


Spans = tuple[Span, ...]
ALWAYS: Spans = (Span(),)


def holds(spans: Spans, version: str) -> bool:
    return any(span.holds(version) for span in spans)


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """Which read release answers for the version asked about.

    `following` is the next read one where the version lies between two, else None. `note` says why the version
    itself does not answer; it is empty where it does.
    """

    release: str
    following: str | None = None
    note: str = ""


def reading_of(version: str, read: Sequence[str], engine: str) -> Reading:
    """The release of `read` (oldest first) that answers for `version`: "0.33" means the newest read 0.33 release.

    Raises ConfigurationError for a version that is older than everything that was read, and for what is no version.
    """
    try:
        asked = release_of(version)
    except ConfigurationError as exc:
        raise _unknown_version(version, read, engine) from exc
    same_series = [one for one in read if release_of(one)[: len(asked)] == asked]
    if same_series:
        return Reading(release=same_series[-1])
    exact = next((one for one in read if not is_before(one, version) and not is_before(version, one)), None)
    if exact is not None:
        return Reading(release=exact)
    older = [one for one in read if is_before(one, version)]
    newer = [one for one in read if is_before(version, one)]
    if not older:
        if release_of(read[0])[:2] == asked[:2]:
            return Reading(release=read[0], note=f"{engine} {version} was not read; {read[0]} answers for it")
        raise _unknown_version(version, read, engine)
    if not newer:
        return Reading(
            release=older[-1], note=f"{engine} {version} is newer than what was read; {older[-1]} answers for it"
        )
    note = f"{engine} {version} was not read; {older[-1]} answers for it, and {newer[0]} is the next that was read"
    return Reading(release=older[-1], following=newer[0], note=note)


def _unknown_version(version: str, read: Sequence[str], engine: str) -> ConfigurationError:
    return ConfigurationError(f"version {version!r} of {engine}: expected {in_words(read)}, or later")


def in_words(read: Sequence[str]) -> str:
    """ "0.8 to 0.33"."""
    first, last = series_of(read[0]), series_of(read[-1])
    return first if first == last else f"{first} to {last}"


def series_of(version: str) -> str:
    """ "0.33" of "0.33.0"."""
    return ".".join(str(number) for number in release_of(version)[:2])
