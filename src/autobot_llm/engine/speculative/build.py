"""Choose the methods that can draft for a model here, and make them. Knows settings' names, folders and executors."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from autobot_llm.engine.executor import NO_FEATURES, Executor, FeatureKinds
from autobot_llm.engine.gpu.options import DraftPlace
from autobot_llm.engine.kv_cache.block_pool import BlockPool
from autobot_llm.engine.models.config import ModelConfig, load_config
from autobot_llm.engine.sequence import SamplingParams, Sequence
from autobot_llm.engine.speculative.draft_model import DraftModel
from autobot_llm.engine.speculative.heads import (
    HeadsMethod,
    features_of,
    find_heads,
    make_eagle,
    make_eagle_on_device,
    make_medusa,
    method_of,
)
from autobot_llm.engine.speculative.measurements import ON_CPU, ON_GPU
from autobot_llm.engine.speculative.ngram import LOOKUP_MAX, NgramProposer
from autobot_llm.engine.speculative.pairs import check_draft, find_draft
from autobot_llm.engine.speculative.proposer import CostlyProposer
from autobot_llm.engine.speculative.speculator import Speculator
from autobot_llm.engine.tokenizer import Tokenizer
from autobot_llm.errors import ConfigurationError, ModelLoadError

log = logging.getLogger(__name__)

Method = Literal["auto", "ngram", "draft", "medusa", "eagle3", "none"]


_BY_PREFERENCE: tuple[HeadsMethod, ...] = ("eagle3", "medusa")


@dataclass(frozen=True, slots=True)
class SpeculationOptions:
    """How to guess ahead. `draft_model` and `heads` (a folder of Medusa heads or of an EAGLE-3 draft) None: what is
    found beside the model; `min_acceptance_rate` None: measured costs alone decide."""

    method: Method = "none"
    draft_model: Path | None = None
    heads: Path | None = None
    num_tokens: int = 5
    use_ngram: bool = True
    ngram_prompt_lookup_max: int = LOOKUP_MAX
    min_acceptance_rate: float | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """The model that is drafted for, and the limits of its engine. `features`: what its steps keep; None: whatever they
    are asked for. `place`: where its steps run on a GPU, and what a draft shares with them there."""

    folder: Path
    is_on_cpu: bool
    tokenizer: Tokenizer
    config: ModelConfig
    features: FeatureKinds | None
    place: DraftPlace | None
    num_blocks: int
    block_size: int
    prefix_caching: bool
    max_num_batched_tokens: int
    max_model_len: int


MakeExecutor = Callable[[Path, ModelConfig, int, int], tuple[Executor, int]]
"""An executor for the model in a folder, with that context and at most so many blocks; and how many it has."""


def wanted_features(options: SpeculationOptions, folder: Path, config: ModelConfig) -> FeatureKinds:
    """What the steps of the model in `folder` have to keep for the method that `build_speculator` will choose: to be
    known before a GPU's steps are captured. Nothing for heads that cannot be read, which it will say."""
    named = options.heads if options.method in ("auto", *_BY_PREFERENCE) else None
    is_auto = options.method == "auto" and named is None and not (options.draft_model or find_draft(folder))
    asked_for = method_of(named) if options.method == "auto" and named is not None else options.method
    for method in _BY_PREFERENCE:
        if not (is_auto or asked_for == method):
            continue
        heads = named or find_heads(folder, method)
        if heads is not None:
            try:
                return features_of(method, heads, config)
            except ModelLoadError:
                continue
    return NO_FEATURES


def build_speculator(
    options: SpeculationOptions, target: Target, make_executor: MakeExecutor
) -> tuple[Speculator | None, str]:
    """What drafts, and why, for the report. Raises ConfigurationError for a method that is asked for and cannot run."""
    method = options.method
    if method == "none":
        return None, "switched off by AUTOBOT_SPECULATION_ENABLED or AUTOBOT_SPECULATION_METHOD"
    uses_ngram = method == "ngram" or (method == "auto" and options.use_ngram)
    costly = _costly(options, target, make_executor)
    if not uses_ngram and costly is None:
        return None, f"no draft model was found for {target.folder.name}, and AUTOBOT_SPECULATION_USE_NGRAM is off"
    speculator = Speculator(
        options.num_tokens,
        make_free=partial(NgramProposer, max_length=options.ngram_prompt_lookup_max) if uses_ngram else None,
        costly=costly,
        floor=options.min_acceptance_rate,
        # On a CPU what counts is what the engine's thread computes; it only waits for a GPU.
        clock=time.thread_time if target.is_on_cpu else time.perf_counter,
        priors=ON_CPU if target.is_on_cpu else ON_GPU,
    )
    if target.is_on_cpu and isinstance(costly, DraftModel):
        with ExitStack() as made:
            made.callback(speculator.close)
            speculator.rehearse(Sequence(-1, [0, 0], SamplingParams(max_tokens=1, temperature=0.0)))
            made.pop_all()
    return speculator, f"{' and '.join(speculator.methods)}, where measured acceptance and costs say that it pays"


def no_speculation_beside_heavy_hitters(options: SpeculationOptions) -> tuple[None, str]:
    """Raises ConfigurationError for a method that is asked for: what guesses attended to cannot be taken back."""
    why = "AUTOBOT_KV_HEAVY_HITTERS counts what every token attended to, and guesses would count"
    if options.method not in ("auto", "none"):
        raise ConfigurationError(f"AUTOBOT_SPECULATION_METHOD={options.method!r}: {why}; expected auto or none")
    return None, why


def _costly(options: SpeculationOptions, target: Target, make_executor: MakeExecutor) -> CostlyProposer | None:
    """The method that is asked for; for auto the heads that are named, else a draft model, EAGLE-3 or Medusa, the
    first that is there."""
    if options.method == "auto" and options.heads is not None:
        return _heads(method_of(options.heads), options, target)
    if options.method == "medusa" or options.method == "eagle3":
        return _heads(options.method, options, target)
    if options.method not in ("auto", "draft"):
        return None
    draft = _draft_model(options, target, make_executor)
    if draft is not None or options.method == "draft":
        return draft
    found = (_heads(method, options, target) for method in _BY_PREFERENCE)
    return next((heads for heads in found if heads is not None), None)


def _heads(method: HeadsMethod, options: SpeculationOptions, target: Target) -> CostlyProposer | None:
    """Raises ConfigurationError where the method is asked for by name and cannot be had."""
    named = options.heads
    is_asked_for = options.method == method or named is not None
    folder = named or find_heads(target.folder, method)
    setting = f"AUTOBOT_SPECULATION_METHOD={method!r}" if named is None else f"AUTOBOT_SPECULATION_HEADS={str(named)!r}"
    if folder is None:
        if not is_asked_for:
            return None
        raise ConfigurationError(
            f"{setting}: no {target.folder.name}-{method} lies beside {target.folder}; make one with "
            f"`autobot-llm train {method}` and set AUTOBOT_SPECULATION_HEADS to its folder, or choose auto, ngram, "
            "draft or none"
        )
    try:
        if target.features in (None, features_of(method, folder, target.config)):
            return _make_heads(method, folder, target, options.num_tokens)
    except (ConfigurationError, ModelLoadError) as error:
        if not is_asked_for:
            log.info("%s lies beside the model, and is not used for %s: %s", folder.name, method, error)
            return None
        raise ConfigurationError(f"{setting}: {error}") from error
    if not is_asked_for:
        return None
    raise ConfigurationError(f"{setting}: this step gives no hidden states; expected auto, ngram, draft or none")


def _make_heads(method: HeadsMethod, folder: Path, target: Target, num_tokens: int) -> CostlyProposer:
    place = target.place
    if method == "medusa":
        return make_medusa(folder, target.folder, target.config, stream=None if place is None else place.stream)
    if place is None:
        return make_eagle(folder, target.folder, target.config, target.max_model_len)
    return make_eagle_on_device(folder, target.config, place, num_tokens=num_tokens, num_blocks=target.num_blocks)


def _draft_model(options: SpeculationOptions, target: Target, make_executor: MakeExecutor) -> DraftModel | None:
    folder = options.draft_model or find_draft(target.folder)
    if folder is None:
        if options.method == "draft":
            raise ConfigurationError(
                f"AUTOBOT_SPECULATION_METHOD='draft': no draft model lies beside {target.folder}; set "
                "AUTOBOT_SPECULATION_DRAFT_MODEL to the folder of a small model with the same tokenizer"
            )
        return None
    try:
        return make_draft_model(folder, target, make_executor)
    except (ConfigurationError, ModelLoadError) as error:
        if options.draft_model is None and options.method == "auto":
            log.info("%s lies beside the model, and is not used as its draft: %s", folder.name, error)
            return None
        raise ConfigurationError(f"AUTOBOT_SPECULATION_DRAFT_MODEL={str(folder)!r}: {error}") from error


def make_draft_model(folder: Path, target: Target, make_executor: MakeExecutor) -> DraftModel:
    """The model in a folder as a draft. Raises ConfigurationError for another vocabulary, ModelLoadError."""
    check_draft(target.tokenizer, Tokenizer.from_folder(folder), target.folder.name)
    config = load_config(folder)
    context = min(target.max_model_len, config.max_position_embeddings)
    executor, num_blocks = make_executor(folder, config, context, target.num_blocks)
    with ExitStack() as made:
        made.callback(executor.close)
        pool = BlockPool(num_blocks, target.block_size, prefix_caching=target.prefix_caching)
        draft = DraftModel(
            executor,
            pool,
            vocab_size=min(target.config.vocab_size, config.vocab_size),
            max_tokens=target.max_num_batched_tokens,
            max_model_len=context,
        )
        made.pop_all()  # from here on the draft model closes it
    return draft
