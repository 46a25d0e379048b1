"""Choose the methods that can draft for a model here, and make them. Knows settings' names, folders and executors."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from autobot_llm.engine.executor import Executor
from autobot_llm.engine.kv_cache.block_pool import BlockPool
from autobot_llm.engine.models.config import ModelConfig, load_config
from autobot_llm.engine.speculative.draft_model import DraftModel
from autobot_llm.engine.speculative.ngram import LOOKUP_MAX, NgramProposer
from autobot_llm.engine.speculative.pairs import check_draft, find_draft
from autobot_llm.engine.speculative.speculator import Speculator
from autobot_llm.engine.tokenizer import Tokenizer
from autobot_llm.errors import ConfigurationError, ModelLoadError

log = logging.getLogger(__name__)

Method = Literal["auto", "ngram", "draft", "medusa", "eagle3", "none"]


@dataclass(frozen=True, slots=True)
class SpeculationOptions:
    """How to guess ahead. `draft_model` None: one that is found beside the model; `min_acceptance_rate` None: measured
    costs alone decide."""

    method: Method = "none"
    draft_model: Path | None = None
    num_tokens: int = 5
    use_ngram: bool = True
    ngram_prompt_lookup_max: int = LOOKUP_MAX
    min_acceptance_rate: float | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """The model that is drafted for, and the limits of its engine."""

    folder: Path
    is_on_cpu: bool
    tokenizer: Tokenizer
    vocab_size: int
    num_blocks: int
    block_size: int
    prefix_caching: bool
    max_num_batched_tokens: int
    max_model_len: int


MakeExecutor = Callable[[Path, ModelConfig, int, int], tuple[Executor, int]]
"""An executor for the model in a folder, with that context and at most so many blocks; and how many it has."""


def build_speculator(
    options: SpeculationOptions, target: Target, make_executor: MakeExecutor
) -> tuple[Speculator | None, str]:
    """What drafts, and why, for the report. Raises ConfigurationError for a method that is asked for and cannot run."""
    method = options.method
    if method == "none":
        return None, "switched off by AUTOBOT_SPECULATION_ENABLED or AUTOBOT_SPECULATION_METHOD"
    if method in ("medusa", "eagle3"):
        raise ConfigurationError(
            f"AUTOBOT_SPECULATION_METHOD={method!r}: there are no such heads for {target.folder.name}; expected auto, "
            "ngram, draft or none"
        )
    uses_ngram = method == "ngram" or (method == "auto" and options.use_ngram)
    draft = _draft_model(options, target, make_executor) if method in ("auto", "draft") else None
    if not uses_ngram and draft is None:
        return None, f"no draft model was found for {target.folder.name}, and AUTOBOT_SPECULATION_USE_NGRAM is off"
    speculator = Speculator(
        options.num_tokens,
        make_free=partial(NgramProposer, max_length=options.ngram_prompt_lookup_max) if uses_ngram else None,
        costly=draft,
        floor=options.min_acceptance_rate,
        # On a CPU what counts is what the engine's thread computes; it only waits for a GPU.
        clock=time.thread_time if target.is_on_cpu else time.perf_counter,
    )
    return speculator, f"{' and '.join(speculator.methods)}, where measured acceptance and costs say that it pays"


def no_speculation_beside_heavy_hitters(options: SpeculationOptions) -> tuple[None, str]:
    """Raises ConfigurationError for a method that is asked for: what guesses attended to cannot be taken back."""
    why = "AUTOBOT_KV_HEAVY_HITTERS counts what every token attended to, and guesses would count"
    if options.method not in ("auto", "none"):
        raise ConfigurationError(f"AUTOBOT_SPECULATION_METHOD={options.method!r}: {why}; expected auto or none")
    return None, why


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
    return DraftModel(
        executor,
        BlockPool(num_blocks, target.block_size, prefix_caching=target.prefix_caching),
        vocab_size=min(target.vocab_size, config.vocab_size),
        max_tokens=target.max_num_batched_tokens,
        max_model_len=context,
    )
