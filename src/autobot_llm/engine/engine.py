"""One step after another: plan, run, sample, resolve, decode. Knows the engine's parts; knows no threads, no loops."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceABC

from autobot_llm.engine.batching.plan import BatchBuilder, StepBatch, StepPlan
from autobot_llm.engine.batching.scheduler import Scheduler
from autobot_llm.engine.choice import Choice, info_of
from autobot_llm.engine.description import CacheDescription
from autobot_llm.engine.detokenizer import Detokenizer
from autobot_llm.engine.executor import Executor, PipelinedExecutor, TreeExecutor
from autobot_llm.engine.models.config import ModelConfig
from autobot_llm.engine.request import EngineRequest, Output, RequestStats
from autobot_llm.engine.sampler import (
    Outcome,
    Sampler,
    SamplingArraysBuilder,
    SamplingFailure,
    needs_host,
)
from autobot_llm.engine.sequence import Sequence
from autobot_llm.engine.speculative.acceptance import Verdict, outcomes_of, row_offsets, verify, verify_sampled
from autobot_llm.engine.speculative.speculator import Speculator
from autobot_llm.engine.tokenizer import Tokenizer
from autobot_llm.engine.verdicts import Judged, Lesson, StepInFlight, learn, take_verdicts, tokens_of
from autobot_llm.errors import EngineError

log = logging.getLogger(__name__)


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
        cache: CacheDescription | None = None,
        speculator: Speculator | None = None,
        speculation_reason: str = "switched off",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.scheduler = scheduler
        self.bytes_per_block = bytes_per_block
        self.cache = cache
        self.num_steps = 0
        self.num_generated_tokens = 0
        self._clock = clock
        self._sampler = sampler
        self.speculator = speculator
        self.speculation_reason = speculation_reason
        self._sampling_arrays = SamplingArraysBuilder(sampler.vocab_size)
        self._batches = BatchBuilder(scheduler.block_pool.block_size)
        self._in_flight: StepInFlight | None = None
        self._last_end_time = 0.0
        self._choices: dict[int, Choice] = {}
        self._requests: dict[int, list[Choice]] = {}
        self._next_sequence_id = 0
        self._num_host_sampled = 0  # choices whose tokens the host has to choose
        self.executor = executor

    @property
    def executor(self) -> Executor:
        return self._executor

    @executor.setter
    def executor(self, executor: Executor) -> None:
        assert self._in_flight is None, "a step is under way on the executor that there was"
        self._executor = executor
        self._pipelined = executor if isinstance(executor, PipelinedExecutor) else None
        self._mover = executor if isinstance(executor, TreeExecutor) else None

    @property
    def kv_cache_bytes(self) -> int:
        """Memory of the cache blocks in use: those that a running sequence holds."""
        pool = self.scheduler.block_pool
        return (pool.num_blocks - pool.num_free) * self.bytes_per_block

    @property
    def has_work(self) -> bool:
        return bool(self._choices) or self._in_flight is not None

    def add(self, request_id: int, request: EngineRequest, stats: RequestStats) -> None:
        """Queue every choice of a request. `stats` is filled in as the request advances."""
        leader: Sequence | None = None
        choices = self._requests[request_id] = []
        for index, params in enumerate(request.params):
            sequence = Sequence(
                self._next_sequence_id,
                request.prompt_ids,
                params,
                salt=request.salt,
                leader=leader,
                priority=request.priority,
            )
            self._next_sequence_id += 1
            leader = leader or sequence
            # A grammar says what the text is from its first character on, so no leading space is dropped under one.
            detokenizer = Detokenizer(
                self.tokenizer,
                request.stop,
                shown_ids=request.shown_ids,
                keeps_leading_space=params.grammar is not None,
            )
            choice = Choice(request_id, index, sequence, detokenizer, stats)
            choices.append(choice)
            self._choices[sequence.id] = choice
            self._num_host_sampled += needs_host(params)
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
        """Advance every sequence the scheduler chooses, and return what became visible.

        Where the executor works beside the host, a call launches one step and then waits for the one before it, so the
        device computes while the host plans, decodes and delivers. After a step with drafts it is the other way round:
        what comes next depends on the verdict, and only the text is made while the device computes again.
        """
        if self._pipelined is not None and self._num_host_sampled == 0:
            if self.speculator is not None:
                return self._draft_beside_device(self._pipelined, self.speculator)
            return self._step_beside_device(self._pipelined)
        # Bias, penalties and log probabilities are the host's work: it needs each step's logits and tokens before the
        # next one. While anybody asks for them, nothing overlaps, for anybody.
        if self._in_flight is not None:
            return self._resolve(self._take_in_flight())
        return self._step_on_host()

    def settle(self) -> list[Output]:
        """Wait for the step under way, if there is one: after it, the executor may be used beside the steps."""
        return [] if self._in_flight is None else self._resolve(self._take_in_flight())

    def _step_beside_device(self, executor: PipelinedExecutor) -> list[Output]:
        plan = self.scheduler.plan(max_draft_tokens=0)
        launched = None if plan is None else self._launch(executor, plan)
        previous, self._in_flight = self._in_flight, launched
        return [] if previous is None else self._resolve(previous)

    def _draft_beside_device(self, executor: PipelinedExecutor, speculator: Speculator) -> list[Output]:
        """Wait for the step under way where it has drafts, or where drafts after its tokens may pay for that; else go
        on beside it. After a verdict the next drafts may be under way already: then the step that verifies them is
        launched first, and what there is to learn and to decide comes while the device computes."""
        outputs: list[Output] = []
        lesson: Lesson | None = None
        if self._in_flight is not None and self._is_worth_waiting_for(self._in_flight, speculator):
            step = self._take_in_flight()
            if step.batch is None:
                outputs = self._resolve(step)
            else:
                lesson = self._judge(speculator, step)
                if lesson.may_end:  # who has ended is not planned any more
                    learn(speculator, lesson)
                    outputs, lesson = self._tell(lesson.judged), None
        if self._in_flight is not None:
            return self._step_beside_device(executor)
        begin_time = speculator.clock()
        decoding = self.scheduler.decoding
        room = self._room_for_drafts(len(decoding))
        goes_on = lesson is not None and speculator.go_on(decoding, room)
        if lesson is not None and not goes_on:
            learn(speculator, lesson)
        if not goes_on:
            self._propose(speculator, decoding, room, may_wait=True)
        plan = self.scheduler.plan(max_draft_tokens=room)
        if plan is not None and plan.num_draft_tokens:
            self._in_flight = self._launch_with_drafts(executor, speculator, plan, begin_time)
        else:
            speculator.settle()
            self._in_flight = None if plan is None else self._launch(executor, plan)
        if lesson is not None and goes_on:
            learn(speculator, lesson)
        speculator.look_ahead(decoding, room)
        return outputs if lesson is None else self._tell(lesson.judged)

    def _is_worth_waiting_for(self, step: StepInFlight, speculator: Speculator) -> bool:
        if step.batch is not None:
            return True
        under_way = [
            item.sequence for item in step.plan.scheduled if item.samples and item.sequence.id in self._choices
        ]
        room = self._room_for_drafts(len(under_way))
        return room > 0 and speculator.is_promising(under_way, room)

    def _room_for_drafts(self, num_sequences: int) -> int:
        """Draft tokens for the next step: on a device, none while anything but decoding is to be done."""
        scheduler = self.scheduler
        if self._pipelined is None:
            return scheduler.max_num_batched_tokens
        is_alone = num_sequences == scheduler.num_running and scheduler.num_waiting == 0
        return self._pipelined.room_for_drafts(num_sequences) if is_alone else 0

    def _propose(self, speculator: Speculator, decoding: list[Sequence], room: int, *, may_wait: bool = False) -> None:
        takes_trees = self._mover is not None
        speculator.propose(decoding if room else [], room, takes_trees=takes_trees, may_wait=may_wait)

    def _launch_with_drafts(
        self, executor: PipelinedExecutor, speculator: Speculator, plan: StepPlan, begin_time: float
    ) -> StepInFlight:
        rows = [(item.sequence, offset) for item in plan.scheduled if item.samples for offset in row_offsets(item)]
        sampling = self._sampling_arrays.build(*zip(*rows, strict=True))
        batch = self._batches.build(plan)
        step = StepInFlight(plan, executor.launch(batch, sampling), begin_time, batch)
        if not self.scheduler.num_waiting:  # who waits comes next
            speculator.launch_behind(plan)
        return step

    def _launch(self, executor: PipelinedExecutor, plan: StepPlan) -> StepInFlight:
        batch = self._batches.build(plan)
        sampling = self._sampling_arrays.build([item.sequence for item in plan.scheduled if item.samples])
        start_time = self._clock()
        launched = executor.launch(batch, sampling)
        if self.speculator is not None:
            self.speculator.read(plan, launched.features)
        self.scheduler.advance(plan)
        return StepInFlight(plan, launched, start_time)

    def _resolve(self, step: StepInFlight) -> list[Output]:
        if step.batch is not None:
            assert self.speculator is not None, "who has drafted is there until the verdict"
            lesson = self._judge(self.speculator, step)
            learn(self.speculator, lesson)
            return self._tell(lesson.judged)
        sampled = step.launched.wait()
        end_time = self._clock()
        seconds = end_time - max(step.start_time, self._last_end_time)
        self._last_end_time = end_time
        if self.speculator is not None:
            self.speculator.record_plain(step.plan, seconds, self.scheduler.step_cost)
        if all(map(math.isfinite, sampled.best_logits)):
            outputs = self._accept_all(step.plan, sampled.tokens, None, seconds)
        else:
            outcomes = outcomes_of(sampled)
            outputs = self._accept_all(step.plan, tokens_of(outcomes), outcomes, seconds)
        if self.speculator is not None:
            self.speculator.observe(step.plan, features=step.launched.features)
        return outputs

    def _step_on_host(self) -> list[Output]:
        speculator = self.speculator
        if speculator is not None and not speculator.rests():
            return self._step_with_drafts(speculator)
        plan = self.scheduler.plan(max_draft_tokens=0)
        return [] if plan is None else self._run_on_host(plan)

    def _step_with_drafts(self, speculator: Speculator) -> list[Output]:
        begin_time = speculator.clock()
        decoding = self.scheduler.decoding
        room = self._room_for_drafts(len(decoding))
        self._propose(speculator, decoding, room)
        plan = self.scheduler.plan(max_draft_tokens=room)
        if plan is None:
            return []
        if not plan.num_draft_tokens:
            outputs = self._run_on_host(plan)
            speculator.record_plain(plan, speculator.clock() - begin_time, self.scheduler.step_cost)
            return outputs
        batch = self._batches.build(plan)
        verdicts = verify(self._sampler, speculator.execute(self.executor, batch), plan.scheduled)
        judged = self._take(plan, batch, verdicts)
        outputs = self._tell(judged)  # before it learns: a plain step's seconds hold its text, too
        learn(speculator, Lesson(plan, verdicts, judged, speculator.clock() - begin_time))
        return outputs

    def _judge(self, speculator: Speculator, step: StepInFlight) -> Lesson:
        """Wait for a step with drafts, and take its verdict."""
        assert step.batch is not None
        sampled = step.launched.wait()
        speculator.settle()
        verdicts = verify_sampled(sampled, step.plan.scheduled)
        judged = self._take(step.plan, step.batch, verdicts)
        self._last_end_time = self._clock()
        return Lesson(step.plan, verdicts, judged, speculator.clock() - step.start_time, step.launched.features)

    def _take(self, plan: StepPlan, batch: StepBatch, verdicts: list[Verdict]) -> Judged:
        self.num_steps += 1
        return take_verdicts(plan, batch, verdicts, self.scheduler, self._choices, self._mover)

    def _tell(self, judged: Judged) -> list[Output]:
        """What choices get of a step with drafts: one output each. What comes after an end is dropped."""
        outputs = []
        for choice, outcomes, num_before in judged:
            output = choice.take_several(outcomes, num_before)
            self.num_generated_tokens += output.num_tokens - num_before
            outputs.append(self._noted(choice, output))
        return outputs

    def _run_on_host(self, plan: StepPlan) -> list[Output]:
        batch = self._batches.build(plan)
        sampling = [item.sequence for item in plan.scheduled if item.samples]
        start_time = self._clock()
        watching = self.speculator if self.speculator is not None and self.speculator.watches_steps else None
        logits_RV = self.executor.execute(batch) if watching is None else watching.execute(self.executor, batch)
        outcomes = self._sampler.sample(logits_RV, sampling) if sampling else []
        seconds = self._clock() - start_time
        self.scheduler.advance(plan)
        outputs = self._accept_all(plan, tokens_of(outcomes), outcomes, seconds)
        if watching is not None:
            watching.observe(plan)
        return outputs

    def _accept_all(
        self, plan: StepPlan, tokens: SequenceABC[int | None], outcomes: list[Outcome] | None, seconds: float
    ) -> list[Output]:
        """Resolve a step. `outcomes` None: every token is plain. Rows whose choice has left meanwhile are dropped."""
        scheduler, choices = self.scheduler, self._choices
        scheduler.step_cost.record(plan.num_prompt_tokens, seconds)
        scheduler.resolve(plan, tokens)
        self.num_steps += 1
        num_scheduled = len(plan.scheduled)
        outputs = []
        row = -1
        for sequence, start, num_tokens, samples, _epoch, _num_draft in plan.scheduled:
            row += samples
            choice = choices.get(sequence.id)
            if choice is None:
                continue
            if choice.stats.largest_batch < num_scheduled:
                choice.stats.largest_batch = num_scheduled
            if not samples:
                continue
            token, info = tokens[row], None
            if outcomes is not None:
                outcome = outcomes[row]
                if isinstance(outcome, SamplingFailure):
                    outputs.append(self._noted(choice, choice.fail(outcome.error)))
                    continue
                info = info_of(outcome)
            assert token is not None
            self.num_generated_tokens += 1
            output = choice.take(token, info, start + num_tokens + 1 - sequence.num_prompt_tokens)
            outputs.append(self._noted(choice, output))
        return outputs

    def fail_all(self, message: str, cause: BaseException) -> list[Output]:
        """End every request with an error and empty the cache, after a step that raised: its blocks are suspect."""
        self._abandon_in_flight()
        outputs = []
        for choice in list(self._choices.values()):
            error = EngineError(message)
            error.__cause__ = cause
            self.scheduler.abort(choice.sequence)
            self._forget(choice)
            outputs.append(choice.fail(error))
        self.scheduler.block_pool.reset()
        return outputs

    def close(self) -> None:
        """Free the device, once it has finished what it was given."""
        self._abandon_in_flight()
        if self.speculator is not None:
            self.speculator.close()
        self.executor.close()

    def _take_in_flight(self) -> StepInFlight:
        step, self._in_flight = self._in_flight, None
        assert step is not None
        return step

    def _abandon_in_flight(self) -> None:
        """Wait for a step whose outcome nobody wants any more, and for drafts that no step was launched for."""
        try:
            if self._in_flight is not None:
                self._take_in_flight().launched.wait()
            if self.speculator is not None:
                self.speculator.settle()
        except Exception:
            log.debug("a step that was given up failed, too", exc_info=True)

    def _noted(self, choice: Choice, output: Output) -> Output:
        """Let a choice go that has ended, with its blocks."""
        if output.end is not None or output.error is not None:
            if isinstance(output.error, EngineError):
                self._discard_cache(choice.sequence)
            self.scheduler.finish(choice.sequence)
            self._forget(choice)
        return output

    def _discard_cache(self, sequence: Sequence) -> None:
        """The model made NaN: what the sequence left in the cache is suspect, and nobody may find it there."""
        pool = self.scheduler.block_pool
        pool.reset()
        self.executor.discard([block_id for block_id in sequence.block_ids if pool.num_references(block_id) == 1])

    def _forget(self, choice: Choice) -> None:
        sequence = choice.sequence
        choice.sum_up()
        del self._choices[sequence.id]
        self._num_host_sampled -= needs_host(sequence.params)
        if self.speculator is not None:
            self.speculator.forget(sequence)
        siblings = self._requests[choice.request_id]
        siblings.remove(choice)
        if not siblings:
            del self._requests[choice.request_id]
        self._sampler.forget(sequence)
