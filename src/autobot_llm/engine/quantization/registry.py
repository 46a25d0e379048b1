"""Quantized variants of known models, and the names that others give theirs. Knows names; asks nobody."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from autobot_llm.engine.quantization.scheme import QuantizationType


@dataclass(frozen=True, slots=True)
class KnownVariant:
    """A published quantized model. `note` says where it is the right one."""

    name: str
    type: QuantizationType
    note: str


INT8_NOTE = "INT8 products run on NVIDIA GPUs from Turing to Hopper and on CPUs; on Blackwell prefer fp8"
GPTQ_NOTE = "INT4 weights: the least memory, quickest at small batches"


def _variants(name: str) -> tuple[KnownVariant, ...]:
    return (
        KnownVariant(f"neuralmagic/{name}-INT8", QuantizationType.W8A8, INT8_NOTE),
        KnownVariant(f"TheBloke/{name}-GPTQ", QuantizationType.GPTQ, GPTQ_NOTE),
    )


QUANTIZED_MODEL_REGISTRY: Mapping[str, tuple[KnownVariant, ...]] = {
    "mistralai/Mistral-7B-Instruct-v0.2": _variants("Mistral-7B-Instruct-v0.2"),
    "meta-llama/Llama-2-7b-chat-hf": _variants("Llama-2-7b-chat-hf"),
    "meta-llama/Llama-2-13b-chat-hf": _variants("Llama-2-13b-chat-hf"),
}

SUFFIXES: Mapping[QuantizationType, tuple[str, ...]] = {
    QuantizationType.W8A8: ("-int8", "-w8a8"),  # the second as `autobot-llm quantize` names it
    QuantizationType.W8: ("-int8", "-w8"),
    QuantizationType.W4: ("-int4", "-w4", "-gptq", "-awq"),
    QuantizationType.GPTQ: ("-gptq",),
    QuantizationType.AWQ: ("-awq",),
    QuantizationType.FP8: ("-fp8",),
}


def variants_of(model: str, kind: QuantizationType) -> Iterator[str]:
    """Names under which a variant of this type may exist, the surest first."""
    last = model.rpartition("/")[2]
    for known, variants in QUANTIZED_MODEL_REGISTRY.items():
        if last == known.rpartition("/")[2]:
            yield from (variant.name for variant in variants if variant.type is kind)
    yield from (f"{model}{suffix}" for suffix in SUFFIXES.get(kind, ()))
