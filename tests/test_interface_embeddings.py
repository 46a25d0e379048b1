"""Embeddings through the interface, what a request asks of its provider, and providers that cannot be reached."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from autobot_llm import LLMInterface, Settings
from autobot_llm.errors import (
    InvalidRequestError,
    ModelNotFoundError,
    ProviderUnavailable,
    RequestTimeout,
    UnsupportedError,
)
from autobot_llm.providers.base import ModelInfo
from autobot_llm.providers.scripted import ScriptedProvider
from autobot_llm.types import EmbeddingRequest, EmbeddingResponse, LLMRequest, Usage

HELLO = [{"role": "user", "content": "hello there"}]


class EmbeddingProvider(ScriptedProvider):
    """Makes a vector of each input's length, after `patience` seconds."""

    def __init__(self, name: str, patience: float = 0.0) -> None:
        super().__init__(["hi"], name=name)
        self.asked: list[EmbeddingRequest] = []
        self.num_cancelled = 0
        self._patience = patience

    async def embed(self, request: EmbeddingRequest) -> EmbeddingResponse:
        self.asked.append(request)
        try:
            await asyncio.sleep(self._patience)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        return EmbeddingResponse(
            vectors=tuple([float(len(one))] for one in request.inputs),
            model=request.model or "default",
            provider=self.name,
            usage=Usage(prompt_tokens=4, completion_tokens=0),
            request_id=request.request_id or "",
        )


class UnreachableProvider(ScriptedProvider):
    async def models(self) -> list[ModelInfo]:
        raise ProviderUnavailable(f"{self.name} cannot be reached")


def interface(*providers: ScriptedProvider, **settings: Any) -> LLMInterface:
    return LLMInterface(Settings(**settings), providers={provider.name: provider for provider in providers})


async def test_texts_and_token_ids_get_a_vector_each_from_the_provider_that_is_named() -> None:
    first, other = EmbeddingProvider("native"), EmbeddingProvider("other")
    async with interface(first, other, models={"embedding": "other/e"}) as llm:
        assert (await llm.embed("abc", model="m")).vectors == ([3.0],)
        assert (await llm.embed(["a", [1, 2]], provider="native", dimensions=1)).vectors == ([1.0], [2.0])
        by_setting = await llm.embed("ab")
        whole = await llm.embed(EmbeddingRequest(inputs=["a"], model="other/x", tenant="t", request_id="r"))
        figures = llm.get_metrics()["interface"]
    assert (by_setting.provider, by_setting.model) == ("other", "e")
    assert (whole.model, whole.request_id, other.asked[-1].tenant) == ("x", "r", "t")
    assert first.asked[1].dimensions == 1
    assert (figures["num_requests"], figures["num_completed"], figures["num_prompt_tokens"]) == (4, 4, 16)
    assert figures["num_in_flight"] == 0


@pytest.mark.parametrize(
    ("inputs", "fields", "param"),
    [([], {}, "inputs"), ([""], {}, "inputs[0]"), (["a", []], {}, "inputs[1]"), ([[-1]], {}, "inputs[0]"),
     (["a"], {"dimensions": 0}, "dimensions")],
)  # fmt: skip
async def test_what_nobody_could_embed_is_refused_by_name(inputs: Any, fields: dict[str, Any], param: str) -> None:
    provider = EmbeddingProvider("native")
    async with interface(provider) as llm:
        with pytest.raises(InvalidRequestError) as caught:
            await llm.embed(inputs, **fields)
        assert llm.get_metrics()["interface"]["num_failed"] == 1
    assert caught.value.param == param
    assert provider.asked == []


async def test_a_provider_without_embeddings_and_one_that_does_not_exist_say_so() -> None:
    async with interface(ScriptedProvider(name="native")) as llm:
        with pytest.raises(UnsupportedError, match="provider 'native' makes no embeddings"):
            await llm.embed("a")
        with pytest.raises(ModelNotFoundError, match="no provider is called 'x'"):
            await llm.embed("a", provider="x")


async def test_embeddings_have_a_time_limit_and_can_be_cancelled() -> None:
    provider = EmbeddingProvider("native", patience=60)
    async with interface(provider, timeout=0.02) as llm:
        with pytest.raises(RequestTimeout, match=r"timeout of 0.02 s"):
            await llm.embed("a")
        task = asyncio.create_task(llm.embed(EmbeddingRequest(inputs=["a"], timeout=50)))
        while len(provider.asked) < 2:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        figures = llm.get_metrics()["interface"]
    assert provider.num_cancelled == 2
    assert (figures["num_failed"], figures["num_cancelled"], figures["num_in_flight"]) == (1, 1, 0)


async def test_only_who_reads_a_stream_asks_for_one() -> None:
    provider = ScriptedProvider(["a"], name="native")
    async with interface(provider) as llm:
        await llm.chat_completion(HELLO)
        await llm.chat_completion(HELLO, stream=True)
        _ = [event async for event in llm.stream(HELLO)]
        _ = [event async for event in llm.stream(LLMRequest(prompt="a"))]
        _ = [event async for event in llm.events(LLMRequest(prompt="a"))]
    assert [request.stream for request in provider.requests] == [False, True, True, True, False]


async def test_a_provider_that_cannot_be_reached_hides_nobody_elses_models() -> None:
    fine, lost = ScriptedProvider(name="native"), UnreachableProvider(name="lost")
    async with interface(fine, lost) as llm:
        await llm.chat_completion(HELLO, provider="lost", model="scripted")
        assert [model.provider for model in await llm.get_available_models()] == ["native"]
        await llm.switch_provider("lost")
        with pytest.raises(ProviderUnavailable):
            await llm.get_available_models()
