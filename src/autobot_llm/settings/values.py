"""Turn the text of a setting into its value, say what would have been accepted, and write a value as text again.

Knows types and their limits (`msgspec.Meta`); knows nothing of any one setting or of where the text came from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
from msgspec import Meta, inspect

# A Meta's `extra` tells how text is read ("size", "texts") or what is expected where the limits alone would not tell.
Count = Annotated[int, Meta(ge=1)]
WholeNumber = Annotated[int, Meta(ge=0)]
Port = Annotated[int, Meta(ge=0, le=65535)]
NonNegative = Annotated[float, Meta(ge=0)]
Seconds = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(gt=0, le=1)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Dollars = Annotated[float, Meta(gt=0)]
Size = Annotated[int, Meta(ge=1, le=2**62, extra={"reads": "size"})]
Milliseconds = Annotated[float, Meta(gt=0)]
Text = Annotated[str, Meta(min_length=1)]
Budget = Annotated[
    Annotated[int, Meta(ge=0)] | Annotated[float, Meta(gt=0, le=1)],
    Meta(extra={"reads": "number", "expected": "a whole number of tokens, 0 (off), or a share of the context up to 1"}),
]
Texts = Annotated[
    tuple[Text, ...],
    Meta(extra={"reads": "texts", "expected": "a JSON list of texts, or @ and the path of a file that holds one"}),
]
HttpUrl = Annotated[
    str, Meta(pattern=r"^https?://[^\s/]+\S*$", extra={"expected": "an address that starts with http:// or https://"})
]
ProxyUrl = Annotated[
    str,
    Meta(
        pattern=r"^(http://)?([^\s/@]+@)?[^\s/@:]+(:\d{1,5})?/?$|^(http://)?([^\s/@]+@)?\[[0-9A-Fa-f:]+\](:\d{1,5})?/?$",
        extra={"expected": "the address of an HTTP proxy, such as http://user:password@proxy.example:3128"},
    ),
]
RedisUrl = Annotated[
    str, Meta(pattern=r"^(rediss?|unix)://\S+$", extra={"expected": "a redis://, rediss:// or unix:// address"})
]
Duration = Annotated[
    str,
    Meta(pattern=r"^-?(\d+(\.\d+)?(ms|s|m|h))+$", extra={"expected": "a duration such as 90s, 30m or 1h30m"}),
]
Fallback = Annotated[
    str,
    Meta(
        pattern=r"^[^>,]*[^>,\s][^>,]*(>[^>,]*[^>,\s][^>,]*)+$",
        extra={"expected": "a model and those that answer in its stead, such as openai/gpt-5.4 > native/tiny"},
    ),
]
OwnLimit = Annotated[
    str,
    Meta(
        pattern=r"^[^\s,]+(\s+[1-9]\d*rpm)(\s+[1-9]\d*tpm)?$|^[^\s,]+\s+[1-9]\d*tpm$",
        extra={"expected": "a model and its limits, such as openai/gpt-5.4 500rpm 200000tpm"},
    ),
]
Switch = Literal["auto", "on", "off"]

_TRUE = frozenset({"true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off"})
_UNSET = frozenset({"off", "none"})
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?", re.IGNORECASE)
_NOT_A_VALUE = object()


class BadValue(Exception):
    """The value is not one that the setting accepts."""


def parse_text(kind: Any, text: str) -> Any:
    """The value that `text` stands for, `kind` being a type (`Annotated` or not); raises BadValue."""
    return check(kind, _read(inspect.type_info(kind), text))


def check(kind: Any, value: object) -> Any:
    """`value`, if it has the type and keeps the limits of `kind`; raises BadValue."""
    try:
        converted = msgspec.convert(value, kind)
    except (msgspec.ValidationError, OverflowError) as exc:
        raise BadValue(str(exc)) from exc
    if isinstance(converted, float) and not math.isfinite(converted):
        raise BadValue("not a finite number")
    return converted


def _read(info: inspect.Type, text: str) -> object:
    """Text to a plain value of about the right type; what cannot be read becomes a value that `check` refuses."""
    match info:
        case inspect.Metadata(type=inner, extra=extra):
            reader = _READERS.get((extra or {}).get("reads"))
            return _read(inner, text) if reader is None else reader(text)
        case inspect.UnionType(types=types):
            return None if text.lower() in _UNSET else _read(_of_optional(types), text)
        case inspect.BoolType():
            word = text.lower()
            return True if word in _TRUE else False if word in _FALSE else _NOT_A_VALUE
        case inspect.LiteralType():
            return text.lower()
        case inspect.VarTupleType(item_type=item):
            return tuple(_read(item, part.strip()) for part in text.split(",") if part.strip()) or _NOT_A_VALUE
        case inspect.CustomType(cls=cls) if cls is Path:
            return _read_path(text)
        case inspect.IntType() | inspect.FloatType():
            return _read_number(text)
        case _:
            return text


def _read_path(text: str) -> object:
    try:
        return Path(text).expanduser()
    except (RuntimeError, ValueError):
        return _NOT_A_VALUE  # "~somebody" who is not a user here; a null byte in such a name


def _read_number(text: str) -> object:
    try:
        return msgspec.convert(text, float | int, strict=False)
    except msgspec.ValidationError:
        return _NOT_A_VALUE


def read_size(text: str) -> object:
    """Bytes from "16777216", "16MB" (powers of 1000) or "16MiB" (powers of 1024)."""
    found = _SIZE.fullmatch(text)
    if found is None:
        return _NOT_A_VALUE
    number, letter, binary = found.groups()
    scale = (1024 if binary else 1000) ** (" kmgt".index(letter.lower()) if letter else 0)
    return int(float(number) * scale) if "." in number else int(number) * scale


def read_texts(text: str) -> object:
    """Texts from `["One.", "Two."]`, or from a file that holds such a list: `@prefixes.json`."""
    try:
        content = Path(text[1:]).expanduser().read_bytes() if text.startswith("@") else text
        return tuple(msgspec.json.decode(content, type=list[str]))
    except (OSError, RuntimeError, ValueError, msgspec.MsgspecError):
        return _NOT_A_VALUE


_READERS: Mapping[str | None, Callable[[str], object]] = {
    "size": read_size,
    "texts": read_texts,
    "number": _read_number,
}


def expected(kind: Any) -> str:
    """What `kind` accepts, in words that end the sentence "expected ..."."""
    if choices := _choices(kind):
        return in_words(choices)
    return _expected(inspect.type_info(kind))


def _choices(kind: Any) -> list[str]:
    """A Literal's values in the order they were written (msgspec sorts them), and "off" where it may be unset."""
    inner = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if get_origin(inner) is Union and (choices := _choices(get_args(inner)[0])):
        return [*choices, "off"]
    return [str(value) for value in get_args(inner)] if get_origin(inner) is Literal else []


def _expected(info: inspect.Type) -> str:
    match info:
        case inspect.Metadata(type=inner, extra=extra):
            if (extra or {}).get("reads") == "size":
                return "a size of at least 1 byte, such as 512MB, 2GiB or 1048576"
            return str((extra or {}).get("expected") or _expected(inner))
        case inspect.UnionType(types=types):
            return f"{_expected(_of_optional(types))}, or off"
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType(ge=low, le=high):
            return f"an integer{_limits(low, None, high)}"
        case inspect.FloatType(ge=low, gt=above, le=high):
            return f"a number{_limits(low, above, high)}"
        case inspect.VarTupleType(item_type=item):
            return f"a list separated by commas, each {_expected(item)}"
        case inspect.CustomType(cls=cls) if cls is Path:
            return "a path"
        case _:
            return "text that is not empty"


def _limits(low: float | None, above: float | None, high: float | None) -> str:
    if above is not None:
        return f" above {above:g}" + (f" and at most {high:g}" if high is not None else "")
    if low is not None and high is not None:
        return f" from {low} to {high}"
    return f" of at least {low}" if low is not None else ""


def _of_optional(types: tuple[inspect.Type, ...]) -> inspect.Type:
    return next(one for one in types if not isinstance(one, inspect.NoneType))


def in_words(words: list[str]) -> str:
    """ "a, b or c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def show(kind: Any, value: object) -> str:
    """`value` as text that `parse_text` reads back to the same value; an unset one is shown as "unset"."""
    match value:
        case None:
            return "unset"
        case bool():
            return "true" if value else "false"
        case tuple() if value and _reads(inspect.type_info(kind)) == "texts":
            return msgspec.json.encode(value).decode()
        case tuple():
            return ", ".join(str(item) for item in value) or "unset"
        case Mapping():
            return ", ".join(f"{name}={item}" for name, item in value.items()) or "unset"
        case int() if _reads(inspect.type_info(kind)) == "size":
            return _show_size(value)
        case float():
            return f"{value:g}"
        case _:
            return str(value)


def _reads(info: inspect.Type) -> str | None:
    if isinstance(info, inspect.UnionType):
        return _reads(_of_optional(info.types))
    return (info.extra or {}).get("reads") if isinstance(info, inspect.Metadata) else None


def _show_size(num_bytes: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes % scale == 0:
            return f"{num_bytes // scale}{unit}"
    return str(num_bytes)
