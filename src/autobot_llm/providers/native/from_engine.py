"""The engine's outputs as events, and the report at the end. Knows both sides' types."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

from autobot_llm.engine.description import DescribedExecutor
from autobot_llm.engine.engine import Engine
from autobot_llm.engine.request import Output, RequestStats
from autobot_llm.engine.tool_calls.json_call import CallArguments, Piece, Text
from autobot_llm.engine.tool_calls.parser import ToolCallParser
from autobot_llm.providers.native.answer_shape import Tools
from autobot_llm.providers.native.optimizations import why_no_prefixes
from autobot_llm.report import OptimizationOutcome
from autobot_llm.types import ChoiceEnd, Finish, FinishReason, TextDelta, Timings, TokenLogprob, ToolCallDelta, Usage


class Answer:
    """One request's answer as it grows. `stats` is complete once every choice has ended. Without `tools` no text is
    taken for a call of one."""

    def __init__(
        self, engine: Engine, stats: RequestStats, *, num_prompt_tokens: int, tools: Tools | None = None
    ) -> None:
        self._engine = engine
        self._stats = stats
        self._num_prompt_tokens = num_prompt_tokens
        self._tools = tools
        self._parsers: dict[int, ToolCallParser] = {}
        self._num_tokens: dict[int, int] = {}
        self._first_token_time: float | None = None

    def events(self, outputs: list[Output]) -> Iterator[TextDelta | ToolCallDelta | ChoiceEnd]:
        """What became visible, a choice's consecutive pieces joined: a slow reader gets fewer and longer deltas."""
        if self._first_token_time is None:
            self._first_token_time = time.monotonic()
        by_choice: dict[int, list[Output]] = {}
        for output in outputs:
            by_choice.setdefault(output.index, []).append(output)
        for index, parts in by_choice.items():
            last = parts[-1]
            self._num_tokens[index] = last.num_tokens
            text = "".join(part.text for part in parts)
            logprobs = tuple(logprob for part in parts for logprob in self._described(part))
            if self._tools is not None:
                yield from self._with_calls(self._tools, last, text, logprobs)
                continue
            if text or logprobs:
                yield TextDelta(text, index, logprobs)
            if last.end is not None:
                yield ChoiceEnd(finish_reason=last.end, index=index, stop_sequence=last.stop_string)

    def _with_calls(
        self, tools: Tools, last: Output, text: str, logprobs: tuple[TokenLogprob, ...]
    ) -> Iterator[TextDelta | ToolCallDelta | ChoiceEnd]:
        """A choice's text with the calls in it told apart. Log probabilities cover both, in the order of the tokens."""
        index = last.index
        if (parser := self._parsers.get(index)) is None:
            parser = self._parsers[index] = tools.form.parser(tools.functions)
        pieces = parser.push(text)
        if last.end is not None:
            pieces += parser.finish()
        if logprobs and not any(isinstance(piece, Text) for piece in pieces):
            yield TextDelta("", index, logprobs)
        for delta in _deltas(pieces, index, tools):
            if isinstance(delta, TextDelta):
                yield TextDelta(delta.text, index, logprobs)
                logprobs = ()
            else:
                yield delta
        if last.end is not None:
            has_called = parser.num_calls > 0 and last.end == "stop"
            reason: FinishReason = "tool_calls" if has_called else last.end
            yield ChoiceEnd(finish_reason=reason, index=index, stop_sequence=last.stop_string)

    def finish(self) -> Finish:
        stats = self._stats
        usage = Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=sum(self._num_tokens.values()),
            cached_tokens=stats.num_cached_tokens,
        )
        return Finish(usage=usage, timings=self._timings(), optimizations=tuple(self._outcomes()))

    def _described(self, output: Output) -> Iterator[TokenLogprob]:
        text_of = self._engine.tokenizer.token_text
        for info in output.logprobs:
            top = tuple((token_id, text_of(token_id), logprob) for token_id, logprob in info.top)
            yield TokenLogprob(info.token_id, text_of(info.token_id), info.logprob, top)

    def _timings(self) -> Timings:
        stats = self._stats

        def since_arrival(moment: float | None) -> float | None:
            return None if moment is None else moment - stats.arrival_time

        return Timings(
            queued=since_arrival(stats.first_scheduled_time),
            queue_position=stats.queue_position,
            time_to_first_token=since_arrival(self._first_token_time),
            total=since_arrival(time.monotonic()),
        )

    def _outcomes(self) -> Iterable[OptimizationOutcome]:
        stats, engine = self._stats, self._engine
        pool = engine.scheduler.block_pool
        cached = stats.num_cached_tokens
        if not pool.prefix_caching:
            reason = why_no_prefixes(engine)
        elif cached:
            reason = f"{cached} of {self._num_prompt_tokens} prompt tokens were in the cache"
        else:
            reason = "no earlier prompt of this tenant begins with the same full block of tokens"
        yield OptimizationOutcome(
            name="prefix_caching", applied=cached > 0, reason=reason, tokens_saved=cached if cached else None
        )
        others = stats.largest_batch - 1
        yield OptimizationOutcome(
            name="continuous_batching",
            applied=others > 0,
            reason=f"shared steps with up to {others} other sequences"
            if others > 0
            else "nobody else was being served",
        )
        yield self._speculation()
        if (line := self._cache()) is not None:
            yield line
        executor = engine.executor
        yield OptimizationOutcome(name="compiled_step", applied=executor.name == "compiled", reason=executor.reason)
        if isinstance(executor, DescribedExecutor):
            gpu = executor.description
            yield OptimizationOutcome(name="cuda_graphs", applied=gpu.num_graphs > 0, reason=gpu.graphs)
            yield OptimizationOutcome(
                name="flash_attention",
                applied=gpu.attention != "sdpa",
                reason=f"{gpu.attention}: {gpu.attention_reason}",
            )

    def _cache(self) -> OptimizationOutcome | None:
        """What a smaller cache saved for this answer when it was longest; None where nothing makes it smaller."""
        cache, num_evicted = self._engine.cache, self._stats.num_evicted_tokens
        lines = [] if cache is None else list(cache.lines())
        if cache is None or not lines:
            return None
        num_tokens = sum(self._num_prompt_tokens + count for count in self._num_tokens.values())
        left = f"; {num_evicted:,} of {num_tokens:,} tokens had left the cache" if cache.policy.num_kept_tokens else ""
        saved = cache.bytes_saved(num_tokens, num_evicted)
        return OptimizationOutcome(
            name="kv_cache_optimization",
            applied=saved > 0,
            reason="; ".join(lines) + left,
            bytes_saved=saved or None,
            lossy=cache.is_lossy and saved > 0,
        )

    def _speculation(self) -> OptimizationOutcome:
        """What drafts did for this answer. The time is an estimate from measured plain steps of as many sequences."""
        stats, speculator = self._stats, self._engine.speculator
        proposed, accepted = stats.num_draft_tokens, stats.num_accepted_tokens
        if speculator is None or not proposed:
            reason = "no draft was worth its time" if speculator is not None else self._engine.speculation_reason
            return OptimizationOutcome(name="speculative_decoding", applied=False, reason=reason)
        num_tokens = sum(self._num_tokens.values())
        per_step = num_tokens / max(1, num_tokens - accepted)
        return OptimizationOutcome(
            name="speculative_decoding",
            applied=True,
            reason=f"{accepted} of {proposed} drafted tokens accepted, {per_step:.2f} tokens per step; the time is "
            "estimated from measured plain steps",
            milliseconds_saved=round(stats.seconds_saved * 1e3, 3),
        )


def _deltas(pieces: Sequence[Piece], index: int, tools: Tools) -> Iterator[TextDelta | ToolCallDelta]:
    for piece in pieces:
        if isinstance(piece, Text):
            yield TextDelta(piece.text, index)
        elif isinstance(piece, CallArguments):
            yield ToolCallDelta(position=piece.position, index=index, arguments=piece.text)
        else:
            yield ToolCallDelta(position=piece.position, index=index, call_id=tools.form.call_id(), name=piece.name)
