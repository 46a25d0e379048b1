"""How much a quantized model differs from the model it was made of, on a text. Knows engines and logits, no schemes.

Both read the same windows of the text and continue the same beginnings greedily. Quantized activations are rounded
here as they are on a GPU, whichever step answers requests.
"""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True, slots=True)
class Quality:
    """Figures on `num_tokens` predicted tokens. `kl` in nats, from the unquantized model, the mean over tokens.

    `exact_continuations` of `num_continuations` greedy continuations of 32 tokens are the same text.
    `tokens_per_second` is decoding alone, on the step that answers requests here.
    """

    num_tokens: int
    perplexity: float
    perplexity_before: float
    kl: float
    top1_agreement: float
    exact_continuations: int
    num_continuations: int
    tokens_per_second: float
    tokens_per_second_before: float
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
    tell = on_progress or (lambda what, done, total: None)
    reference, candidate = (_engine(folder, cache_dir, "off") for folder in (before, after))
    try:
        length = min(length, reference.config.max_position_embeddings)
        windows_BL = sequences_of(text, reference.tokenizer, num_sequences=num_windows, length=length)
        sums = torch.zeros(4, dtype=torch.float64)
        for i, ids in enumerate(windows_BL.tolist()):
            tell("windows compared", i, len(windows_BL))
            for ours, theirs in zip(_logits(candidate, ids), _logits(reference, ids), strict=True):
                sums += _differences(ours[0], theirs[0], ours[1])
        tell("windows compared", len(windows_BL), len(windows_BL))
        prompts = [ids[:PROMPT_TOKENS] for ids in windows_BL.tolist()[:MAX_CONTINUATIONS]]
        texts = [_continue(engine, prompts)[0] for engine in (candidate, reference)]
    finally:
        reference.close()
        candidate.close()
    speeds = [_speed(folder, cache_dir, prompts) for folder in (after, before)]
    num_tokens = windows_BL.numel() - len(windows_BL)
    if not math.isfinite(float(sums.sum())):
        raise ConfigurationError(f"{after}: the model's logits are not numbers")
    nll, nll_before, kl, agreed = (sums / num_tokens).tolist()
    return Quality(
        num_tokens=num_tokens,
        perplexity=math.exp(nll),
        perplexity_before=math.exp(nll_before),
        kl=kl,
        top1_agreement=agreed,
        exact_continuations=sum(ours == theirs for ours, theirs in zip(*texts, strict=True)),
        num_continuations=len(prompts),
        tokens_per_second=speeds[0][0],
        tokens_per_second_before=speeds[1][0],
        step=speeds[0][1],
    )


def _engine(folder: Path, cache_dir: Path, compiled_step: str) -> Engine:
    options = EngineOptions(folder=folder, cache_dir=cache_dir, device="cpu", prefix_caching=False)
    assert compiled_step in ("auto", "off")
    return load_engine(replace(options, compiled_step="off" if compiled_step == "off" else "auto"))


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
    """Greedy continuations, one after the other, and the tokens per second of decoding."""
    texts, num_tokens, seconds = [], 0, 0.0
    params = SamplingParams(max_tokens=CONTINUED_TOKENS, temperature=0.0)
    for number, prompt in enumerate(prompts):
        engine.add(number, EngineRequest(prompt_ids=prompt, params=(params,)), RequestStats())
        text, first, num_so_far = "", 0.0, 0
        while engine.has_work:
            for output in engine.step():
                if output.error is not None:
                    raise output.error
                text, num_so_far = text + output.text, output.num_tokens
            first = first or time.perf_counter()
        texts.append(text)
        num_tokens += num_so_far - 1  # the first one comes with the prompt
        seconds += time.perf_counter() - first
    return texts, num_tokens / seconds if seconds else 0.0


def _speed(folder: Path, cache_dir: Path, prompts: Sequence[list[int]]) -> tuple[float, str]:
    engine = _engine(folder, cache_dir, "auto")
    try:
        _continue(engine, prompts[:1])  # warm
        return _continue(engine, prompts)[1], f"{engine.executor.name}: {engine.executor.reason}"
    finally:
        engine.close()
