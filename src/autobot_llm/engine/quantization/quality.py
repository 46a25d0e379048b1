"""How much a quantized model differs from the model it was made of, on a text. Knows engines and logits, no schemes.

Both read the same windows of the text and continue the same beginnings greedily. Quantized activations are rounded
here as they are on a GPU, whichever step answers requests.
"""

from __future__ import annotations

import math
import statistics
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from autobot_llm.engine.batching.plan import ScheduledSequence, build_batch
from autobot_llm.engine.engine import Engine
from autobot_llm.engine.load import load_engine
from autobot_llm.engine.options import EngineOptions
from autobot_llm.engine.quantization.calibration import sequences_of
from autobot_llm.engine.request import EngineRequest, RequestStats
from autobot_llm.engine.sequence import SamplingParams
from autobot_llm.engine.sequence import Sequence as EngineSequence
from autobot_llm.errors import ConfigurationError

STEP_TOKENS = 256
PROMPT_TOKENS = 64
CONTINUED_TOKENS = 32
MAX_CONTINUATIONS = 16
TIMED_PROMPTS = 4  # each decoded by both models in turn


@dataclass(frozen=True, slots=True)
class Quality:
    """Figures on `num_tokens` predicted tokens.

    `perplexity_change_error` is the standard error of the change over the windows, which both models read; None for a
    single one. `kl` in nats, from the unquantized model, the mean over tokens.
    `exact_continuations` of `num_continuations` greedy continuations of 32 tokens are the same text.
    `tokens_per_second` is decoding one request alone, on the step that answers requests here; `speedup` is the median
    of the ratios of continuations that both models decoded one right after the other.
    """

    num_tokens: int
    perplexity: float
    perplexity_before: float
    perplexity_change_error: float | None
    kl: float
    top1_agreement: float
    exact_continuations: int
    num_continuations: int
    tokens_per_second: float
    tokens_per_second_before: float
    speedup: float
    step: str

    @property
    def perplexity_change(self) -> float:
        """0.004 is 0.4 % worse."""
        return self.perplexity / self.perplexity_before - 1

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "perplexity_change": self.perplexity_change}


def compare(
    before: Path,
    after: Path,
    text: str,
    cache_dir: Path,
    *,
    num_windows: int = 32,
    length: int = 512,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Quality:
    """Measure folder `after` against folder `before` on a text that neither was calibrated on."""
    (quality,) = compare_all(
        before, [after], text, cache_dir, num_windows=num_windows, length=length, on_progress=on_progress
    )
    return quality


def compare_all(
    before: Path,
    after: Sequence[Path],
    text: str,
    cache_dir: Path,
    *,
    num_windows: int = 32,
    length: int = 512,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> list[Quality]:
    """Measure several folders against the same one, which reads the text once for all of them."""
    tell = on_progress or (lambda what, done, total: None)
    with open_engines(_options(folder, cache_dir, "off") for folder in (before, *after)) as engines:
        reference = engines[0]
        length = min(length, reference.config.max_position_embeddings)
        windows_BL = sequences_of(text, reference.tokenizer, num_sequences=num_windows, length=length)
        sums_CWF = torch.zeros(len(after), len(windows_BL), 4, dtype=torch.float64)
        for i, ids in enumerate(windows_BL.tolist()):
            tell("windows compared", i, len(windows_BL))
            for steps in zip(*(_logits(engine, ids) for engine in engines), strict=True):
                (theirs_RV, ids_R), *ours = steps
                for found_F, (ours_RV, _) in zip(sums_CWF[:, i], ours, strict=True):
                    found_F += _differences(ours_RV, theirs_RV, ids_R)
        tell("windows compared", len(windows_BL), len(windows_BL))
        tell("continuations", 0, 0)
        prompts = [ids[:PROMPT_TOKENS] for ids in windows_BL.tolist()[:MAX_CONTINUATIONS]]
        expected, *continued = [_continue(engine, prompts)[0] for engine in engines]
    num_tokens = windows_BL.shape[1] - 1
    found = []
    for folder, sums_WF, texts in zip(after, sums_CWF, continued, strict=True):
        if not math.isfinite(float(sums_WF.sum())):
            raise ConfigurationError(f"{folder}: the model's logits are not numbers")
        same = sum(ours == theirs for ours, theirs in zip(texts, expected, strict=True))
        speed = _speed(folder, before, cache_dir, prompts[:TIMED_PROMPTS])
        found.append(_quality(sums_WF / num_tokens, num_tokens, same, len(prompts), speed))
    return found


def _quality(means_WF: torch.Tensor, num_tokens: int, num_same: int, num_continuations: int, speed: _Speed) -> Quality:
    """Of the mean figures of each window, which has `num_tokens` predicted tokens."""
    nll, nll_before, kl, agreed = means_WF.mean(0).tolist()
    change_W = means_WF[:, 0] - means_WF[:, 1]
    return Quality(
        num_tokens=num_tokens * len(means_WF),
        perplexity=math.exp(nll),
        perplexity_before=math.exp(nll_before),
        perplexity_change_error=float(change_W.std() / math.sqrt(len(change_W))) if len(change_W) > 1 else None,
        kl=kl,
        top1_agreement=agreed,
        exact_continuations=num_same,
        num_continuations=num_continuations,
        tokens_per_second=speed.tokens_per_second,
        tokens_per_second_before=speed.tokens_per_second_before,
        speedup=speed.ratio,
        step=speed.step,
    )


def _options(folder: Path, cache_dir: Path, compiled_step: Literal["auto", "off"]) -> EngineOptions:
    return EngineOptions(
        folder=folder, cache_dir=cache_dir, device="cpu", prefix_caching=False, compiled_step=compiled_step
    )


@contextmanager
def open_engines(all_options: Iterable[EngineOptions]) -> Iterator[list[Engine]]:
    """An engine for each, closed in the end; where one cannot be made, those before it are closed."""
    with ExitStack() as opened:
        yield [opened.enter_context(closing(load_engine(options))) for options in all_options]


# R rows, V vocabulary
def _logits(engine: Engine, ids: Sequence[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """logits_RV of the next tokens, and the ids_R that they are, a step at a time."""
    pool = engine.scheduler.block_pool
    sequence = EngineSequence(-2, list(ids), SamplingParams(max_tokens=1))
    block_ids = pool.allocate(-(-len(ids) // pool.block_size))
    assert block_ids is not None, "an idle engine has room for a sequence"
    sequence.block_ids = array("i", block_ids)
    try:
        step_tokens = min(STEP_TOKENS, engine.scheduler.max_num_batched_tokens)
        for start in range(0, len(ids) - 1, step_tokens):
            num_tokens = min(step_tokens, len(ids) - 1 - start)
            batch = build_batch([ScheduledSequence(sequence, start, num_tokens, samples=True)], pool.block_size)
            batch = replace(batch, logit_rows_R=np.arange(num_tokens, dtype=np.int64))
            yield engine.executor.execute(batch).float(), torch.tensor(ids[start + 1 : start + 1 + num_tokens])
    finally:
        pool.free(sequence.block_ids)


def _differences(ours_RV: torch.Tensor, theirs_RV: torch.Tensor, ids_R: torch.Tensor) -> torch.Tensor:
    """Sums over the rows: both negative log likelihoods, KL(theirs || ours), and equal best tokens."""
    ours_RV, theirs_RV = ours_RV.log_softmax(-1), theirs_RV.log_softmax(-1)
    ids_R1 = ids_R.unsqueeze(1)
    kl = (theirs_RV.exp() * (theirs_RV - ours_RV)).sum()
    agreed = (ours_RV.argmax(-1) == theirs_RV.argmax(-1)).sum()
    figures = (-ours_RV.gather(1, ids_R1).sum(), -theirs_RV.gather(1, ids_R1).sum(), kl, agreed)
    return torch.tensor([float(figure) for figure in figures], dtype=torch.float64)


def _continue(engine: Engine, prompts: Sequence[list[int]]) -> tuple[list[str], float]:
    """Greedy continuations, all at once, and for a single prompt the tokens per second after the step that read it."""
    texts, num_tokens = [""] * len(prompts), [0] * len(prompts)
    params = SamplingParams(max_tokens=CONTINUED_TOKENS, temperature=0.0)
    for number, prompt in enumerate(prompts):
        engine.add(number, EngineRequest(prompt_ids=prompt, params=(params,)), RequestStats())
    first, num_first = 0.0, 0
    while engine.has_work:
        for output in engine.step():
            if output.error is not None:
                raise output.error
            texts[output.request_id] += output.text
            num_tokens[output.request_id] = output.num_tokens
        if not first:
            first, num_first = time.perf_counter(), sum(num_tokens)
    seconds = time.perf_counter() - first
    return texts, (sum(num_tokens) - num_first) / seconds if seconds else 0.0


@dataclass(frozen=True, slots=True)
class _Speed:
    tokens_per_second: float
    tokens_per_second_before: float
    ratio: float
    step: str


def _speed(after: Path, before: Path, cache_dir: Path, prompts: Sequence[list[int]]) -> _Speed:
    """Both take turns, so that what else the machine does meets both."""
    with open_engines(_options(folder, cache_dir, "auto") for folder in (after, before)) as (ours, theirs):
        for engine in (ours, theirs):
            _continue(engine, prompts[:1])  # warm
        pairs = [(_continue(ours, [prompt])[1], _continue(theirs, [prompt])[1]) for prompt in prompts]
        ratios = [one / other for one, other in pairs if other]
        return _Speed(
            tokens_per_second=statistics.median(one for one, _ in pairs),
            tokens_per_second_before=statistics.median(other for _, other in pairs),
            ratio=statistics.median(ratios) if ratios else 0.0,
            step=f"{ours.executor.name}: {ours.executor.reason}",
        )
