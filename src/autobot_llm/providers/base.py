"""What every provider can do, in the fewest verbs. Knows requests and events; knows nothing of any one provider."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from typing import Literal, Protocol, runtime_checkable

import msgspec

from autobot_llm.dialects.rate_limits import RateLimits
from autobot_llm.report import OptimizationOutcome
from autobot_llm.types import EmbeddingRequest, EmbeddingResponse, Event, LLMRequest, ModelInfo

__all__ = [
    "Embedder",
    "Link",
    "ModelInfo",
    "ModelLoader",
    "Provider",
    "ProviderStatus",
    "ScoredToken",
    "Streamer",
    "TakesPromptLists",
    "TellsOptimizations",
    "TellsRateLimits",
    "TellsRevision",
    "TextScorer",
    "TokenCounter",
]


class ProviderStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a provider can answer now. `details` holds figures worth showing, by name."""

    name: str
    state: Literal["ready", "starting", "stopped", "failed"]
    message: str = ""
    details: dict[str, float | int | str] = msgspec.field(default_factory=dict)


class Streamer(Protocol):
    """The one verb of the chain: a provider, and every optimization that wraps one.

    Closing the returned generator (`aclose`, or cancelling the task that reads it) gives the work up at once and
    frees what it held. Errors are raised from the generator as `LLMError`s, before `Start` where possible.
    """

    def stream(self, request: LLMRequest) -> AsyncGenerator[Event, None]: ...


class OnProgress(Protocol):
    """Hears, from any thread, how far loading a model is.

    `phase` is "weights" (counted in bytes), "kernels" or "graphs" (in pieces); `num_total` is 0 where nobody knows.
    """

    def __call__(self, phase: str, num_done: int, num_total: int) -> None: ...


class Link(ABC):
    """One optimization, made once for an interface and put around the chain of each of its providers by `wrap`.

    What the chains of all providers share (a store, limits, figures) lives in it. `start` and `close` may be called
    more than once, and a closed one may be started again.
    """

    async def start(self) -> None:  # noqa: B027  # most links have nothing to open or close
        """Open what it needs, before the first request. What it cannot open now must not fail requests."""

    async def close(self) -> None:  # noqa: B027
        """Give back what `start` opened. Called after every provider has been closed."""

    @abstractmethod
    def wrap(self, chain: Streamer, provider: Provider) -> Streamer:
        """`chain`, which ends in `provider`, with this optimization in front."""

    def wrap_embedder(self, embedder: Embedder, provider: Provider) -> Embedder:
        """`embedder`, which ends in `provider`, with this optimization in front; called after `wrap`."""
        return embedder

    def state(self) -> tuple[bool, str]:
        """Whether it acts on a request that does not name it, and why, for the table of what runs."""
        return True, "it runs in front of the provider"

    def metrics(self) -> dict[str, float]:
        """Current figures by name, as a provider's are."""
        return {}

    def metrics_of(self, provider: str) -> dict[str, float]:
        """Current figures of the chain of one provider, which are shown with the provider's own."""
        return {}


class Provider(Streamer, Protocol):
    """A place where answers come from. `start` and `close` may be called more than once."""

    name: str

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def models(self) -> list[ModelInfo]: ...

    def status(self) -> ProviderStatus: ...

    def metrics(self) -> dict[str, float]:
        """Current figures by name, for the metrics endpoint; names are listed in observability/metrics.py."""
        ...


@runtime_checkable
class Embedder(Protocol):
    """What a provider that makes embeddings can do besides. Cancelling the call gives it up at the provider too."""

    async def embed(self, request: EmbeddingRequest) -> EmbeddingResponse: ...


@runtime_checkable
class ModelLoader(Protocol):
    """What a provider that can move models into memory, and out of it, can do besides."""

    async def load(
        self, model: str | None, *, keep_alive: str | float | None = None, num_ctx: int | None = None
    ) -> None:
        """Have `model` (None: the default one) in memory with a context of `num_ctx` tokens at least.

        `keep_alive` says for how long after its last use, as Ollama writes it; 0 takes it out of memory.
        """
        ...


@runtime_checkable
class ConnectsAhead(Protocol):
    """What a provider over TLS can do besides: connect before it is asked."""

    async def warm(self, seconds: float) -> None:
        """Have a connection ready for the first request, within `seconds`. Raises ProviderError."""
        ...


@runtime_checkable
class TokenCounter(Protocol):
    """What a provider that knows the length of a prompt before it is computed can do besides."""

    async def count_tokens(self, request: LLMRequest) -> int:
        """The number of tokens of the request's prompt. What `stream` would refuse in a prompt is refused here too."""
        ...


@runtime_checkable
class TakesPromptLists(Protocol):
    """What a provider has whose `stream` understands a `MergedRequest`."""

    takes_prompt_lists: Literal[True]


@runtime_checkable
class TellsRateLimits(Protocol):
    """What a provider can do besides whose answers tell how much more it may be asked."""

    def rate_limits_of(self, model: str | None) -> RateLimits | None:
        """What was told with the latest answer of `model` (None: the default one)."""
        ...


@runtime_checkable
class TellsRevision(Protocol):
    """What a provider can do besides that notices when a model is replaced by another of the same name."""

    def revision(self, model: str | None) -> str:
        """What tells the present weights of `model` (None: the default one) from others; empty where not known."""
        ...


@runtime_checkable
class TellsOptimizations(Protocol):
    """What a provider can do besides that knows which optimizations run in it; the names are the router's."""

    def engine_version(self) -> str | None:
        """The version of the engine behind it; None while it is not known."""
        ...

    def optimizations(self) -> list[OptimizationOutcome]:
        """For each optimization that it can speak about: whether it runs now, and why."""
        ...


class ScoredToken(msgspec.Struct, frozen=True):
    """One token of a text: the characters [start, end) that it stands for, and its log probability (natural logarithm).

    `logprob` is None for a text's first token where nothing goes before it.
    """

    start: int
    end: int
    logprob: float | None


@runtime_checkable
class TextScorer(Protocol):
    """What a provider can do besides that tells how likely its model finds a given text, and how many tokens it has."""

    async def score(self, text: str, *, before: str = "", model: str | None = None) -> tuple[ScoredToken, ...]:
        """Each token of `text`, as it follows what goes before it in `text` and in `before`.

        Of a text longer than the model's context each token follows what fits, at least half of the context.
        """
        ...

    async def text_counter(self, model: str | None = None) -> Callable[[str], int]:
        """What counts the tokens of a text as the model does, nothing put around it."""
        ...
