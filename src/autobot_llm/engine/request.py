"""What goes into the engine and what comes out: requests, pieces of answers, figures. Knows sampling parameters; knows
nothing of how they are followed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from autobot_llm.engine.sequence import SamplingParams
from autobot_llm.errors import LLMError

EndReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One prompt, to be continued once per entry of `params` (the choices; they differ in their seeds only).

    `priority`: lower goes sooner, where the scheduling policy heeds it. `shown_ids` are special tokens that the text
    is to contain, as markers of tool calls.
    """

    prompt_ids: list[int]
    params: tuple[SamplingParams, ...]
    stop: tuple[str, ...] = ()
    salt: str = ""
    priority: int = 0
    shown_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """A sampled token with its log probability and its best alternatives (id, log probability), best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True)
class Output:
    """What one step added to one choice. With `end` or `error` the choice is over and its blocks are free.

    `stop_string` is the one of the request's that ended it, if one did.

    One is made for each token, which is why it is not frozen: that would take three times as long.
    """

    request_id: int
    index: int
    text: str
    num_tokens: int
    logprobs: tuple[TokenInfo, ...] = ()
    end: EndReason | None = None
    error: LLMError | None = None
    stop_string: str | None = None


@dataclass(slots=True)
class RequestStats:
    """What happened to a request on its way, for its report. Times are from time.monotonic()."""

    arrival_time: float = 0.0
    first_scheduled_time: float | None = None
    queue_position: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_evicted_tokens: int = 0
    """Those of all choices that had left the cache before their answers ended."""
    largest_batch: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    seconds_saved: float = 0.0
    """By drafts: the plain steps' measured time for its tokens, less what the steps with drafts took."""
