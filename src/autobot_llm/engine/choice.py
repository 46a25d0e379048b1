"""One choice of a request: its sequence, and the text that its tokens have become. Knows tokens and text; knows nothing
of steps, and leaves it to its owner to let the sequence go at the end.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field

from autobot_llm.engine.detokenizer import Detokenizer
from autobot_llm.engine.request import EndReason, Output, RequestStats, TokenInfo
from autobot_llm.engine.sampler import Outcome, SampledToken, SamplingFailure
from autobot_llm.engine.sequence import Sequence
from autobot_llm.errors import EngineError, LLMError


@dataclass(slots=True, eq=False)
class Choice:
    """What the engine keeps of a choice. An output with `end` or `error` is its last one."""

    request_id: int
    index: int
    sequence: Sequence
    detokenizer: Detokenizer
    stats: RequestStats
    num_tokens: int = 0
    withheld_logprobs: list[TokenInfo] = field(default_factory=list)

    def take(self, token_id: int, info: TokenInfo | None, num_tokens: int) -> Output:
        """What the next token adds, the choice's `num_tokens`-th."""
        self.num_tokens = num_tokens
        params, detokenizer = self.sequence.params, self.detokenizer
        may_end = num_tokens >= params.min_tokens
        if may_end and token_id in params.stop_token_ids:
            return self.end(detokenizer.flush(), "stop")
        if info is not None:
            self.withheld_logprobs.append(info)
        matcher = self.sequence.matcher
        if matcher is not None and not matcher.advance(token_id):
            return self.fail(EngineError(f"token {token_id} was chosen, which the grammar of {matcher.field} forbids"))
        text = detokenizer.push(token_id, match_stop=may_end)
        if detokenizer.stop_string is not None:
            return self.end(text, "stop")
        if matcher is not None and matcher.is_complete:
            return self.end(text + detokenizer.flush(), "stop")
        if num_tokens >= params.max_tokens:
            return self.end(text + detokenizer.flush(), "length")
        if not text or not self.withheld_logprobs:
            return Output(self.request_id, self.index, text, num_tokens)
        # Text held back (half a character, the beginning of a stop string) holds its log probabilities back too.
        logprobs = tuple(self.withheld_logprobs)
        self.withheld_logprobs.clear()
        return Output(self.request_id, self.index, text, num_tokens, logprobs)

    def take_several(self, outcomes: SequenceABC[Outcome], num_before: int) -> Output:
        """What tokens add one after the other, until the choice ends. `num_before`: its tokens so far."""
        parts: list[Output] = []
        for num_tokens, outcome in enumerate(outcomes, num_before + 1):
            if isinstance(outcome, SamplingFailure):
                parts.append(self.fail(outcome.error))
                break
            parts.append(self.take(outcome.token_id, info_of(outcome), num_tokens))
            if parts[-1].end is not None or parts[-1].error is not None:
                break
        whole = parts[-1]
        if len(parts) > 1:
            whole.text = "".join(part.text for part in parts)
            whole.logprobs = tuple(info for part in parts for info in part.logprobs)
        return whole

    def may_end(self, outcomes: SequenceABC[Outcome], num_before: int) -> bool:
        """Whether these tokens may be the last ones; if not, none of them is."""
        stop_ids = self.sequence.params.stop_token_ids
        return (
            self.detokenizer.has_stop_strings
            or self.sequence.matcher is not None
            or num_before + len(outcomes) >= self.sequence.params.max_tokens
            or any(isinstance(one, SamplingFailure) or one.token_id in stop_ids for one in outcomes)
        )

    def sum_up(self) -> None:
        """Book what became of the sequence, once it has left."""
        sequence, stats = self.sequence, self.stats
        stats.num_preemptions += sequence.num_preemptions
        stats.num_evicted_tokens += sequence.num_evicted_tokens
        if self.index == 0:
            stats.num_cached_tokens = sequence.num_cached_tokens
            stats.first_scheduled_time = sequence.first_scheduled_time

    def end(self, text: str, reason: EndReason) -> Output:
        stop = self.detokenizer.stop_string if reason == "stop" else None
        logprobs = tuple(self.withheld_logprobs)
        return Output(self.request_id, self.index, text, self.num_tokens, logprobs, reason, None, stop)

    def fail(self, error: LLMError) -> Output:
        logprobs = tuple(self.withheld_logprobs)
        return Output(self.request_id, self.index, "", self.num_tokens, logprobs, error=error)


def info_of(token: SampledToken) -> TokenInfo | None:
    return None if token.logprob is None else TokenInfo(token.token_id, token.logprob, token.top)
