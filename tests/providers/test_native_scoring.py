"""The native provider tells how likely its model finds a text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from autobot_llm import load_settings
from autobot_llm.providers.base import TextScorer
from autobot_llm.providers.native import NativeProvider

STORY = "Once upon a time there was a little fox. The fox lived in a big forest, and the fox liked to play. "


@pytest.fixture
async def native(tmp_path: Path) -> AsyncIterator[NativeProvider]:
    settings = load_settings(
        environ={}, env_file=None, overrides={"cache_dir": tmp_path, "compiled_step": "off", "max_model_len": 128}
    )
    provider = NativeProvider(settings)
    await provider.start()
    yield provider
    await provider.close()


def in_use(provider: NativeProvider) -> float:
    figures = provider.metrics()
    return figures["num_blocks"] - figures["num_free_blocks"]


async def test_every_token_has_its_place_and_a_log_probability(native: NativeProvider) -> None:
    assert isinstance(native, TextScorer)
    tokens = await native.score(STORY)
    assert "".join(STORY[token.start : token.end] for token in tokens) == STORY
    assert all(token.logprob is not None and token.logprob <= 0 for token in tokens)
    assert len(tokens) == (await native.text_counter())(STORY)


async def test_what_goes_before_makes_its_repetition_likelier(native: NativeProvider) -> None:
    async def total(before: str) -> float:
        return sum(token.logprob or 0 for token in await native.score("The zebra ate the cake.", before=before))

    assert await total("The zebra ate the cake. Mother asked: who ate the cake? ") > await total("") + 1


async def test_a_text_longer_than_the_context_is_scored_to_its_end(native: NativeProvider) -> None:
    text = STORY * 20
    tokens = await native.score(text)
    assert len(tokens) > 3 * 128
    assert tokens[-1].end == len(text)
    later = [token.logprob or 0 for token in tokens[200:]]
    first = [token.logprob or 0 for token in (await native.score(STORY))]
    assert sum(later) / len(later) > sum(first) / len(first) + 1  # each window still knows what was repeated


async def test_an_empty_text_has_no_tokens(native: NativeProvider) -> None:
    assert await native.score("") == ()


async def test_scoring_given_up_leaves_no_block_in_use(native: NativeProvider) -> None:
    before = in_use(native)
    task = asyncio.create_task(native.score(STORY * 30))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await native.score("The end.")  # the thread has read every command before this one
    while in_use(native) != before:
        await asyncio.sleep(0.005)
