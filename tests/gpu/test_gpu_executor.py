"""The GPU's executor: graphs against launches, fused layers against plain torch, swapping, memory. `make test-gpu`."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from answers import DRAWN, GREEDY, OPTIONS, TEXTS, TINY, answers
from reference import Reference

from autobot_llm.engine.embedding import TextEmbedding
from autobot_llm.engine.engine import Engine
from autobot_llm.engine.kernels.gpu import streamed
from autobot_llm.engine.kernels.gpu.nvrtc import CudaKernel
from autobot_llm.engine.load import load_engine
from autobot_llm.engine.sequence import SamplingParams
from autobot_llm.errors import ConfigurationError

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[str, Engine]]:
    made = {
        "graphs": load_engine(OPTIONS),
        "launches": load_engine(dataclasses.replace(OPTIONS, cuda_graphs="off")),
        "sdpa": load_engine(dataclasses.replace(OPTIONS, attention_backend="sdpa")),
    }
    yield made
    for engine in made.values():
        engine.close()


def test_short_prompts_are_replayed_and_long_ones_launched(engines: dict[str, Engine], reference: Reference) -> None:
    executor = engines["graphs"].executor
    keys = executor.graphs.keys
    assert "decode 8" in keys and "prompts 64" in keys and "prompts 512" in keys
    assert not engines["launches"].executor.graphs.keys
    assert executor.description.weights is None, "they are not quantized"
    for name in ("graphs", "launches"):
        reference.check(answers(engines[name], GREEDY, repeat=3))
    assert executor.graphs.keys == keys, "a graph was captured after the start"


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("together", [True, False], ids=["together", "alone"])
def test_a_replayed_graph_answers_what_its_launches_do(
    engines: dict[str, Engine], reference: Reference, params: SamplingParams, together: bool
) -> None:
    """As float32 does, each of them: a graph's padding may change how a sum is cut, and so its last bit."""
    for name in ("graphs", "launches"):
        reference.check(answers(engines[name], params, together=together))
    assert engines["graphs"].executor.graphs.keys and not engines["launches"].executor.graphs.keys


def test_prompts_beside_a_crowd_are_replayed_and_answered_as_ever(
    engines: dict[str, Engine], reference: Reference
) -> None:
    """A hundred sequences: prompts beside more than 64 have graphs of their own."""
    params = dataclasses.replace(GREEDY, max_tokens=6)
    texts = [f"{number}. {TEXTS[number % len(TEXTS)]}" for number in range(100)]
    assert "crowds 1024" in engines["graphs"].executor.graphs.keys
    for name in ("graphs", "launches"):
        reference.check(answers(engines[name], params, texts=texts))


def test_vectors_are_those_of_plain_torch_on_a_cpu(engines: dict[str, Engine]) -> None:
    """bfloat16 products here, float32 there: the directions agree, the last digits do not."""
    host = load_engine(dataclasses.replace(OPTIONS, device="cpu", compiled_step="off"))
    texts = [host.tokenizer.encode(text) * repeat for text in TEXTS for repeat in (1, 9, 40)]
    try:
        expected = embedded(host, [text[:400] for text in texts])
        for name in ("graphs", "launches", "sdpa"):
            for one, other in zip(embedded(engines[name], [text[:400] for text in texts]), expected, strict=True):
                assert torch.dot(torch.tensor(one), torch.tensor(other)).item() > 0.999
    finally:
        host.close()


def embedded(engine: Engine, texts: list[list[int]]) -> list[array[float]]:
    embedding = TextEmbedding(texts)
    while not embedding.advance(engine):
        pass
    embedding.release(engine)
    assert engine.scheduler.block_pool.num_free == engine.scheduler.block_pool.num_blocks
    return embedding.vectors


def test_the_logits_are_those_of_plain_torch(engines: dict[str, Engine]) -> None:
    """The same prompts through the slow decoder in float32 on the CPU, in one chunk and then token by token."""
    from autobot_llm.engine.attention.sdpa import SdpaAttention
    from autobot_llm.engine.batching.plan import ScheduledSequence, build_batch
    from autobot_llm.engine.eager import EagerExecutor
    from autobot_llm.engine.models.config import load_config
    from autobot_llm.engine.models.decoder import Decoder
    from autobot_llm.engine.models.weights import load_weights
    from autobot_llm.engine.sequence import Sequence

    config = load_config(TINY)
    weights = load_weights(TINY, config, dtype=torch.float32, device="cpu")
    attention = SdpaAttention(config, num_blocks=64, block_size=16, dtype=torch.float32, device="cpu")
    slow = EagerExecutor(Decoder(config, weights), attention, reason="a test")
    generator = torch.Generator().manual_seed(0)
    for name in ("graphs", "launches", "sdpa"):
        fast = engines[name].executor
        sequences = []
        for i, length in enumerate((200, 90, 33)):
            ids = torch.randint(5, 8000, (length + 3,), generator=generator).tolist()
            sequences.append(Sequence(i, ids, SamplingParams(max_tokens=1)))
        for sequence, blocks in zip(
            sequences,
            ([5, 9, 1, 3, 30, 31, 8, 2, 7, 6, 4, 40, 41], [11, 10, 12, 50, 51, 52], [20, 22, 21]),
            strict=True,
        ):
            sequence.block_ids.extend(blocks)
        # fresh; a part on top of a cached beginning beside one that decodes; everybody decodes
        for parts in (
            ((0, 0, 120), (1, 0, 60), (2, 0, 20)),
            ((0, 120, 200), (1, 60, 61), (2, 20, 33)),
            ((0, 200, 201), (1, 61, 62), (2, 33, 34)),
        ):
            scheduled = [ScheduledSequence(sequences[i], a, b - a, True) for i, a, b in parts]
            batch = build_batch(scheduled, 16)
            expected = slow.execute(batch)
            found = fast.execute(batch).cpu()
            error = (found - expected).norm() / expected.norm()
            assert error < 0.02, f"{name} {parts}: relative error {float(error):.3g}"


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_answers_to_longer_prompts_are_those_of_float32_with_either_attention(
    engines: dict[str, Engine], reference: Reference, params: SamplingParams
) -> None:
    for name in ("graphs", "sdpa"):
        reference.check(answers(engines[name], params, repeat=6))


def test_blocks_come_back_from_host_memory_as_they_were(engines: dict[str, Engine]) -> None:
    executor = engines["graphs"].executor
    cache = executor._storage.cache_L2BK
    blocks = [3, 17, 5]
    cache[:, :, blocks] = torch.randn_like(cache[:, :, blocks])
    torch.cuda.synchronize()
    before = cache[:, :, blocks].clone()
    swapped = executor.copy_out(blocks)
    executor.discard(blocks)
    torch.cuda.synchronize()
    assert not cache[:, :, blocks].any()
    executor.copy_in(swapped, [8, 9, 10])
    torch.cuda.synchronize()
    assert torch.equal(cache[:, :, [8, 9, 10]], before)
    executor.discard([8, 9, 10])


def test_preempted_by_swap_and_by_recomputation_answers_stay_right(
    engines: dict[str, Engine], reference: Reference
) -> None:
    config = engines["graphs"].config
    block_bytes = 2 * config.num_layers * 16 * config.num_kv_heads * config.head_size * 2
    for preemption in ("swap", "recompute"):
        engine = load_engine(
            dataclasses.replace(
                OPTIONS, max_model_len=160, preemption=preemption, kv_cache_memory=16 * block_bytes,
                prefix_caching=False,
            )
        )  # fmt: skip
        found = answers(engine, GREEDY, repeat=4)
        num_preemptions = engine.scheduler.num_preemptions
        engine.close()
        assert num_preemptions > 0
        reference.check(found)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="the kernel is Hopper's"
)
def test_an_engine_starts_and_answers_where_the_compiler_refuses_a_kernel(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "nonsense.cu").write_text("nonsense")
    kernel = CudaKernel(str(tmp_path / "nonsense.cu"), "streamed_rows")
    monkeypatch.setattr(streamed, "_kernel", kernel)
    engine = load_engine(OPTIONS)
    try:
        assert engine.executor.graphs.keys
        reference.check(answers(engine, GREEDY))
    finally:
        engine.close()
    assert kernel.refusal is not None and "nonsense" in kernel.refusal
    assert sum("nonsense.cu does not compile" in record.getMessage() for record in caplog.records) == 1


def test_what_does_not_fit_is_refused_with_advice() -> None:
    with pytest.raises(ConfigurationError, match="AUTOBOT_GPU_MEMORY_UTILIZATION"):
        load_engine(dataclasses.replace(OPTIONS, gpu_memory_utilization=0.0001))
    with pytest.raises(ConfigurationError, match="AUTOBOT_KV_CACHE_MEMORY"):
        load_engine(dataclasses.replace(OPTIONS, kv_cache_memory=400 * 2**30))


def test_a_backend_that_cannot_run_is_refused_by_name() -> None:
    import importlib.util

    if importlib.util.find_spec("flash_attn_interface") is None:
        with pytest.raises(ConfigurationError, match=r"AUTOBOT_ATTENTION_BACKEND='flash_attention'"):
            load_engine(dataclasses.replace(OPTIONS, attention_backend="flash_attention"))


def test_graphs_replay_with_new_inputs_and_can_be_cleared() -> None:
    from autobot_llm.engine.gpu.graphs import CUDAGraphManager

    manager: CUDAGraphManager[torch.Tensor] = CUDAGraphManager(warmup_steps=2)
    first = torch.randn(64, device="cuda")
    assert torch.equal(manager.capture("square", lambda x: x * x, first), first * first)
    second = torch.randn(64, device="cuda")
    expected = second * second
    assert torch.equal(manager.capture("square", lambda x: x + 1, second), expected)  # replayed, not called
    with pytest.raises(ValueError, match="captured for"):
        manager.capture("square", lambda x: x, torch.randn(63, device="cuda"))
    with pytest.raises(ValueError, match="CUDA device"):
        manager.capture("other", lambda x: x, torch.randn(4))
    manager.clear("square")
    assert manager.keys == ()
    assert torch.equal(manager.capture("square", lambda x: x + 1, second), second + 1)
    manager.clear()
    assert manager.keys == ()
