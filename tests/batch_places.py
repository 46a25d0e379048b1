"""Batch jobs in front of a strict server of each provider. For the tests of their folder."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from anthropic_batches import AnthropicBatchServer, anthropic_batches
from anthropic_upstream import KEY as ANTHROPIC_KEY
from openai_batches import KEY, OpenAIBatchServer, openai_batches

from autobot_llm import BatchJobs
from autobot_llm.cloud.batch_jobs import ItemResult, Job
from autobot_llm.cloud.batch_jobs.openai_service import OpenAIBatches
from autobot_llm.dialects.openai.requests import OPENAI
from autobot_llm.providers.openai import Endpoint
from autobot_llm.settings import Settings

Json = dict[str, Any]
GPT, CLAUDE = "gpt-4o-mini", "claude-haiku-4-5"
FAST = 0.02  # seconds to the first poll


class BearerEndpoint(Endpoint, frozen=True):
    """Any flavour at a server that asks for OpenAI's header."""

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {KEY}"}


def chat(text: str, **fields: Any) -> Json:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 20} | fields


@contextlib.asynccontextmanager
async def openai_jobs(tmp_path: Path, **fields: Any) -> AsyncIterator[tuple[OpenAIBatchServer, BatchJobs]]:
    values, options = fields.pop("settings", {}), fields.pop("service", None)
    async with openai_batches(**fields) as server:
        settings = Settings(**({"openai_endpoint": server.url, "openai_api_key": KEY, "cache_dir": tmp_path} | values))
        endpoint = BearerEndpoint(base_url=server.url, flavour=OPENAI)
        services = None if options is None else {"openai": OpenAIBatches(endpoint, name="openai", **options)}
        async with BatchJobs(settings, services=services, settle_seconds=0.1) as jobs:
            yield server, jobs


@contextlib.asynccontextmanager
async def anthropic_jobs(tmp_path: Path, **fields: Any) -> AsyncIterator[tuple[AnthropicBatchServer, BatchJobs]]:
    async with anthropic_batches(**fields) as server:
        settings = Settings(anthropic_endpoint=server.url, anthropic_api_key=ANTHROPIC_KEY, cache_dir=tmp_path)
        async with BatchJobs(settings, settle_seconds=0.1) as jobs:
            yield server, jobs


async def all_of(jobs: BatchJobs, job: Job) -> list[ItemResult]:
    return [result async for result in jobs.results(job.id)]


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def contents(results: list[ItemResult]) -> list[str]:
    return [result.answer["choices"][0]["message"]["content"] for result in results]
