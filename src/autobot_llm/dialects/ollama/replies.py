"""Write answers in Ollama's shapes: whole bodies, errors, embeddings, listings. Knows the wire; knows no connection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from autobot_llm.dialects.bodies import encode, one_line
from autobot_llm.errors import LLMError, ProviderError
from autobot_llm.types import (
    Choice,
    EmbeddingResponse,
    FinishReason,
    LLMResponse,
    ModelInfo,
    Timings,
    TokenLogprob,
    ToolCall,
    Usage,
)

# The version of Ollama whose API is spoken here. Clients compare it with the oldest one that they work with.
API_VERSION = "0.12.11"
LOWEST_LOGPROB = -9999.0  # JSON has no infinity
LOAD, UNLOAD = "load", "unload"
# A call ends an answer like any other here; Ollama has no word for it.
_DONE_REASONS: Mapping[FinishReason, str] = {"tool_calls": "stop"}
_DETAILS = ("parent_model", "format", "family", "families", "parameter_size", "quantization_level")


def now() -> str:
    """The time as Ollama writes it: RFC 3339, in UTC."""
    return datetime.now(UTC).isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"


def error_body(error: LLMError) -> bytes:
    """The JSON of an error, as Ollama's clients read it."""
    return encode({"error": error.message})


def error_line(error: LLMError) -> bytes:
    """An error after the stream began: a line of its own, the last one."""
    return one_line(error_body(error)) + b"\n"


class Reply(ABC):
    """The body of a whole answer.

    What `lasting` makes of an answer is the same each time that the answer is given, whoever gets it; `body` puts it
    between what is not. Errors: ProviderError for calls that this format cannot carry.
    """

    form: str

    def lasting(self, response: LLMResponse) -> bytes:
        choice = response.choices[0]
        fields = self._fields(choice)
        if choice.logprobs:
            fields["logprobs"] = logprobs(choice.logprobs)
        return encode(fields)[1:-1]

    def body(self, lasting: bytes, response: LLMResponse) -> bytes:
        head = encode({"model": response.model, "created_at": now()})
        tail = ending(response.finish_reason, response.usage, response.timings, response.processing_time)
        tail["autobot"] = {"timings": response.timings, "optimizations": response.optimizations}
        return b"%b,%b,%b" % (head[:-1], lasting, encode(tail)[1:])

    @abstractmethod
    def _fields(self, choice: Choice) -> dict[str, object]: ...


class ChatReply(Reply):
    """A whole chat answer."""

    form = "ollama.chat"

    def _fields(self, choice: Choice) -> dict[str, object]:
        message: dict[str, object] = {"role": "assistant", "content": choice.content + choice.refusal}
        if choice.reasoning:
            message["thinking"] = choice.reasoning
        if calls := tool_calls(choice.tool_calls, choice.finish_reason):
            message["tool_calls"] = calls
        return {"message": message}


class GenerateReply(Reply):
    """A whole answer to a prompt."""

    form = "ollama.generate"

    def _fields(self, choice: Choice) -> dict[str, object]:
        fields: dict[str, object] = {"response": choice.content + choice.refusal}
        if choice.reasoning:
            fields["thinking"] = choice.reasoning
        return fields


def ending(reason: FinishReason, usage: Usage, timings: Timings, elapsed: float) -> dict[str, object]:
    """The last fields of an answer: why it ended, its counts, and its times in nanoseconds.

    `elapsed` is our own clock's, in seconds, for providers that do not tell. What nobody measured is left out.
    """
    total = elapsed if timings.total is None else timings.total
    first = timings.time_to_first_token
    prefill = timings.prefill
    if prefill is None and first is not None:
        prefill = max(0.0, first - (timings.queued or 0.0) - (timings.load or 0.0))
    decode = timings.decode
    if decode is None and first is not None:
        decode = max(0.0, total - first)
    fields: dict[str, object] = {
        "done": True,
        "done_reason": _DONE_REASONS.get(reason, reason),
        "total_duration": _nanoseconds(total),
        "load_duration": _nanoseconds(timings.load),
        "prompt_eval_count": usage.prompt_tokens,
        "prompt_eval_cached_count": usage.cached_tokens or None,
        "prompt_eval_duration": _nanoseconds(prefill),
        "eval_count": usage.completion_tokens,
        "eval_duration": _nanoseconds(decode),
    }
    return {name: value for name, value in fields.items() if value is not None}


def _nanoseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1e9)


def tool_calls(calls: Sequence[ToolCall], reason: FinishReason) -> list[dict[str, object]]:
    """The calls with their arguments as objects. One that `max_tokens` cut off is left out; the reason tells.

    Errors: ProviderError where a model ended a call whose arguments are no JSON object.
    """
    written: list[dict[str, object]] = []
    for position, call in enumerate(calls):
        try:
            arguments = msgspec.json.decode(call.arguments or "{}", type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError) as exc:
            if reason == "length":
                continue
            raise ProviderError(
                f"the model called {call.name!r} with arguments that are no JSON object, which Ollama's API cannot "
                f"carry: {exc}",
                code="malformed_tool_call",
            ) from exc
        written.append({"id": call.id, "function": {"index": position, "name": call.name, "arguments": arguments}})
    return written


def logprobs(tokens: Sequence[TokenLogprob]) -> list[dict[str, object]]:
    return [
        {
            **_token(token.token, token.logprob),
            "top_logprobs": [_token(text, logprob) for _, text, logprob in token.top],
        }
        for token in tokens
    ]


def _token(text: str, logprob: float) -> dict[str, object]:
    fields: dict[str, object] = {"token": text, "logprob": logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB}
    # A token that is part of a character reads as U+FFFD: its bytes are not known here.
    return fields if "\ufffd" in text else fields | {"bytes": list(text.encode("utf-8", "replace"))}


def loaded_body(model: str, *, unloaded: bool, is_chat: bool) -> bytes:
    """The answer to a request that only has a model loaded or unloaded."""
    fields = {"message": {"role": "assistant", "content": ""}} if is_chat else {"response": ""}
    return encode(
        {"model": model, "created_at": now(), **fields, "done": True, "done_reason": UNLOAD if unloaded else LOAD}
    )


def embed_body(model: str, response: EmbeddingResponse | None, elapsed: float) -> bytes:
    """The answer of `/api/embed`, after `elapsed` seconds; `response` None where there was nothing to embed."""
    if response is None:
        return encode({"model": model, "embeddings": []})
    return encode(
        {
            "model": response.model,
            "embeddings": [list(vector) for vector in response.vectors],
            "total_duration": _nanoseconds(elapsed),
            "prompt_eval_count": response.usage.prompt_tokens,
        }
    )


def older_embed_body(model: str, response: EmbeddingResponse | None, elapsed: float) -> bytes:
    """The answer of `/api/embeddings`, which has one vector."""
    return encode({"embedding": [] if response is None else list(response.vectors[0])})


def tags_body(models: Mapping[str, ModelInfo]) -> bytes:
    """The listing of `/api/tags`: `models` under the names by which they are asked for here."""
    return encode({"models": [_listed(name, model) for name, model in models.items()]})


def ps_body(models: Mapping[str, ModelInfo]) -> bytes:
    """The listing of `/api/ps`: those that are in memory."""
    running = {name: model for name, model in models.items() if model.is_loaded}
    extra = ("size_vram", "expires_at")
    return encode(
        {
            "models": [
                _listed(name, model)
                | {key: model.details[key] for key in extra if key in model.details}
                | ({} if (length := _loaded_context(model)) is None else {"context_length": length})
                for name, model in running.items()
            ]
        }
    )


def _loaded_context(model: ModelInfo) -> int | None:
    return model.details.get("loaded_context_length", model.context_length)


def _listed(name: str, model: ModelInfo) -> dict[str, object]:
    fields: dict[str, object] = {"name": name, "model": name}
    if "modified_at" in model.details:
        fields["modified_at"] = model.details["modified_at"]
    elif model.created:
        fields["modified_at"] = datetime.fromtimestamp(model.created, UTC).isoformat().replace("+00:00", "Z")
    fields |= {key: model.details[key] for key in ("size", "digest") if key in model.details}
    return fields | {"details": _details(model)}


def _details(model: ModelInfo) -> dict[str, object]:
    return {key: model.details[key] for key in _DETAILS if key in model.details}


def show_body(model: ModelInfo) -> bytes:
    """What `/api/show` says of a model: what its provider tells of it, and no more."""
    info = dict(model.details.get("model_info") or {})
    architecture = info.setdefault("general.architecture", model.details.get("family") or model.provider)
    if model.context_length is not None:
        info[f"{architecture}.context_length"] = model.context_length
    fields: dict[str, object] = {
        "details": _details(model),
        "model_info": info,
        "capabilities": model.details.get("capabilities") or ["completion"],
    }
    passed = ("license", "modelfile", "parameters", "template", "system", "modified_at")
    return encode(fields | {key: model.details[key] for key in passed if key in model.details})


def version_body() -> bytes:
    return encode({"version": API_VERSION})
