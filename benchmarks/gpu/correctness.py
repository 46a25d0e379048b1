"""Greedy tokens of the model widened to 7B, on the device, against the embedded one's in float32 on the CPU.

The two compute one function, so their tokens are the same wherever the reference's two best logits differ by more than
rounding: by more than 4 units in the last place of bfloat16 of the larger. A departure closer than that is counted and
shown, and the comparison goes on behind it with the reference's token in its place, so that one near tie does not hide
the rest.

Three ways through the engine are compared: answers as users get them (sampled on the device, compared by their text,
all at once and one by one), the same step by step with sampling on the host (by token), and the tokens of an answer in
one step.
"""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autobot_llm.engine.batching.plan import ScheduledSequence, build_batch
from autobot_llm.engine.engine import Engine
from autobot_llm.engine.load import load_engine
from autobot_llm.engine.request import EngineRequest, RequestStats
from autobot_llm.engine.sequence import SamplingParams, Sequence
from gpu.bench import EMBEDDED, Bench, greedy_request, real_texts
from gpu.report import Clock, Report, Table

CATEGORIES = ("chat", "copy", "story", "code", "long_prefix")
PROMPTS_PER_CATEGORY = 10
NUM_NEW_TOKENS = 64
ROUNDING_ULPS = 4.0
BFLOAT16_BITS = 8  # of the significand, the implied one included
NUM_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Reference:
    """A prompt, the tokens that follow it, and how far apart the two best logits were at each, in bfloat16 ulps."""

    prompt_ids: list[int]
    token_ids: list[int]
    gaps: list[float]


@dataclass(frozen=True, slots=True)
class Departure:
    """Where another token came: prompt, position in the answer, and the reference's gap there in ulps."""

    path: str
    prompt: int
    position: int
    gap: float

    @property
    def is_rounding(self) -> bool:
        return self.gap <= ROUNDING_ULPS


# R rows, V vocabulary
def gaps_in_ulps(logits_RV: npt.NDArray[np.float32]) -> list[float]:
    """By how many bfloat16 ulps of the larger one the two best logits of each row differ."""
    two = np.partition(logits_RV.astype(np.float64), -2, axis=-1)[:, -2:]
    return [
        (best - second) / ulp_of_bfloat16(max(abs(best), abs(second)))
        for second, best in zip(two[:, 0].tolist(), two[:, 1].tolist(), strict=True)
    ]


def ulp_of_bfloat16(value: float) -> float:
    """The distance between neighbours in bfloat16 at a positive value."""
    return math.ldexp(1.0, math.frexp(value)[1] - BFLOAT16_BITS)


def first_difference(text: str, prefixes: SequenceABC[str]) -> int | None:
    """The first of an expected answer's growing prefixes that `text` does not begin with; None for none of them.

    Half a character at a prefix's end decodes to U+FFFD, and says nothing yet.
    """
    return next((n for n, prefix in enumerate(prefixes) if not text.startswith(prefix.rstrip("\ufffd"))), None)


def correctness(bench: Bench, clock: Clock, report: Report) -> None:
    per_category, num_tokens = (1, 16) if bench.quick else (PROMPTS_PER_CATEGORY, NUM_NEW_TOKENS)
    widened = bench.widened_model
    table = report.table(
        f"Greedy tokens of {widened.name} against {EMBEDDED.name} in float32 on the CPU, {num_tokens} tokens a prompt",
        *("path", "compared", "equal", "within rounding", "beyond rounding"),
    )
    bench.release()
    references = _references(bench, per_category, num_tokens)
    engine = bench.engine(widened, prefix_caching=False)
    departures: list[Departure] = []
    for path, compare, unit in (
        ("all at once, sampled on the device", _by_text_at_once, "answers"),
        ("one by one, sampled on the device", _by_text_one_by_one, "answers"),
        ("all at once, sampled on the host", _by_token, "tokens"),
        ("each answer in one step", _by_answer, "tokens"),
    ):
        found = compare(engine, references, path)
        departures += found
        num_compared = len(references) * (1 if unit == "answers" else num_tokens)
        num_beyond = sum(not one.is_rounding for one in found)
        table.add(path, f"{num_compared:,} {unit}", num_compared - len(found), len(found) - num_beyond, num_beyond)
    report.figures |= {
        "num_prompts": len(references),
        "num_tokens_per_prompt": num_tokens,
        "num_within_rounding": sum(one.is_rounding for one in departures),
        "num_beyond_rounding": sum(not one.is_rounding for one in departures),
        "num_reference_positions_within_rounding": sum(
            gap <= ROUNDING_ULPS for reference in references for gap in reference.gaps
        ),
        "departures": [dataclasses.asdict(one) for one in departures],
    }
    _show(table, departures, report)


def _show(table: Table, departures: list[Departure], report: Report) -> None:
    near = report.figures["num_reference_positions_within_rounding"]
    total = report.figures["num_prompts"] * report.figures["num_tokens_per_prompt"]
    table.notes.append(f"rounding: a gap of at most {ROUNDING_ULPS:g} ulps; {near} of the {total:,} positions have one")
    for one in sorted(departures, key=lambda one: -one.gap)[:NUM_SHOWN]:
        table.notes.append(f"prompt {one.prompt}, token {one.position}: gap {one.gap:.2f} ulps; {one.path}")
    if len(departures) > NUM_SHOWN:
        table.notes.append(f"and {len(departures) - NUM_SHOWN} departures with smaller gaps, in the JSON line")


def _references(bench: Bench, per_category: int, num_tokens: int) -> list[Reference]:
    """The embedded model's greedy answers, with the logits of a second pass over the whole sequences."""
    options = bench.options(
        EMBEDDED,
        device="cpu",
        compiled_step="off",
        prefix_caching=False,
        max_num_seqs=per_category * len(CATEGORIES),
    )
    engine = load_engine(options)
    prompts = [engine.tokenizer.encode(text) for category in CATEGORIES for text in real_texts(category)[:per_category]]
    answers = tokens_on_the_host(engine, prompts, [num_tokens] * len(prompts))
    references = []
    for prompt_ids, token_ids in zip(prompts, answers, strict=True):
        logits_RV = logits_of_answer(engine, prompt_ids, token_ids)
        references.append(Reference(prompt_ids, token_ids, gaps_in_ulps(logits_RV)))
    engine.executor.close()
    return references


def _by_text_at_once(engine: Engine, references: list[Reference], path: str) -> list[Departure]:
    return _text_departures(engine, references, _texts(engine, references), path)


def _by_text_one_by_one(engine: Engine, references: list[Reference], path: str) -> list[Departure]:
    texts = [_texts(engine, [reference])[0] for reference in references]
    return _text_departures(engine, references, texts, path)


def _texts(engine: Engine, references: list[Reference]) -> list[str]:
    texts = [""] * len(references)
    for i, reference in enumerate(references):
        engine.add(i, greedy_request(reference.prompt_ids, len(reference.token_ids)), RequestStats())
    while engine.has_work:
        for output in engine.step():
            if output.error is not None:
                raise output.error
            texts[output.request_id] += output.text
    return texts


def _text_departures(engine: Engine, references: list[Reference], texts: list[str], path: str) -> list[Departure]:
    departures = []
    decode = engine.tokenizer.decode_after_text
    for i, (reference, text) in enumerate(zip(references, texts, strict=True)):
        prefixes = [decode(reference.token_ids[: n + 1]) for n in range(len(reference.token_ids))]
        if text == prefixes[-1]:
            continue
        position = first_difference(text, prefixes)
        position = len(reference.gaps) - 1 if position is None else position
        # A token that begins like the reference's next two shows one position late.
        departures.append(Departure(path, i, position, min(reference.gaps[max(0, position - 1) : position + 1])))
    return departures


def _by_token(engine: Engine, references: list[Reference], path: str) -> list[Departure]:
    """All answers at once; those that depart begin again behind the departure, until every token was compared."""
    departures: list[Departure] = []
    pending = [(i, 0) for i in range(len(references))]
    while pending:
        prompts = [references[i].prompt_ids + references[i].token_ids[:done] for i, done in pending]
        counts = [len(references[i].token_ids) - done for i, done in pending]
        answers = tokens_on_the_host(engine, prompts, counts)
        again = []
        for (i, done), answer in zip(pending, answers, strict=True):
            expected = references[i].token_ids[done:]
            at = next((k for k, pair in enumerate(zip(answer, expected, strict=True)) if pair[0] != pair[1]), None)
            if at is None:
                continue
            departures.append(Departure(path, i, done + at, references[i].gaps[done + at]))
            if at + 1 < len(expected):
                again.append((i, done + at + 1))
        pending = again
    return departures


def _by_answer(engine: Engine, references: list[Reference], path: str) -> list[Departure]:
    departures = []
    for i, reference in enumerate(references):
        best = logits_of_answer(engine, reference.prompt_ids, reference.token_ids).argmax(-1).tolist()
        departures += [
            Departure(path, i, position, gap)
            for position, (token, expected, gap) in enumerate(
                zip(best, reference.token_ids, reference.gaps, strict=True)
            )
            if token != expected
        ]
    return departures


def tokens_on_the_host(
    engine: Engine, prompts: SequenceABC[list[int]], num_tokens: SequenceABC[int]
) -> list[list[int]]:
    """Greedy tokens of a batch. They are told with their log probabilities, for which the host samples."""
    tokens: list[list[int]] = [[] for _ in prompts]
    for i, (prompt_ids, count) in enumerate(zip(prompts, num_tokens, strict=True)):
        params = SamplingParams(max_tokens=count, temperature=0.0, num_logprobs=0)
        engine.add(i, EngineRequest(prompt_ids=prompt_ids, params=(params,)), RequestStats())
    while engine.has_work:
        for output in engine.step():
            if output.error is not None:
                raise output.error
            tokens[output.request_id] += [info.token_id for info in output.logprobs]
    assert [len(answer) for answer in tokens] == list(num_tokens)
    return tokens


def logits_of_answer(engine: Engine, prompt_ids: list[int], token_ids: list[int]) -> npt.NDArray[np.float32]:
    """The logits that each token of an answer is the best of, with the answer computed in as few steps as possible.

    Uses the engine's first cache blocks: the engine must be idle, and its prefix caching off.
    """
    scheduler = engine.scheduler
    assert not engine.has_work and not scheduler.block_pool.prefix_caching
    sequence = Sequence(0, prompt_ids + token_ids, SamplingParams(max_tokens=1))
    num_tokens, block_size = len(sequence.token_ids) - 1, scheduler.block_pool.block_size
    sequence.block_ids = array("i", range(-(-num_tokens // block_size)))
    first_row = len(prompt_ids) - 1  # the prompt's last token predicts the answer's first
    logits: list[npt.NDArray[np.float32]] = []
    for start, stop in [
        *_chunks(0, first_row, scheduler.max_num_batched_tokens),
        *_chunks(first_row, num_tokens, scheduler.max_num_seqs),  # an executor has room for so many rows
    ]:
        batch = build_batch([ScheduledSequence(sequence, start, stop - start, False)], block_size)
        if start >= first_row:
            rows = np.arange(stop - start, dtype=batch.logit_rows_R.dtype)
            batch = dataclasses.replace(batch, logit_rows_R=rows)
        logits_RV = engine.executor.execute(batch)
        logits.append(logits_RV.numpy(force=True).copy())
    return np.concatenate(logits[-(-first_row // scheduler.max_num_batched_tokens) :])


def _chunks(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    return [(at, min(at + size, stop)) for at in range(start, stop, size)]
