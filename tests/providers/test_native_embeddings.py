"""The native provider embeds texts and token ids, counts what it read, and refuses by name what it cannot honour."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from operator import mul
from pathlib import Path

import openai
import pytest
import torch
from server.server_harness import serving
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from autobot_llm import LLMInterface, load_settings
from autobot_llm.errors import ContextLengthError, InvalidRequestError, ModelNotFoundError, UnsupportedError
from autobot_llm.providers.base import Embedder
from autobot_llm.providers.native import NativeProvider
from autobot_llm.providers.native.provider import ASSETS
from autobot_llm.types import EmbeddingRequest, LLMRequest

FOLDER = ASSETS / "tiny"
TEXTS = ["Once upon a time there was a little fox.", "A fox!", "Mother said: it is raining, Tom. " * 12]


@pytest.fixture
async def native(tmp_path: Path) -> AsyncIterator[NativeProvider]:
    settings = load_settings(environ={}, env_file=None, overrides={"cache_dir": tmp_path, "compiled_step": "off"})
    provider = NativeProvider(settings)
    await provider.start()
    yield provider
    await provider.close()


def in_use(provider: NativeProvider) -> float:
    figures = provider.metrics()
    return figures["num_blocks"] - figures["num_free_blocks"]


async def test_vectors_are_those_of_transformers_and_the_usage_is_the_tokenizers(native: NativeProvider) -> None:
    assert isinstance(native, Embedder)
    ids = [Tokenizer.from_file(str(FOLDER / "tokenizer.json")).encode(text).ids for text in TEXTS]
    response = await native.embed(EmbeddingRequest(inputs=[*TEXTS, ids[0]], request_id="r"))
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    for token_ids, vector in zip(ids, response.vectors, strict=False):
        with torch.inference_mode():
            mean_E = model.model(torch.tensor([token_ids])).last_hidden_state[0].double().mean(0)
        assert list(vector) == pytest.approx((mean_E / mean_E.norm()).tolist(), abs=2e-4)
    assert response.vectors[3] == pytest.approx(response.vectors[0], abs=1e-5)
    assert response.usage.prompt_tokens == response.usage.total_tokens == sum(map(len, ids)) + len(ids[0])
    assert (response.model, response.provider, response.request_id) == ("tiny", "native", "r")
    assert in_use(native) == 0


async def test_texts_that_say_nearly_the_same_are_nearer_than_others(native: NativeProvider) -> None:
    response = await native.embed(
        EmbeddingRequest(inputs=["The fox ran home.", "A fox ran to its home.", "He ate seven cakes, and was sick!"])
    )
    fox, other_fox, cakes = response.vectors
    assert sum(map(mul, fox, other_fox)) > sum(map(mul, fox, cakes)) + 0.1


async def test_what_cannot_be_honoured_is_refused_by_name(native: NativeProvider) -> None:
    size = len((await native.embed(EmbeddingRequest(inputs=["a"]))).vectors[0])
    await native.embed(EmbeddingRequest(inputs=["a"], dimensions=size))
    for fields, error, says in (
        ({"dimensions": 7}, UnsupportedError, f"the vectors of model 'tiny' have {size}"),
        ({"extra_body": {"task": "query"}}, UnsupportedError, "'task'"),
        ({"model": "large"}, ModelNotFoundError, "large"),
        ({"inputs": ["a", [10**6]]}, InvalidRequestError, r"input\[1\]"),
        ({"inputs": ["word " * 5000]}, ContextLengthError, "context"),
        ({"inputs": ["x" * 10**6]}, ContextLengthError, "cannot fit"),
    ):
        with pytest.raises(error, match=says):
            await native.embed(EmbeddingRequest(**{"inputs": ["a"]} | fields))
    assert in_use(native) == 0


async def test_embedding_given_up_leaves_no_block_in_use_and_answers_go_on(native: NativeProvider) -> None:
    task = asyncio.create_task(native.embed(EmbeddingRequest(inputs=[TEXTS[2]] * 60)))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    events = [event async for event in native.stream(LLMRequest(prompt="Once", max_tokens=3, temperature=0))]
    assert events
    while in_use(native) != 0:
        await asyncio.sleep(0.005)


async def test_the_real_client_embeds_on_our_own_engine(tmp_path: Path) -> None:
    overrides = {"cache_dir": tmp_path, "compiled_step": "off", "port": 0, "host": "127.0.0.1"}
    settings = load_settings(environ={}, env_file=None, overrides=overrides)
    provider = NativeProvider(settings)
    llm = LLMInterface(settings, providers={"native": provider})
    async with serving(settings, llm, provider) as server, server.client() as client:
        many = await client.embeddings.create(model="tiny", input=TEXTS)
        again = await client.embeddings.create(model="tiny", input=[TEXTS[1], "something new"])
        assert [len(one.embedding) for one in many.data] == [len(many.data[0].embedding)] * 3
        assert again.data[0].embedding == many.data[1].embedding
        assert again.usage.prompt_tokens > 0
        with pytest.raises(openai.BadRequestError, match="dimensions"):
            await client.embeddings.create(model="tiny", input="a", dimensions=5)


async def test_the_semantic_cache_works_with_the_engines_own_vectors(tmp_path: Path) -> None:
    overrides = {"cache_dir": tmp_path, "compiled_step": "off", "semantic_cache_threshold": 0.8}
    settings = load_settings(environ={}, env_file=None, overrides=overrides)
    async with LLMInterface(settings) as llm:
        first = await llm.generate_response("Where is the little fox?", temperature=0, max_tokens=12)
        again = await llm.generate_response("Do you know where the little fox is?", temperature=0, max_tokens=12)
        other = await llm.generate_response("Do you know where the little dog is?", temperature=0, max_tokens=12)
    assert (again.content, again.cached) == (first.content, True)
    (line,) = [line for line in again.optimizations if line.name == "semantic_caching"]
    assert line.lossy and line.similarity is not None and 0.8 <= line.similarity <= 1
    assert not other.cached
