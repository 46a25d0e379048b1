"""JSON bodies in and out, as every dialect needs them. Knows JSON and what is wrong with it; knows no field."""

from __future__ import annotations

import re
from typing import Any, TypeVar, get_args

import msgspec

from autobot_llm.errors import InvalidRequestError, ProviderError
from autobot_llm.types import Role

MAX_NESTING = 64  # levels of arrays and objects within one field
_ROLES = ", ".join(get_args(Role))
# JSON may hold these line ends of Unicode as they are, but a client that cuts an event stream into lines as Python's
# `str.splitlines` does would cut there; the escaped form means the same.
_LINE_ENDS = (("\u2028".encode(), b"\\u2028"), ("\u2029".encode(), b"\\u2029"), ("\x85".encode(), b"\\u0085"))
_MISSING = re.compile(r"missing required field `([^`]*)`")

KindT = TypeVar("KindT")


def read_object(data: bytes) -> dict[str, Any]:
    """The JSON object that a request's body is. Errors: InvalidRequestError, with the field where one is to blame."""
    try:
        fields = msgspec.json.decode(data)
    except RecursionError as exc:
        raise InvalidRequestError("the body is nested too deeply", code="invalid_json") from exc
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise InvalidRequestError(f"the body is not valid JSON in UTF-8: {exc}", code="invalid_json") from exc
    if not isinstance(fields, dict):
        raise InvalidRequestError("the body is not a JSON object", code="invalid_json")
    if data.count(b"{") + data.count(b"[") <= MAX_NESTING:  # as nearly always: looking closer costs more than decoding
        return fields
    for name, value in fields.items():
        if isinstance(value, dict | list) and _nests_deeper(value, MAX_NESTING):
            raise InvalidRequestError(f"{name}: nested more than {MAX_NESTING} levels deep", param=name)
    return fields


def _nests_deeper(value: dict[str, Any] | list[Any], num_levels: int) -> bool:
    if num_levels == 0:
        return True
    children = value.values() if isinstance(value, dict) else value
    return any(isinstance(child, dict | list) and _nests_deeper(child, num_levels - 1) for child in children)


def convert(fields: dict[str, Any], kind: type[KindT]) -> KindT:
    """`fields` as a `kind`; what `kind` does not have is left aside. Errors: InvalidRequestError with `param`."""
    try:
        return msgspec.convert(fields, kind, str_keys=True)
    except msgspec.ValidationError as exc:
        raise _invalid(str(exc)) from exc


def _invalid(complaint: str) -> InvalidRequestError:
    """Turn msgspec's "Expected `int`, got `str` - at `$.messages[0].name`" into an error that names the field."""
    reason, _, place = complaint.partition(" - at ")
    param = place.replace("`key` in ", "").strip("`").removeprefix("$").removeprefix(".")
    missing = _MISSING.search(reason)
    if missing is not None:
        param = f"{param}.{missing[1]}" if param else missing[1]
        return InvalidRequestError(f"{param}: this field is required", param=param)
    if reason.startswith("Invalid enum value") and param.endswith(".role"):
        reason += f"; expected one of {_ROLES}"
    reason = reason.replace("`", "").replace(" | null", "")
    return InvalidRequestError(f"{param}: {reason[0].lower()}{reason[1:]}", param=param or None)


def read_answer(data: bytes, kind: type[KindT], provider: str) -> KindT:
    """A provider's answer as a `kind`. Raises ProviderError where it is something else."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        shown = data[:200].decode("utf-8", "replace")
        raise ProviderError(
            f"{provider} sent what was not asked for ({exc}): {shown}", code="malformed_answer"
        ) from exc


def encode(value: object) -> bytes:
    """Encode as JSON. Half a surrogate pair, which UTF-8 cannot hold, becomes a question mark."""
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:
        return msgspec.json.encode(_without_surrogates(msgspec.to_builtins(value)))


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_surrogates(item) for item in value]
    return value


def one_line(data: bytes) -> bytes:
    """Encoded JSON without any character that some client takes for the end of a line of an event stream."""
    if not data.isascii():
        for line_end, escaped in _LINE_ENDS:
            data = data.replace(line_end, escaped)
    return data
