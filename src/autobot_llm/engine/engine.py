"""One step after another: plan, run, sample, commit, decode. Knows the engine's parts; knows no threads, no asyncio."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from autobot_llm.engine.batching.plan import ScheduledSequence, build_batch
from autobot_llm.engine.batching.scheduler import Scheduler
from autobot_llm.engine.detokenizer import Detokenizer
from autobot_llm.engine.executor import Executor
from autobot_llm.engine.models.config import ModelConfig
from autobot_llm.engine.sampler import Outcome, Sampler, SamplingFailure
from autobot_llm.engine.sequence import SamplingParams, Sequence
from autobot_llm.engine.tokenizer import Tokenizer
from autobot_llm.errors import EngineError, LLMError

EndReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One prompt, to be continued once per entry of `params` (the choices; they differ in their seeds only)."""

    prompt_ids: list[int]
    params: tuple[SamplingParams, ...]
    stop: tuple[str, ...] = ()
    salt: str = ""


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """A sampled token with its log probability and its best alternatives (id, log probability), best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Output:
    """What one step added to one choice. With `end` or `error` the choice is over and its blocks are free."""

    request_id: int
    index: int
    text: str
    num_tokens: int
    logprobs: tuple[TokenInfo, ...] = ()
    end: EndReason | None = None
    error: LLMError | None = None


@dataclass(slots=True)
class RequestStats:
    """What happened to a request on its way, for its report. Times are from time.monotonic()."""

    arrival_time: float = 0.0
    first_scheduled_time: float | None = None
    queue_position: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    largest_batch: int = 0


@dataclass(slots=True, eq=False)
class _Choice:
    """A sequence together with the text it has become so far."""

    request_id: int
    index: int
    sequence: Sequence
    detokenizer: Detokenizer
    stats: RequestStats
    withheld_logprobs: list[TokenInfo] = field(default_factory=list)


class Engine:
    """Sequences in, text out, one step at a time. Not thread-safe: one thread owns it (see service.py)."""

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        executor: Executor,
        scheduler: Scheduler,
        sampler: Sampler,
        *,
        bytes_per_block: int,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.executor = executor
        self.scheduler = scheduler
        self.bytes_per_block = bytes_per_block
        self.num_steps = 0
        self.num_generated_tokens = 0
        self._sampler = sampler
        self._choices: dict[int, _Choice] = {}
        self._requests: dict[int, list[_Choice]] = {}
        self._next_sequence_id = 0

    @property
    def kv_cache_bytes(self) -> int:
        """Memory of the cache blocks in use: those that a running sequence holds."""
        pool = self.scheduler.block_pool
        return (pool.num_blocks - pool.num_free) * self.bytes_per_block

    @property
    def has_work(self) -> bool:
        return bool(self._choices)

    def add(self, request_id: int, request: EngineRequest, stats: RequestStats) -> None:
        """Queue every choice of a request. `stats` is filled in as the request advances."""
        leader: Sequence | None = None
        choices = self._requests[request_id] = []
        for index, params in enumerate(request.params):
            sequence = Sequence(self._next_sequence_id, request.prompt_ids, params, salt=request.salt, leader=leader)
            self._next_sequence_id += 1
            leader = leader or sequence
            choice = _Choice(request_id, index, sequence, Detokenizer(self.tokenizer, request.stop), stats)
            choices.append(choice)
            self._choices[sequence.id] = choice
            self.scheduler.add(sequence)
        assert leader is not None, "a request has at least one choice"
        stats.arrival_time = leader.arrival_time
        stats.queue_position = leader.queue_position

    def abort(self, request_id: int) -> None:
        """Give a request up: whatever it holds is free when this returns. An unknown id was finished before."""
        for choice in self._requests.get(request_id, ())[:]:
            self.scheduler.abort(choice.sequence)
            self._forget(choice)

    def step(self) -> list[Output]:
        """Advance every sequence the scheduler chooses, and return what became visible."""
        plan = self.scheduler.plan()
        if plan is None:
            return []
        batch = build_batch(plan.scheduled, self.scheduler.block_pool.block_size)
        self._note_scheduled(plan.scheduled)
        sampling = [item.sequence for item in plan.scheduled if item.samples]
        logits_RV = self.executor.execute(batch)
        sampled = self._sampler.sample(logits_RV, sampling) if sampling else []
        tokens = [None if isinstance(outcome, SamplingFailure) else outcome.token_id for outcome in sampled]
        self.scheduler.commit(plan, tokens)
        for sequence, outcome in zip(sampling, sampled, strict=True):
            if isinstance(outcome, SamplingFailure) and isinstance(outcome.error, EngineError):
                self._discard_cache(sequence)
        self.num_steps += 1
        self.num_generated_tokens += len(tokens) - tokens.count(None)
        return [
            self._accept(self._choices[sequence.id], outcome)
            for sequence, outcome in zip(sampling, sampled, strict=True)
        ]

    def fail_all(self, message: str, cause: BaseException) -> list[Output]:
        """End every request with an error and empty the cache, after a step that raised: its blocks are suspect."""
        outputs = []
        for choice in list(self._choices.values()):
            error = EngineError(message)
            error.__cause__ = cause
            self.scheduler.abort(choice.sequence)
            self._forget(choice)
            outputs.append(Output(choice.request_id, choice.index, "", choice.sequence.num_output_tokens, error=error))
        self.scheduler.block_pool.reset()
        return outputs

    def _discard_cache(self, sequence: Sequence) -> None:
        """The model made NaN: what the sequence left in the cache is suspect, and nobody may find it there."""
        pool = self.scheduler.block_pool
        pool.reset()
        self.executor.discard([block_id for block_id in sequence.block_ids if pool.num_references(block_id) == 1])

    def _note_scheduled(self, scheduled: tuple[ScheduledSequence, ...]) -> None:
        for item in scheduled:
            stats = self._choices[item.sequence.id].stats
            stats.largest_batch = max(stats.largest_batch, len(scheduled))

    def _accept(self, choice: _Choice, token: Outcome) -> Output:
        sequence, params = choice.sequence, choice.sequence.params
        num_tokens = sequence.num_output_tokens
        if isinstance(token, SamplingFailure):
            return self._end(choice, "", error=token.error)
        may_end = num_tokens >= params.min_tokens
        if may_end and token.token_id in params.stop_token_ids:
            return self._end(choice, choice.detokenizer.flush(), "stop")
        if token.logprob is not None:
            choice.withheld_logprobs.append(TokenInfo(token.token_id, token.logprob, token.top))
        text = choice.detokenizer.push(token.token_id, match_stop=may_end)
        if choice.detokenizer.stopped:
            return self._end(choice, text, "stop")
        if num_tokens >= params.max_tokens:
            return self._end(choice, text + choice.detokenizer.flush(), "length")
        # Text held back (half a character, the beginning of a stop string) holds its log probabilities back too.
        logprobs = tuple(choice.withheld_logprobs) if text else ()
        if text:
            choice.withheld_logprobs.clear()
        return Output(choice.request_id, choice.index, text, num_tokens, logprobs)

    def _end(self, choice: _Choice, text: str, end: EndReason | None = None, error: LLMError | None = None) -> Output:
        num_tokens = choice.sequence.num_output_tokens
        self.scheduler.finish(choice.sequence)
        self._forget(choice)
        return Output(
            choice.request_id, choice.index, text, num_tokens, tuple(choice.withheld_logprobs), end=end, error=error
        )

    def _forget(self, choice: _Choice) -> None:
        sequence, stats = choice.sequence, choice.stats
        stats.num_preemptions += sequence.num_preemptions
        if choice.index == 0:
            stats.num_cached_tokens = sequence.num_cached_tokens
            stats.first_scheduled_time = sequence.first_scheduled_time
        del self._choices[sequence.id]
        siblings = self._requests[choice.request_id]
        siblings.remove(choice)
        if not siblings:
            del self._requests[choice.request_id]
        self._sampler.forget(sequence)
