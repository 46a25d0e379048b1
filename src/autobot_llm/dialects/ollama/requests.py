"""Write requests to an Ollama server. Knows its fields and since when it has them; knows nothing of connections.

Whatever Ollama would ignore is refused by name: an ignored field is a wrong answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from autobot_llm.dialects.ollama.messages import write_format, write_messages, write_think
from autobot_llm.dialects.ollama.options import LOAD_TIME, OLLAMA_ONLY, refuse_load_time, write_options
from autobot_llm.errors import InvalidRequestError, UnsupportedError
from autobot_llm.types import EmbeddingRequest, LLMRequest

CHAT, GENERATE, EMBED = "/api/chat", "/api/generate", "/api/embed"
Version = tuple[int, ...]

# Fields of `LLMRequest` that Ollama has no counterpart for, with the value that asks for nothing.
_NO_COUNTERPART: Mapping[str, object] = {
    "n": 1,
    "min_tokens": 0,
    "stop_token_ids": [],
    "ignore_eos": False,
    "logit_bias": {},
    "priority": 0,
}
# Fields of `extra_body` that are Ollama's own, beside the options.
_TOP_LEVEL = ("keep_alive", "truncate", "shift", "suffix")
_ELSEWHERE = ("num_ctx", "options", "think", "thinking", "reasoning_effort", "parallel_tool_calls")


@dataclass(frozen=True, slots=True)
class Feature:
    """A field that a server knows since a version; an older one ignores it without a word."""

    param: str
    since: Version
    is_used: Callable[[Mapping[str, Any]], bool]


FEATURES = (
    Feature("tools", (0, 3, 0), lambda body: bool(body.get("tools"))),
    Feature("response_format", (0, 5, 0), lambda body: isinstance(body.get("format"), dict)),
    Feature("reasoning_effort", (0, 9, 0), lambda body: "think" in body),
    Feature("dimensions", (0, 11, 11), lambda body: "dimensions" in body),
    Feature("logprobs", (0, 12, 11), lambda body: bool(body.get("logprobs"))),
)


def refuse_too_new(body: Mapping[str, Any], version: Version | None) -> None:
    """Refuse what a server of this version would ignore. Errors: UnsupportedError."""
    for feature in FEATURES:
        if version is not None and version < feature.since and feature.is_used(body):
            raise UnsupportedError(
                f"{feature.param}: Ollama has it since {_text(feature.since)}; this server is {_text(version)}",
                param=feature.param,
            )


def _text(version: Version) -> str:
    return ".".join(map(str, version))


def asked_context(request: LLMRequest | EmbeddingRequest) -> int | None:
    """The smallest context that `request` asks for by itself, in tokens."""
    return _integer(request.extra_body, "num_ctx")


def _integer(extra: Mapping[str, Any], name: str) -> int | None:
    value = extra.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidRequestError(f"{name}={value!r}: expected an integer of at least 1", param=name)
    return value


def write_request(request: LLMRequest, *, model: str) -> tuple[str, dict[str, Any]]:
    """The path and the body for `request`, always as a stream; the caller adds the context and the default keep_alive.

    A conversation goes to /api/chat, a text to continue to /api/generate. Without `truncate`, a server cuts a prompt
    that does not fit without saying so: so it is told not to. Errors: UnsupportedError with the field.
    """
    for name, nothing in _NO_COUNTERPART.items():
        if getattr(request, name) != nothing:
            raise UnsupportedError(f"{name}: Ollama has nothing like it", param=name)
    extra = request.extra_body
    body: dict[str, Any] = {"model": model, "stream": True, "truncate": False}
    path = GENERATE if request.messages is None else CHAT
    body |= _write_prompt(request) if request.messages is None else _write_conversation(request)
    if (wanted := write_format(request.response_format)) is not None:
        body["format"] = wanted
    if (think := _think(extra)) is not None:
        body["think"] = think
    if request.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": request.logprobs}
    body |= {name: extra[name] for name in _TOP_LEVEL if name in extra}
    body["options"] = write_options(request) | _extra_options(extra)
    return path, body


def _write_conversation(request: LLMRequest) -> dict[str, Any]:
    assert request.messages is not None
    if "suffix" in request.extra_body:
        raise UnsupportedError("suffix: only together with a prompt", param="suffix")
    body: dict[str, Any] = {"messages": write_messages(request.messages)}
    if request.tool_choice not in (None, "auto", "none"):
        raise UnsupportedError("tool_choice: Ollama leaves the choice to the model: auto or none", param="tool_choice")
    if request.tools and request.extra_body.get("parallel_tool_calls") is False:
        raise UnsupportedError("parallel_tool_calls=false: Ollama cannot forbid it", param="parallel_tool_calls")
    if request.tools and request.tool_choice != "none":
        body["tools"] = [_tool(tool, f"tools[{place}]") for place, tool in enumerate(request.tools)]
    return body


def _tool(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The tool without a mark for a cache: Ollama's finds every prompt's beginning by itself."""
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict):
        raise UnsupportedError(f"{where}: Ollama calls functions only", param=f"{where}.type")
    if function.get("strict"):
        param = f"{where}.function.strict"
        raise UnsupportedError(f"{param}: Ollama does not hold a model to the parameters' schema", param=param)
    return {"type": "function", "function": {name: value for name, value in function.items() if name != "strict"}}


def _write_prompt(request: LLMRequest) -> dict[str, Any]:
    """A prompt that is continued as it is, without a template; only insertion before a suffix has one."""
    if not isinstance(request.prompt, str):
        raise UnsupportedError("prompt: Ollama takes text, not token ids", param="prompt")
    if request.tools and request.tool_choice != "none":
        raise UnsupportedError("tools: only together with messages", param="tools")
    return {"prompt": request.prompt} if "suffix" in request.extra_body else {"prompt": request.prompt, "raw": True}


def _think(extra: Mapping[str, Any]) -> bool | str | None:
    """`think` as it is, or what it is for OpenAI's `reasoning_effort`, or for Anthropic's `thinking`."""
    if (think := extra.get("think")) is not None:
        if not isinstance(think, bool | str):
            raise InvalidRequestError(f"think={think!r}: expected true, false or a level", param="think")
        return think
    if (effort := extra.get("reasoning_effort")) is not None:
        return write_think(effort)
    match extra.get("thinking"):
        case None:
            return None
        case {"type": "disabled"}:
            return False
        case {"type": "adaptive"}:
            return True
        case _:
            raise UnsupportedError(
                "thinking: Ollama takes types disabled and adaptive; it has no budget_tokens", param="thinking"
            )


def _extra_options(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Ollama's own options: by name, or as an `options` object that is handed on as it is.

    Load-time ones are refused, because they would load the model anew for everybody.
    """
    handed_on = extra.get("options") or {}
    if not isinstance(handed_on, dict):
        raise InvalidRequestError("options: expected an object", param="options")
    named = {name: value for name, value in extra.items() if name not in (*_TOP_LEVEL, *_ELSEWHERE)}
    for name, value in (*handed_on.items(), *named.items()):
        if name in LOAD_TIME:
            refuse_load_time(name, value)
    if "num_ctx" in handed_on:
        raise InvalidRequestError("options.num_ctx: give num_ctx by itself", param="options.num_ctx")
    for name in named:
        if name not in OLLAMA_ONLY and name not in LOAD_TIME:
            raise UnsupportedError(f"Ollama does not know the field {name!r}", param=name)
    return {name: value for name, value in {**handed_on, **named}.items() if name not in LOAD_TIME}


def write_embedding(request: EmbeddingRequest, *, model: str) -> dict[str, Any]:
    """The body for `/api/embed`. Errors: UnsupportedError with the field."""
    if not all(isinstance(text, str) for text in request.inputs):
        raise UnsupportedError("input: Ollama takes texts, not token ids", param="input")
    body: dict[str, Any] = {"model": model, "input": request.inputs, "truncate": False}
    if request.dimensions is not None:
        body["dimensions"] = request.dimensions
    extra = request.extra_body
    body |= {name: extra[name] for name in ("keep_alive", "truncate") if name in extra}
    for name in extra:
        if name not in ("keep_alive", "truncate", "num_ctx"):
            raise UnsupportedError(f"{name}: Ollama has nothing like it for embeddings", param=name)
    return body
