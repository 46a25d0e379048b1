"""The engine on a CUDA device, against itself on the CPU. `make test-gpu`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from answers import GREEDY, OPTIONS, TINY, answers
from reference import Reference

from autobot_llm.engine.attention.sdpa import SdpaAttention
from autobot_llm.engine.batching.plan import ScheduledSequence, build_batch
from autobot_llm.engine.eager import EagerExecutor
from autobot_llm.engine.load import load_engine
from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.models.decoder import Decoder
from autobot_llm.engine.models.weights import load_weights
from autobot_llm.engine.sampler import Sampler
from autobot_llm.engine.sequence import SamplingParams, Sequence

pytestmark = pytest.mark.gpu

BLOCK_SIZE = 16


@pytest.fixture(autouse=True)
def a_device() -> None:
    assert torch.cuda.is_available(), "make test-gpu needs a CUDA device"


def executor(device: str, dtype: torch.dtype) -> EagerExecutor:
    config = load_config(TINY)
    weights = load_weights(TINY, config, dtype=dtype, device=device)
    attention = SdpaAttention(config, num_blocks=64, block_size=BLOCK_SIZE, dtype=dtype, device=device)
    return EagerExecutor(Decoder(config, weights), attention, reason="a test")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.5)])
def test_logits_on_the_gpu_are_those_of_the_cpu(dtype: torch.dtype, tolerance: float) -> None:
    rng = np.random.default_rng(0)
    one = Sequence(0, rng.integers(5, 8000, 200).tolist(), SamplingParams(max_tokens=1))
    two = Sequence(1, rng.integers(5, 8000, 90).tolist(), SamplingParams(max_tokens=1))
    blocks = rng.permutation(64).tolist()
    one.block_ids, two.block_ids = blocks[:13], blocks[13:20]
    gpu, cpu = executor("cuda", dtype), executor("cpu", torch.float32)
    for parts in ([(one, 0, 150), (two, 0, 60)], [(one, 150, 151), (two, 60, 61)], [(one, 151, 200), (two, 61, 62)]):
        batch = build_batch([ScheduledSequence(s, a, b - a, True) for s, a, b in parts], BLOCK_SIZE)
        np.testing.assert_allclose(gpu.execute(batch).cpu(), cpu.execute(batch), atol=tolerance, rtol=0)


def test_a_seed_draws_the_same_tokens_on_both_devices() -> None:
    logits_RV = torch.randn(8, 8192, generator=torch.Generator().manual_seed(0)) * 3
    params = [SamplingParams(max_tokens=9, seed=i, top_k=0 if i % 2 else 40, top_p=0.95) for i in range(8)]
    sequences = [Sequence(i, [1, 2, 3], one) for i, one in enumerate(params)]
    on_cpu = Sampler(8192).sample(logits_RV, sequences)
    on_gpu = Sampler(8192).sample(logits_RV.cuda(), sequences)
    assert on_gpu == on_cpu


def test_the_engine_answers_on_the_gpu(reference: Reference) -> None:
    engine = load_engine(OPTIONS)
    try:
        reference.check(answers(engine, GREEDY))
    finally:
        engine.close()
