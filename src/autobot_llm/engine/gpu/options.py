"""What the GPU path is asked for, and whether it can serve a model. Knows values; loads no kernels."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from autobot_llm.engine.executor import NO_FEATURES, FeatureKinds
from autobot_llm.engine.models.config import ModelConfig
from autobot_llm.engine.models.embeddings import Embeddings
from autobot_llm.engine.quantization.scheme import QuantizationType

HEAD_SIZES = (64, 128)
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class GpuLimits:
    """The largest step, and the longest sequence, in tokens; of that at most `max_cached_tokens` are in the cache."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_cached_tokens: int


@dataclass(frozen=True, slots=True)
class ChainPlace:
    """Where a draft's passes run in chains of at most `longest`: on the target's stream. `tokens_R` are the tokens that
    the target's steps sample and read; what is drawn is left there for them, from row `first_row` on."""

    longest: int
    stream: torch.cuda.Stream
    tokens_R: torch.Tensor
    first_row: int


@dataclass(frozen=True, slots=True)
class GpuOptions:
    """What a user may ask of the GPU. `memory_utilization` is a share of the whole device; `cache_memory` (bytes)
    None: what that share leaves. `cache_dtype`: what keys and values are stored as. `quantization`: what weights are
    rounded to as they are loaded. `features`: what every step is to keep. `chain`: None for all but drafts."""

    folder: Path
    attention_backend: str
    cuda_graphs: Literal["auto", "on", "off"]
    memory_utilization: float
    cache_memory: int | None
    cache_dtype: torch.dtype | None = None  # None: the model's own
    features: FeatureKinds = NO_FEATURES
    quantization: QuantizationType = QuantizationType.NONE
    chain: ChainPlace | None = None


@dataclass(frozen=True, slots=True)
class DraftPlace:
    """What a draft shares with its target: the stream of its steps, its embeddings there, room for drafts in rows from
    `first_draft_row` on of the tokens that its steps can read, and the limits and choices that it was made with."""

    stream: torch.cuda.Stream
    embeddings: Embeddings
    limits: GpuLimits
    attention_backend: str
    uses_graphs: bool
    tokens_R: torch.Tensor
    first_draft_row: int


def why_not_fused(config: ModelConfig, dtype: torch.dtype) -> str | None:
    """Why the fused kernels cannot run this model here; None where they can."""
    if config.head_size not in HEAD_SIZES:
        return f"head size {config.head_size}: the GPU kernels are written for 64 and 128"
    if dtype not in DTYPES:
        return f"{str(dtype).removeprefix('torch.')} weights: the GPU kernels are written for bfloat16 and float16"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None
