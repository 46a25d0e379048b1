"""Make the five ways to ask one request. Knows the shapes callers use; knows nothing of who answers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import msgspec

from autobot_llm.errors import InvalidRequestError
from autobot_llm.types import ChatMessage, LLMRequest, Role

MessagesLike = Sequence[ChatMessage | Mapping[str, Any]]

_OPTIONS = frozenset(LLMRequest.__struct_fields__)
_PATH = re.compile(r" - at (?:`key` in )?`\$\.?(?P<path>[^`]*)`$")


def make_request(asked: LLMRequest | MessagesLike | None, options: Mapping[str, Any]) -> LLMRequest:
    """The request for `asked` (a request, or messages as dicts or ChatMessages) with `options` over it.

    An option that is None counts as not given. Raises InvalidRequestError for an option that does not exist and for
    a value of a wrong type. Keys that a message dict has beyond ChatMessage's fields are left out, as OpenAI's
    answers fed back as history carry such keys.
    """
    given = {name: value for name, value in options.items() if value is not None}
    _refuse_unknown(given)
    if isinstance(asked, str):
        raise InvalidRequestError(
            "messages is a string: expected a list of messages; generate_response() takes a string", param="messages"
        )
    if isinstance(asked, LLMRequest):
        base = {name: getattr(asked, name) for name in asked.__struct_fields__} if given else None
        return asked if base is None else _converted({**base, **given})
    if asked is not None:
        given["messages"] = list(asked)
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    return _converted(given)


def _converted(fields: dict[str, Any]) -> LLMRequest:
    try:
        return msgspec.convert(fields, LLMRequest)
    except msgspec.ValidationError as exc:
        text = str(exc)
        found = _PATH.search(text)
        path = found["path"] if found else None
        what = text[: found.start()] if found else text
        if path and path.endswith(".role"):
            what += f" (expected {', '.join(get_args(Role))})"
        raise InvalidRequestError(f"{path}: {what}" if path else what, param=path) from exc


def _refuse_unknown(given: Mapping[str, Any]) -> None:
    unknown = [name for name in given if name not in _OPTIONS]
    if unknown:
        close = difflib.get_close_matches(unknown[0], sorted(_OPTIONS), n=1)
        meant = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(sorted(_OPTIONS))}"
        raise InvalidRequestError(f"unknown option {unknown[0]!r}: {meant}", param=unknown[0])
