"""A file of requests is checked as a whole before anything is sent; what is wrong is named by line and field."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from anthropic_batches import anthropic_batches
from anthropic_upstream import KEY as ANTHROPIC_KEY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai_batches import KEY, openai_batches

from autobot_llm import BatchJobs
from autobot_llm.cloud.batch_jobs.reading import read_lines
from autobot_llm.errors import ConfigurationError, InvalidRequestError, LLMError
from autobot_llm.settings import Settings

MESSAGES = [{"role": "user", "content": "Hi"}]
GOOD = {"messages": MESSAGES, "model": "m-1"}
LINE = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": GOOD}


@pytest.fixture
async def jobs(tmp_path: Path) -> AsyncIterator[BatchJobs]:
    async with openai_batches() as openai, anthropic_batches() as anthropic:
        values = {"openai_endpoint": openai.url, "openai_api_key": KEY, "anthropic_endpoint": anthropic.url}
        async with BatchJobs(Settings(**values, anthropic_api_key=ANTHROPIC_KEY, cache_dir=tmp_path)) as jobs:
            yield jobs
            assert openai.server.asked == anthropic.server.asked == []
            assert jobs.jobs() == []
            assert not [path for path in (tmp_path / "batches").glob("*") if path.is_dir()]  # nothing is left on disk


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"messages": [', "the body is not valid JSON in UTF-8"),
        (b"[1, 2]", "the body is not a JSON object"),
        (b'{"messages": "\xff"}', "not valid JSON in UTF-8"),
        ({"prompt": "x"}, "messages: this field is required"),
        (GOOD | {"custom_id": ""}, "custom_id: expected a text of 1 to 512 characters"),
        (GOOD | {"custom_id": 7}, "custom_id: expected a text"),
        (LINE | {"custom_id": "first"}, "custom_id: 'first' is that of line 1, too"),
        (LINE | {"method": "GET"}, "method: expected POST, got 'GET'"),
        (LINE | {"url": "/v1/images"}, "url: expected /v1/chat/completions or /v1/embeddings, got '/v1/images'"),
        (LINE | {"extra": 1}, "extra: unknown field"),
        ({key: LINE[key] for key in ("custom_id", "method", "url")}, "body: this field is required"),
        (LINE | {"body": []}, "body: expected an object"),
        (GOOD | {"temperature": 500}, "temperature"),
        (GOOD | {"temperature": "hot"}, "temperature: expected float, got str"),
        (GOOD | {"stream": True}, "stream: expected false; a batch gives whole answers"),
        ({"messages": MESSAGES}, "model: this field is required where no model is given for all"),
        (GOOD | {"model": "anthropic/claude"}, "model: 'anthropic/claude' is anthropic's, and this job goes to openai"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "role"),
        (LINE | {"url": "/v1/embeddings", "body": {"model": "e", "input": []}}, "input"),
    ],
)
async def test_a_wrong_line_is_named_and_nothing_is_sent(
    jobs: BatchJobs, tmp_path: Path, line: Any, words: str
) -> None:
    path = tmp_path / "in.jsonl"
    data = line if isinstance(line, bytes) else json.dumps(line).encode()
    path.write_bytes(json.dumps(GOOD | {"custom_id": "first"}).encode() + b"\n\n" + data + b"\n")
    with pytest.raises(InvalidRequestError) as caught:
        await jobs.submit(path, provider="openai")
    assert caught.value.message.startswith("line 3: ")
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"seed": 7}, "line 1: seed=7: Anthropic has no such field"),
        ({"speed": "fast"}, "line 1: speed: a batch has none"),
        ({"temperature": 1.5}, "line 1: temperature=1.5: Anthropic's goes from 0 to 1"),
    ],
)
async def test_what_the_provider_cannot_honour_is_refused_by_name(
    jobs: BatchJobs, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        await jobs.submit([GOOD | fields], provider="anthropic")


async def test_embeddings_are_refused_where_there_are_none(jobs: BatchJobs) -> None:
    line = LINE | {"url": "/v1/embeddings", "body": {"model": "e", "input": "x"}}
    with pytest.raises(InvalidRequestError, match="line 1: url: Anthropic makes no embeddings"):
        await jobs.submit([line], provider="anthropic")


@pytest.mark.parametrize("data", [b"", b"\n \n"])
async def test_an_empty_file_is_an_error(jobs: BatchJobs, tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(data)
    with pytest.raises(InvalidRequestError, match="there are no requests"):
        await jobs.submit(path, provider="openai")


async def test_a_provider_without_batches_is_named_with_those_that_have_them(jobs: BatchJobs) -> None:
    with pytest.raises(
        InvalidRequestError, match="provider='native': expected one that has batch jobs: openai, anthropic"
    ):
        await jobs.submit([GOOD])


async def test_a_missing_file_is_named(jobs: BatchJobs, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.jsonl"):
        await jobs.submit(tmp_path / "nowhere.jsonl", provider="openai")


async def test_openais_own_address_needs_a_key(tmp_path: Path) -> None:
    async with BatchJobs(Settings(cache_dir=tmp_path)) as jobs:
        with pytest.raises(ConfigurationError, match="set OPENAI_API_KEY"):
            await jobs.submit([GOOD], provider="openai")
        with pytest.raises(ConfigurationError, match="set ANTHROPIC_API_KEY"):
            await jobs.submit([GOOD], provider="anthropic")


def test_a_line_without_an_id_has_its_number() -> None:
    data = [
        json.dumps(GOOD).encode(),
        b"",
        json.dumps(GOOD | {"custom_id": "mine"}).encode(),
        json.dumps(GOOD).encode(),
    ]
    assert [line.custom_id for line in read_lines(data)] == ["line-1", "mine", "line-4"]


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(st.binary(max_size=60) | st.sampled_from([b"{}", b'{"custom_id":null}', json.dumps(LINE).encode()])))
def test_whatever_a_file_holds_the_only_error_is_ours(data: list[bytes]) -> None:
    try:
        list(read_lines(data))
    except LLMError as error:
        assert error.message.startswith(("line ", "there are no requests"))
