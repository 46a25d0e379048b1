"""Texts as vectors: what transformers makes of them, whoever else is in the step, and nothing left behind."""

from __future__ import annotations

import math
from array import array
from functools import partial
from pathlib import Path

import pytest
import torch
from engines import TINY, Driver, greedy, num_leaked_blocks, request, tiny_engine
from test_pipelining import pipelined
from test_service import FaultyExecutor, engine_with, read, settled
from transformers import AutoModelForCausalLM

from autobot_llm.engine.batching.plan import StepBatch
from autobot_llm.engine.embedding import MAX_STEP_TOKENS, TextEmbedding
from autobot_llm.engine.engine import Engine
from autobot_llm.engine.service import EngineService
from autobot_llm.errors import ContextLengthError, EngineError, InvalidRequestError, OverloadedError, UnsupportedError

LONG = [(7 * i) % 8000 + 10 for i in range(MAX_STEP_TOKENS + 40)]
TEXTS = [[100, 200, 300, 400], [5], LONG, [9] * 40, list(range(1000, 1090))]


class SpoiledExecutor(FaultyExecutor):
    def hidden(self, batch: StepBatch) -> torch.Tensor:
        return torch.full((batch.num_tokens, 384), math.nan)


def embedded(engine: Engine, texts: list[list[int]]) -> list[array[float]]:
    embedding = TextEmbedding(texts)
    try:
        while not embedding.advance(engine):
            pass
    finally:
        embedding.release(engine)
    return embedding.vectors


@pytest.mark.parametrize("compiled", [False, True])
def test_a_vector_is_the_normalized_mean_of_transformers_last_hidden_states(tmp_path: Path, compiled: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    engine = tiny_engine(tmp_path, compiled=compiled)
    for token_ids, vector in zip(TEXTS, embedded(engine, TEXTS), strict=True):
        with torch.inference_mode():
            hidden_TE = model.model(torch.tensor([token_ids])).last_hidden_state[0]
        expected_E = torch.nn.functional.normalize(hidden_TE.double().mean(0), dim=0)
        found_E = torch.tensor(vector, dtype=torch.float64)
        # bfloat16 weights in transformers' float32, and float32 here: two orders of the same sums
        assert torch.dot(found_E, expected_E).item() == pytest.approx(1, abs=1e-5)
        assert found_E.tolist() == pytest.approx(expected_E.tolist(), abs=2e-4)
        assert found_E.norm().item() == pytest.approx(1, abs=1e-6)
    assert num_leaked_blocks(engine) == 0


def test_a_vector_is_the_same_bits_alone_in_company_and_cut_into_other_steps(tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path, compiled=True)
    together = embedded(engine, TEXTS)
    assert embedded(engine, TEXTS[::-1]) == together[::-1]
    assert [embedded(engine, [text])[0] for text in TEXTS] == together
    small = tiny_engine(tmp_path, compiled=True, max_num_batched_tokens=48, max_num_seqs=3)
    assert embedded(small, TEXTS) == together


def test_torch_alone_makes_the_same_vectors_within_rounding(tmp_path: Path) -> None:
    eager = embedded(tiny_engine(tmp_path, compiled=False), TEXTS)
    for slow, fast in zip(eager, embedded(tiny_engine(tmp_path, compiled=True), TEXTS), strict=True):
        assert slow.tolist() == pytest.approx(fast.tolist(), abs=2e-4)


def test_what_was_embedded_is_nobodys_prefix_and_no_answer_changes(tmp_path: Path) -> None:
    driver = Driver(tiny_engine(tmp_path, compiled=True))
    driver.add(0, request(LONG, greedy(8)))
    driver.run()
    fresh = Driver(tiny_engine(tmp_path, compiled=True))
    embedded(fresh.engine, [LONG])
    stats = fresh.add(0, request(LONG, greedy(8)))
    fresh.step()
    embedded(fresh.engine, TEXTS)
    fresh.run()
    assert stats.num_cached_tokens == 0
    assert fresh.texts == driver.texts


def test_what_the_model_cannot_read_is_refused_by_its_place(tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path, compiled=False, num_blocks=20)
    with pytest.raises(ContextLengthError, match=r"input\[1\]: a text of 321 tokens"):
        embedded(engine, [[1], [9] * 321])
    with pytest.raises(InvalidRequestError, match=r"input\[0\]: token id 99999"):
        embedded(engine, [[99999]])
    with pytest.raises(InvalidRequestError, match=r"input\[2\]: it has no tokens"):
        embedded(engine, [[1], [2], []])
    assert num_leaked_blocks(engine) == 0


def test_a_full_cache_makes_texts_wait_for_each_other_and_a_taken_one_puts_them_off(tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path, compiled=False, num_blocks=20)
    many = [[9 + i] * 100 for i in range(9)]  # seven blocks each
    assert len(embedded(engine, many)) == 9
    taken = engine.scheduler.block_pool.allocate(18)
    assert taken is not None
    with pytest.raises(OverloadedError):
        embedded(engine, many)
    engine.scheduler.block_pool.free(taken)
    assert num_leaked_blocks(engine) == 0


def test_nan_is_an_error_and_leaves_no_block_behind(tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path, compiled=False)

    engine.executor = SpoiledExecutor(engine.executor, lambda batch, logits: None)
    with pytest.raises(EngineError, match="NaN"):
        embedded(engine, [[1, 2, 3, 4]])
    assert num_leaked_blocks(engine) == 0


async def test_a_device_without_hidden_states_says_so_and_goes_on_answering() -> None:
    service = EngineService(lambda: pipelined(lazy=True), max_queued_requests=8)
    await service.start()
    try:
        with pytest.raises(UnsupportedError, match="makes no embeddings"):
            await service.run(partial(embedded, texts=[[1]]))
        assert await read(service.submit(request([7, 8, 9], greedy(3))))
    finally:
        await service.close()


async def test_embedding_between_steps_changes_no_answer(tmp_path: Path) -> None:
    service = EngineService(partial(engine_with, tmp_path), max_queued_requests=8)
    await service.start()
    try:
        alone = await read(service.submit(request([100, 200], greedy(40))))
        answer = read(service.submit(request([100, 200], greedy(40))))
        assert len(await service.run(partial(embedded, texts=TEXTS))) == len(TEXTS)
        assert "".join(o.text for o in await answer) == "".join(o.text for o in alone)
        assert num_leaked_blocks(await settled(service)) == 0
    finally:
        await service.close()
