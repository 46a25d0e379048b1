"""What goes into a model and what comes out of it. Knows shapes; knows nothing of providers or of HTTP.

A request is one frozen `LLMRequest`. An answer is a stream of events, always in this order:

    Start, (TextDelta | ReasoningDelta | RefusalDelta | ToolCallDelta)*, one ChoiceEnd for each choice, Finish

and `LLMResponse` is what `collect` makes of them. Embeddings are asked for and answered whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from autobot_llm.report import OptimizationOutcome

Role = Literal["system", "developer", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


class ChatMessage(msgspec.Struct, kw_only=False, omit_defaults=True):
    """One turn of a conversation. `content` is text, or OpenAI content parts, or None beside `tool_calls`."""

    role: Role
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class CacheControl(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What a request wants of kept answers; naming it at all lets an answer be reused that was drawn at random.

    `bypass` neither reads nor keeps one, `refresh` has a new one made and kept, `only-if-cached` fails with NotCached
    where there is none. `ttl` is how many seconds the answer may be given again (None: the settings'), `max_age` how
    many seconds ago the one that this request gets may have been made. `semantic` false takes no answer to another
    question, where the settings allow such.
    """

    mode: Literal["default", "bypass", "refresh", "only-if-cached"] = "default"
    semantic: bool = True
    ttl: float | None = None
    max_age: float | None = None


class LLMRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Everything that determines one answer. None means "the provider's or the model's own default".

    Exactly one of `messages` (a conversation, put through the model's chat template) and `prompt` (text to
    continue, or token ids) is given. `n` is the number of independent choices. `tenant` separates callers whose
    caches must not touch. `timeout` is in seconds, for the whole answer. `logprobs=k` asks for the chosen
    token's log probability and the k best ones'. `priority`: a lower one is served sooner, where the engine heeds it.
    `extra_body` holds fields of one provider's own, which the others refuse. `service_options` are OpenAI's notes to
    its service (`user`, `store`, `service_tier`, ...): they change no answer, and mean nothing to other providers.
    """

    messages: list[ChatMessage] | None = None
    prompt: str | list[int] | None = None
    model: str | None = None
    provider: str | None = None
    llm_type: str = "general"
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: list[str] = msgspec.field(default_factory=list)
    stop_token_ids: list[int] = msgspec.field(default_factory=list)
    ignore_eos: bool = False
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)
    n: int = 1
    logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    stream: bool = False
    timeout: float | None = None
    priority: int = 0
    tenant: str = ""
    metadata: dict[str, Any] = msgspec.field(default_factory=dict)
    request_id: str | None = None
    extra_body: dict[str, Any] = msgspec.field(default_factory=dict)
    service_options: dict[str, Any] = msgspec.field(default_factory=dict)
    cache: CacheControl | None = None

    @property
    def num_choices(self) -> int:
        """How many choices the answer has."""
        return self.n

    @property
    def has_side_effects(self) -> bool:
        """Whether answering twice does more than cost twice: the service keeps the answer, or runs tools itself."""
        wishes = (self.service_options, self.extra_body)
        if any(fields.get("store") or fields.get("background") for fields in wishes):
            return True
        return "mcp_servers" in self.extra_body or any(
            tool.get("type", "function") != "function" for tool in self.tools or ()
        )


class MergedRequest(LLMRequest, frozen=True, kw_only=True, omit_defaults=True):
    """Requests that are alike but for their prompts, as one: `prompts` are all of them, `prompt` the first.

    Choice `i` of prompt `p` is choice `p * n + i` of the answer. Only for providers that take lists of prompts
    (`TakesPromptLists`); `cloud/batched_completions.py` makes it and takes its answer apart.
    """

    prompts: list[str | list[int]]

    @property
    def num_choices(self) -> int:
        return self.n * len(self.prompts)


class SecondCall(LLMRequest, frozen=True, kw_only=True, omit_defaults=True):
    """A request that is under way already and slow to begin; where there are several servers, another one takes it."""


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Texts, or lists of token ids, to be turned into one vector each. None means the provider's own default.

    `dimensions` is the length of the vectors, where the model offers a choice. `timeout` is in seconds. `cache` says
    what is wanted of kept vectors; None reuses and keeps them.
    """

    inputs: list[str | list[int]]
    model: str | None = None
    provider: str | None = None
    dimensions: int | None = None
    timeout: float | None = None
    tenant: str = ""
    request_id: str | None = None
    extra_body: dict[str, Any] = msgspec.field(default_factory=dict)
    cache: CacheControl | None = None


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts. `completion_tokens` sums all choices, and `reasoning_tokens` of them were never part of the text.

    `prompt_tokens` is the whole prompt: `cached_tokens` of it were not computed again, and `cache_write_tokens` were
    put into the provider's cache, where the provider charges for that.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class TokenLogprob(msgspec.Struct, frozen=True):
    """One generated token: its id, text, log probability (natural logarithm) and the best alternatives at its place."""

    token_id: int
    token: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request's time went, in seconds; None where the provider does not tell.

    `queue_position` is how many requests were ahead at arrival. `load` went into loading the model, `prefill` into the
    prompt and `decode` into the answer's tokens.
    """

    queued: float | None = None
    queue_position: int | None = None
    time_to_first_token: float | None = None
    total: float | None = None
    load: float | None = None
    prefill: float | None = None
    decode: float | None = None


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """The request was accepted: which model and provider answer it.

    `reused` is the report's line where the answer is the kept one to another question.
    """

    request_id: str
    model: str
    provider: str
    reused: OptimizationOutcome | None = None


class TextDelta(msgspec.Struct, frozen=True):
    """More text of one choice. `logprobs` covers the tokens that completed in this delta, if asked for."""

    text: str
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


class ReasoningDelta(msgspec.Struct, frozen=True):
    """More of what a model thinks before it answers.

    `signature` is the provider's proof that the reasoning is its own, to be sent back with it in the next turn; it
    comes once for a block of reasoning, with its last piece or after it.
    """

    text: str
    index: int = 0
    signature: str | None = None


class RefusalDelta(msgspec.Struct, frozen=True):
    """More of the sentence with which a model declines to answer, from providers that keep it apart from the text."""

    text: str
    index: int = 0


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a tool call: `call_id` and `name` come with the first piece, `arguments` (JSON text) in pieces."""

    position: int
    index: int = 0
    call_id: str | None = None
    name: str | None = None
    arguments: str = ""


class ChoiceEnd(msgspec.Struct, frozen=True, kw_only=True):
    """One choice is complete. `stop_sequence` is the stop string that ended it, where the provider tells."""

    finish_reason: FinishReason
    index: int = 0
    stop_sequence: str | None = None


class Finish(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer is complete. Without it, the stream was cut short and nothing may be cached.

    `fallback_used` says that another model than the one asked for has answered, in its stead.
    """

    usage: Usage
    timings: Timings = Timings()
    optimizations: tuple[OptimizationOutcome, ...] = ()
    fallback_used: bool = False


Event = Start | TextDelta | ReasoningDelta | RefusalDelta | ToolCallDelta | ChoiceEnd | Finish


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A finished tool call; `arguments` is the JSON text exactly as the model wrote it."""

    id: str
    name: str
    arguments: str


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """One of the `n` answers to a request."""

    index: int
    content: str
    finish_reason: FinishReason
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    reasoning: str = ""
    reasoning_signature: str | None = None
    refusal: str = ""
    stop_sequence: str | None = None


class LLMResponse(msgspec.Struct, frozen=True, kw_only=True):
    """A complete answer; `content`, `reasoning`, `tool_calls` and `finish_reason` are the first choice's.

    Times are in seconds.

    Callers of the older interface may read it as a mapping: `response["content"]`, `response.get("content")`.
    """

    content: str
    model: str
    provider: str
    usage: Usage
    finish_reason: FinishReason
    choices: tuple[Choice, ...]
    request_id: str
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str = ""
    cached: bool = False
    fallback_used: bool = False
    processing_time: float = 0.0
    time_to_first_token: float | None = None
    timings: Timings = Timings()
    optimizations: tuple[OptimizationOutcome, ...] = ()

    def __getitem__(self, key: str) -> Any:
        if key not in self.__struct_fields__:
            raise KeyError(key)
        return getattr(self, key)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self.__struct_fields__ else default


class EmbeddingResponse(msgspec.Struct, frozen=True, kw_only=True):
    """One vector for each input, in the inputs' order.

    Of `usage.prompt_tokens`, `cached_tokens` belong to vectors that were there and were not charged again.
    """

    vectors: tuple[Sequence[float], ...]
    model: str
    provider: str
    usage: Usage
    request_id: str
    optimizations: tuple[OptimizationOutcome, ...] = ()


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One model a provider serves. `context_length` is in tokens; None where the provider does not tell.

    `is_loaded` says whether the model is in memory now. `details` is what the provider tells besides, under its names.
    """

    id: str
    provider: str
    context_length: int | None = None
    created: int = 0
    is_loaded: bool | None = None
    details: dict[str, Any] = msgspec.field(default_factory=dict)
