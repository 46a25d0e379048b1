"""Messages, tools, images and formats between Ollama's shapes and OpenAI's, both ways. Knows shapes only.

What differs: Ollama has a call's arguments as an object and images as base64 texts beside the content, and it leaves
the ids of calls out, so that a tool's result belongs to the next unanswered call of its name.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from autobot_llm.errors import InvalidRequestError, UnsupportedError
from autobot_llm.types import ChatMessage, Role

# The first bytes of the kinds of images that models take, for the media type that OpenAI's shape names.
_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"BM", "image/bmp"),
)
_DATA_URL = re.compile(r"data:[\w.+-]+/[\w.+-]+;base64,", re.ASCII)
_EFFORTS: Mapping[str, bool | str] = {"none": False, "low": "low", "medium": True, "high": "high"}
_THOUGHTS: Mapping[bool | str, str] = {False: "none", True: "medium", "low": "low", "medium": "medium", "high": "high"}


class WireFunction(msgspec.Struct, kw_only=True):
    """A call's function. `index` is its place among the calls of one answer."""

    name: str
    arguments: dict[str, Any] = msgspec.field(default_factory=dict)
    index: int | None = None
    description: str | None = None


class WireToolCall(msgspec.Struct, kw_only=True):
    """A call of a tool; newer servers give it an id."""

    function: WireFunction
    id: str | None = None
    type: str | None = None


class WireMessage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A message as a client sends it."""

    role: Role
    content: str | None = None
    thinking: str | None = None
    images: list[str] | None = None
    tool_calls: list[WireToolCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


# From Ollama's shapes


def read_messages(messages: Sequence[WireMessage]) -> list[ChatMessage]:
    """The messages in OpenAI's shape; calls without an id get one that their place decides.

    Errors: InvalidRequestError for an image that is none, UnsupportedError for one of an unknown kind.
    """
    read: list[ChatMessage] = []
    open_calls: list[tuple[str, str]] = []  # id and name of each call that has no result yet
    for place, message in enumerate(messages):
        calls = [_read_call(call, f"call_{place}_{position}") for position, call in enumerate(message.tool_calls or ())]
        open_calls += [(call["id"], call["function"]["name"]) for call in calls]
        read.append(
            ChatMessage(
                role=message.role,
                content=read_content(message.content or "", message.images, f"messages[{place}].images"),
                tool_calls=calls or None,
                reasoning_content=message.thinking or None,
            )
        )
        if message.role == "tool":
            _answer(open_calls, message, read[-1])
    return read


def _read_call(call: WireToolCall, default_id: str) -> dict[str, Any]:
    arguments = msgspec.json.encode(call.function.arguments).decode()
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id or default_id, "type": "function", "function": function}


def _answer(open_calls: list[tuple[str, str]], message: WireMessage, result: ChatMessage) -> None:
    """Say whose result this is: the call it names, else the first open one of its tool's name, else the first one."""
    call_id, name = message.tool_call_id, message.tool_name
    matching = [call for call in open_calls if call_id in (None, call[0]) and name in (None, call[1])]
    if matching:
        open_calls.remove(matching[0])
        result.tool_call_id = matching[0][0]
    else:
        result.tool_call_id, result.name = call_id, name


def read_content(text: str, images: Sequence[str] | None, param: str) -> str | list[dict[str, Any]]:
    """Text, or content parts where there are images: they come before the text, as Ollama shows them to a model."""
    if not images:
        return text
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": _data_url(image, f"{param}[{place}]")}}
        for place, image in enumerate(images)
    ]
    return [*parts, {"type": "text", "text": text}] if text else parts


def _data_url(image: str, param: str) -> str:
    text = _DATA_URL.sub("", image, count=1)  # some clients send a browser's data URL whole
    try:
        begin = base64.b64decode(text, validate=True)[:16]
    except (binascii.Error, ValueError) as exc:
        raise InvalidRequestError(f"{param}: expected an image in base64: {exc}", param=param) from exc
    media_type = next((kind for signature, kind in _SIGNATURES if begin.startswith(signature)), None)
    if begin[:4] == b"RIFF" and begin[8:12] == b"WEBP":
        media_type = "image/webp"
    if media_type is None:
        raise UnsupportedError(f"{param}: expected a PNG, JPEG, GIF, WebP or BMP image", param=param)
    return f"data:{media_type};base64,{text}"


def read_tools(tools: Sequence[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """The tools, which have OpenAI's shape already, once they are seen to name a function each."""
    for place, tool in enumerate(tools or ()):
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            param = f"tools[{place}].function"
            raise InvalidRequestError(f"{param}: expected an object with a name", param=param)
    return [{"type": "function", **tool} for tool in tools] if tools else None


def read_format(wanted: str | dict[str, Any] | None) -> dict[str, Any] | None:
    """`response_format` for Ollama's `format`: "json", a JSON schema, or nothing."""
    if wanted is None or wanted == "":
        return None
    if isinstance(wanted, dict):
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": wanted}}
    if wanted != "json":
        raise InvalidRequestError(f'format={wanted!r}: expected "json" or a JSON schema', param="format")
    return {"type": "json_object"}


def read_think(think: bool | str) -> str:
    """OpenAI's `reasoning_effort` for Ollama's `think`; a bare true is what Ollama's models take for medium."""
    if think not in _THOUGHTS:
        raise InvalidRequestError(f"think={think!r}: expected true, false, low, medium or high", param="think")
    return _THOUGHTS[think]


# To Ollama's shapes


def write_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """The messages as Ollama takes them. Errors: UnsupportedError and InvalidRequestError that name the place."""
    written = []
    names: dict[str, str] = {}  # what a call's id calls
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        content = _Content(message.content, f"{where}.content")
        role = "system" if message.role == "developer" else message.role
        wire: dict[str, Any] = {"role": role, "content": content.text}
        if content.images:
            wire["images"] = content.images
        if thinking := (message.reasoning_content or "") + content.thinking:
            wire["thinking"] = thinking
        if message.tool_calls:
            wire["tool_calls"] = [_write_call(call, names, f"{where}.tool_calls") for call in message.tool_calls]
        if message.role == "tool":
            wire |= _whose_result(message, names, where)
        elif message.name is not None:
            raise UnsupportedError(f"{where}.name: Ollama does not tell participants apart", param=f"{where}.name")
        written.append(wire)
    return written


class _Content:
    """A message's content as Ollama has it: one text, images beside it, and what was thought."""

    def __init__(self, content: str | list[dict[str, Any]] | None, where: str) -> None:
        self.text = content if isinstance(content, str) else ""
        self.images: list[str] = []
        self.thinking = ""
        for place, part in enumerate(content if isinstance(content, list) else ()):
            self._add(part, f"{where}[{place}]")

    def _add(self, part: Mapping[str, Any], where: str) -> None:
        match part:
            case {"type": "text", "text": str(text)}:
                self.text += text
            case {"type": "image_url"}:
                self.images.append(_base64_of(part.get("image_url"), f"{where}.image_url"))
            case {"type": "thinking", "thinking": str(text)}:
                self.thinking += text
            case _:
                kind = part.get("type")
                raise UnsupportedError(
                    f"{where}.type={kind!r}: Ollama takes parts of the types text and image_url", param=f"{where}.type"
                )
        # Ollama has no flag for a tool that failed: the model reads it in the result itself.
        if part.get("is_error") and not self.text.lower().startswith("error"):
            self.text = f"Error: {self.text}"


def _base64_of(image: object, param: str) -> str:
    url = image.get("url") if isinstance(image, dict) else None
    if not isinstance(url, str) or not (data_url := _DATA_URL.match(url)):
        raise UnsupportedError(
            f"{param}: Ollama takes images as data, not by address: expected a data:image/...;base64,... URL",
            param=param,
        )
    if isinstance(image, dict) and image.get("detail") not in (None, "auto"):
        raise UnsupportedError(f"{param}.detail: expected auto; Ollama's models see an image one way", param=param)
    return url[data_url.end() :]


def _write_call(call: Mapping[str, Any], names: dict[str, str], where: str) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequestError(f"{where}: expected calls of functions that have a name", param=where)
    written: dict[str, Any] = {
        "function": {"name": function["name"], "arguments": _arguments(function.get("arguments"), where)}
    }
    if isinstance(call.get("id"), str):
        written["id"] = call["id"]
        names[call["id"]] = function["name"]
    return written


def _arguments(text: object, where: str) -> dict[str, Any]:
    try:
        arguments = msgspec.json.decode(text) if isinstance(text, str) and text.strip() else {}
    except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError) as exc:
        raise InvalidRequestError(f"{where}: the arguments are not JSON: {exc}", param=where) from exc
    if not isinstance(arguments, dict):
        raise InvalidRequestError(f"{where}: the arguments are not a JSON object, which Ollama expects", param=where)
    return arguments


def _whose_result(message: ChatMessage, names: Mapping[str, str], where: str) -> dict[str, str]:
    call_id = message.tool_call_id
    name = message.name or names.get(call_id or "")
    if name is None:
        raise InvalidRequestError(
            f"{where}.tool_call_id={call_id!r}: no earlier message has a call of this id", param=f"{where}.tool_call_id"
        )
    return {"tool_name": name} | ({"tool_call_id": call_id} if call_id else {})


def write_format(wanted: Mapping[str, Any] | None) -> str | dict[str, Any] | None:
    """Ollama's `format` for a `response_format`."""
    kind = (wanted or {}).get("type", "text")
    if wanted is None or kind == "text":
        return None
    if kind == "json_object":
        return "json"
    schema = (wanted.get("json_schema") or {}).get("schema") if kind == "json_schema" else None
    if not isinstance(schema, dict):
        raise UnsupportedError(
            f"response_format of type {kind!r}: Ollama takes text, json_object, and json_schema with a schema",
            param="response_format",
        )
    return schema


def write_think(effort: object) -> bool | str:
    """Ollama's `think` for OpenAI's `reasoning_effort`; medium is a bare true, which every thinking model takes."""
    if not isinstance(effort, str) or effort not in _EFFORTS:
        raise UnsupportedError(
            f"reasoning_effort={effort!r}: Ollama takes none, low, medium and high", param="reasoning_effort"
        )
    return _EFFORTS[effort]
