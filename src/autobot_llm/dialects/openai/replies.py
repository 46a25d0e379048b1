"""Write answers in OpenAI's shapes: whole bodies, errors, models. Knows the wire; knows nothing of connections."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from autobot_llm.dialects.bodies import encode
from autobot_llm.errors import LLMError
from autobot_llm.report import OptimizationOutcome
from autobot_llm.types import Choice, LLMResponse, ModelInfo, Timings, TokenLogprob, ToolCall, Usage

LOWEST_LOGPROB = -9999.0  # what OpenAI writes for a token that could not be chosen; JSON has no infinity


def error_body(error: LLMError) -> bytes:
    """The JSON of an error, as OpenAI's clients read it."""
    fields = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return encode({"error": fields})


def usage_fields(usage: Usage) -> dict[str, object]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def report_fields(timings: Timings, optimizations: tuple[OptimizationOutcome, ...]) -> dict[str, object]:
    """What we add to OpenAI's shape, under the key "autobot": times in seconds, and the report."""
    return {"timings": timings, "optimizations": optimizations}


class Reply(ABC):
    """The body of a whole answer to the request `request_id`.

    What `lasting` makes of an answer is the same each time that the answer is given, whoever gets it; `body` puts it
    between what is not.
    """

    form: str
    id_prefix: str

    def __init__(self, request_id: str, created: int) -> None:
        self._id = self.id_prefix + request_id
        self._created = created

    def lasting(self, response: LLMResponse) -> bytes:
        fields = {
            "model": response.model,
            "choices": [self._choice(choice) for choice in response.choices],
            "usage": usage_fields(response.usage),
        }
        return encode(fields)[1:-1]

    def body(self, lasting: bytes, response: LLMResponse) -> bytes:
        head = encode({"id": self._id, "object": self.form, "created": self._created})
        report = encode({"autobot": report_fields(response.timings, response.optimizations)})
        return b"%b,%b,%b" % (head[:-1], lasting, report[1:])

    @abstractmethod
    def _choice(self, choice: Choice) -> dict[str, object]: ...


class ChatReply(Reply):
    """A whole chat completion."""

    form = "chat.completion"
    id_prefix = "chatcmpl-"

    def _choice(self, choice: Choice) -> dict[str, object]:
        return {
            "index": choice.index,
            "message": _message(choice),
            "logprobs": chat_logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
            **_stop_reason(choice),
        }


class CompletionReply(Reply):
    """A whole text completion."""

    form = "text_completion"
    id_prefix = "cmpl-"

    def _choice(self, choice: Choice) -> dict[str, object]:
        return {
            "index": choice.index,
            "text": choice.content,
            "logprobs": completion_logprobs(choice.logprobs, text_offset=0),
            "finish_reason": choice.finish_reason,
            **_stop_reason(choice),
        }


def _message(choice: Choice) -> dict[str, object]:
    message: dict[str, object] = {
        "role": "assistant",
        "content": choice.content,
        "refusal": choice.refusal or None,
    }
    if choice.reasoning:
        message["reasoning_content"] = choice.reasoning
    if choice.refusal or choice.tool_calls:
        message["content"] = choice.content or None
    if choice.tool_calls:
        message["tool_calls"] = [_tool_call(call) for call in choice.tool_calls]
    return message


def _stop_reason(choice: Choice) -> dict[str, object]:
    """The stop string that ended the choice, under the name that vLLM gives it."""
    return {} if choice.stop_sequence is None else {"stop_reason": choice.stop_sequence}


def _tool_call(call: ToolCall) -> dict[str, object]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def chat_logprobs(logprobs: tuple[TokenLogprob, ...]) -> dict[str, object] | None:
    if not logprobs:
        return None
    content = [
        _chat_token(token.token, token.logprob)
        | {"top_logprobs": [_chat_token(text, logprob) for _, text, logprob in token.top]}
        for token in logprobs
    ]
    return {"content": content, "refusal": None}


def _chat_token(text: str, logprob: float) -> dict[str, object]:
    # A token that is part of a character reads as U+FFFD: its bytes are not known here, and null says so.
    spelled = None if "\ufffd" in text else list(text.encode("utf-8", "replace"))
    return {"token": text, "logprob": _finite(logprob), "bytes": spelled}


def completion_logprobs(logprobs: tuple[TokenLogprob, ...], *, text_offset: int) -> dict[str, object] | None:
    """OpenAI's older shape, in columns. `text_offset` is where the first token begins, in characters of the answer."""
    if not logprobs:
        return None
    offsets = []
    for token in logprobs:
        offsets.append(text_offset)
        text_offset += len(token.token)
    return {
        "tokens": [token.token for token in logprobs],
        "token_logprobs": [_finite(token.logprob) for token in logprobs],
        "top_logprobs": [_best(token) for token in logprobs] if logprobs[0].top else None,
        "text_offset": offsets,
    }


def _best(token: TokenLogprob) -> dict[str, float]:
    return {text: _finite(logprob) for _, text, logprob in token.top} | {token.token: _finite(token.logprob)}


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB) if not math.isnan(logprob) else LOWEST_LOGPROB


def model_fields(model: ModelInfo) -> dict[str, object]:
    fields: dict[str, object] = {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": model.provider,
    }
    if model.context_length is not None:
        fields["max_model_len"] = model.context_length  # the name vLLM gives it
    return fields
