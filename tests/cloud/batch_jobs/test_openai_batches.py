"""A job at OpenAI and at what speaks its language: one file and batch for each kind of request, each result told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from batch_places import (
    FAST,
    GPT,
    BearerEndpoint,
    all_of,
    chat,
    contents,
    openai_jobs,
)
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletion
from openai_batches import KEY, Refused, openai_batches
from proxy_server import proxy_to

from autobot_llm import BatchJobs
from autobot_llm.cloud.batch_jobs.openai_service import OpenAIBatches
from autobot_llm.cloud.batch_jobs.service import Limits, sizes_of
from autobot_llm.cloud.batch_jobs.store import JobStore
from autobot_llm.dialects.openai.requests import AZURE
from autobot_llm.errors import InvalidRequestError, LLMError, ProviderError
from autobot_llm.settings import CloudSettings, Settings
from autobot_llm.transport.network import limits_of


async def test_answers_come_in_the_order_of_the_requests_and_in_openais_shape(tmp_path: Path) -> None:
    async with openai_jobs(tmp_path) as (server, jobs):
        job = await jobs.submit(
            [chat(f"number {i}", custom_id=f"id/{i} ü") for i in range(50)], model=GPT, provider="openai"
        )
        assert (job.state, job.num_items, len(job.parts)) == ("running", 50, 1)
        server.run_all()
        assert (await jobs.wait(job.id, first_poll=FAST)).state == "ended"
        results = await all_of(jobs, job)
        assert [result.custom_id for result in results] == [f"id/{i} ü" for i in range(50)]
        assert contents(results) == [f"about number {i}" for i in range(50)]
        ChatCompletion.model_validate(results[0].answer, strict=True)
        assert jobs.find(job.id).state == "fetched"
        assert server.complaints == []


async def test_the_openai_client_finds_its_own_batches_at_the_same_server(tmp_path: Path) -> None:
    """The server that these tests trust is one that OpenAI's own client works with."""
    async with openai_jobs(tmp_path) as (server, jobs), AsyncOpenAI(base_url=server.url, api_key=KEY) as client:
        line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": chat("x", model=GPT)}
        file = await client.files.create(file=("in.jsonl", json.dumps(line).encode()), purpose="batch")
        made = await client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"who": "me"}
        )
        ours = await jobs.submit([chat("ours")], model=f"openai/{GPT}")
        listed = [batch.id async for batch in client.batches.list()]
        assert listed == [ours.parts[0].batch_id, made.id]
        server.run_all()
        done = await client.batches.retrieve(made.id)
        assert done.status == "completed" and done.output_file_id is not None
        said = json.loads((await client.files.content(done.output_file_id)).text)
        assert said["response"]["body"]["choices"][0]["message"]["content"] == "about x"
        assert server.complaints == []


async def test_requests_of_several_models_and_paths_go_into_batches_of_one_kind(tmp_path: Path) -> None:
    lines = [
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": chat("a", model="m-1")},
        {"custom_id": "b", "method": "POST", "url": "/v1/embeddings", "body": {"model": "e-1", "input": ["x", "y"]}},
        {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": chat("c", model="openai/m-2")},
        {"custom_id": "d", "method": "POST", "url": "/v1/chat/completions", "body": chat("d", model="m-1")},
    ]
    async with openai_jobs(tmp_path) as (server, jobs):
        job = await jobs.submit(lines, provider="openai")
        assert [(part.url, part.model, part.num_items) for part in job.parts] == [
            ("/v1/chat/completions", "m-1", 2), ("/v1/embeddings", "e-1", 1), ("/v1/chat/completions", "m-2", 1),
        ]  # fmt: skip
        server.run_all()
        await jobs.wait(job.id, first_poll=FAST)
        results = await all_of(jobs, job)
        assert [result.custom_id for result in results] == ["a", "b", "c", "d"]
        assert contents([results[0], *results[2:]]) == ["about a", "about c", "about d"]
        assert len(results[1].answer["data"]) == 2
        assert server.complaints == []


async def test_a_job_larger_than_a_batch_becomes_several_and_is_one_to_its_user(tmp_path: Path) -> None:
    limits = Limits(max_requests=4, max_bytes=10_000)
    async with openai_jobs(tmp_path, service={"limits": limits}) as (server, jobs):
        job = await jobs.submit([chat(f"{i}") for i in range(10)], model=GPT, provider="openai")
        assert [part.num_items for part in job.parts] == [4, 4, 2]
        assert len(server.batches) == 3
        server.run_all()
        await jobs.wait(job.id, first_poll=FAST)
        assert contents(await all_of(jobs, job)) == [f"about {i}" for i in range(10)]


async def test_bytes_bound_a_batch_too_and_a_request_that_fits_in_none_is_named(tmp_path: Path) -> None:
    limits = Limits(max_requests=100, max_bytes=5_000)
    async with openai_jobs(tmp_path, service={"limits": limits}) as (server, jobs):
        job = await jobs.submit([chat("x" * 1500) for _ in range(5)], model=GPT, provider="openai")
        assert all(len(server.contents[part.file_id or ""]) <= 5_000 for part in job.parts)
        assert [part.num_items for part in job.parts] == [2, 2, 1]
        with pytest.raises(InvalidRequestError, match=r"line 2: the request has .* at most 5,000 bytes"):
            await jobs.submit([chat("small"), chat("x" * 6000)], model=GPT, provider="openai")
        assert len(server.batches) == 3


async def test_a_request_that_failed_tells_its_own_reason_and_harms_no_other(tmp_path: Path) -> None:
    async with openai_jobs(tmp_path, fails=frozenset({"b"}), drops=frozenset({"c"})) as (server, jobs):
        job = await jobs.submit([chat(text, custom_id=text) for text in "abcd"], model=GPT, provider="openai")
        server.run_all()
        await jobs.wait(job.id, first_poll=FAST)
        a, b, c, d = await all_of(jobs, job)
        assert contents([a, d]) == ["about a", "about d"]
        assert b.error is not None and (b.error.code, b.error.message) == ("no_way", "cannot do b")
        assert json.loads(b.line())["response"]["status_code"] == 400
        assert c.error is not None and c.error.code == "missing_result"
        with pytest.raises(LLMError, match="b: cannot do b"):
            _ = b.answer
        assert jobs.find(job.id).num_failed == 2


async def test_an_expired_batch_gives_what_was_answered_and_the_reason_for_the_rest(tmp_path: Path) -> None:
    async with openai_jobs(tmp_path) as (server, jobs):
        job = await jobs.submit([chat(text) for text in "abc"], model=GPT, provider="openai")
        server.run(job.parts[0].batch_id or "", status="expired", num_answered=2)
        assert (await jobs.wait(job.id, first_poll=FAST)).parts[0].status == "expired"
        results = await all_of(jobs, job)
        assert contents(results[:2]) == ["about a", "about b"]
        assert results[2].error is not None and results[2].error.code == "batch_expired"


async def test_a_batch_that_fails_as_a_whole_says_why_for_each_request(tmp_path: Path) -> None:
    async with openai_jobs(tmp_path) as (server, jobs):
        job = await jobs.submit([chat("a"), chat("b")], model=GPT, provider="openai")
        problem = {
            "code": "token_limit_exceeded",
            "message": "Enqueued token limit reached",
            "param": None,
            "line": None,
        }
        server.batches[job.parts[0].batch_id or ""] |= {
            "status": "failed", "errors": {"object": "list", "data": [problem]},
        }  # fmt: skip
        assert (await jobs.wait(job.id, first_poll=FAST)).state == "ended"
        results = await all_of(jobs, job)
        assert {result.error.code for result in results if result.error} == {"batch_failed"}
        assert all(
            "Enqueued token limit reached" in (result.error.message if result.error else "") for result in results
        )
        # What failed as a whole may be sent again without a word.
        assert (await jobs.submit([chat("a"), chat("b")], model=GPT, provider="openai")).id != job.id


async def test_a_part_that_the_provider_refuses_does_not_keep_the_others_from_it(tmp_path: Path) -> None:
    def refuse(asked: Any) -> Refused | None:
        is_first = asked.method == "POST" and asked.path == "/v1/batches" and b'-0"' in asked.body
        return Refused(400, "billing hard limit") if is_first else None

    async with openai_jobs(tmp_path, refuse=refuse) as (server, jobs):
        job = await jobs.submit([chat("a", model="m-1"), chat("b", model="m-2")], provider="openai")
        assert [part.state for part in job.parts] == ["refused", "running"]
        server.run_all()
        await jobs.wait(job.id, first_poll=FAST)
        a, b = await all_of(jobs, job)
        assert a.error is not None and a.error.code == "batch_refused" and "billing hard limit" in a.error.message
        assert contents([b]) == ["about b"]


async def test_a_wrong_key_is_an_error_and_the_job_goes_on_with_the_right_one(tmp_path: Path) -> None:
    async with openai_batches() as server:
        wrong = Settings(openai_endpoint=server.url, openai_api_key="sk-wrong", cache_dir=tmp_path)
        async with BatchJobs(wrong) as jobs:
            with pytest.raises(ProviderError, match="was not accepted"):
                await jobs.submit([chat("a")], model=GPT, provider="openai")
            (job,) = jobs.jobs()
            assert job.state == "unfinished" and job.parts[0].state == "unsent"
        right = Settings(openai_endpoint=server.url, openai_api_key=KEY, cache_dir=tmp_path)
        async with BatchJobs(right) as jobs:
            assert (await jobs.resume(job.id)).state == "running"
            assert len(server.batches) == 1


async def test_an_overloaded_provider_is_asked_again(tmp_path: Path) -> None:
    num_refused = 0

    def refuse(asked: Any) -> Refused | None:
        nonlocal num_refused
        if asked.method == "POST" and num_refused < 1:
            num_refused += 1
            return Refused(429, "slow down")
        return None

    async with openai_jobs(tmp_path, refuse=refuse) as (server, jobs):
        job = await jobs.submit([chat("a")], model=GPT, provider="openai")
        assert job.state == "running" and len(server.batches) == len(server.files) == 1


async def test_a_batch_of_a_cloud_without_metadata_is_known_by_its_file(tmp_path: Path) -> None:
    async with openai_batches(keeps_metadata=False) as server:
        clouds = {"groq": CloudSettings(endpoint=server.url, api_key=KEY)}
        async with BatchJobs(Settings(clouds=clouds, cache_dir=tmp_path), settle_seconds=0.1) as jobs:
            job = await jobs.submit([chat("a")], model="groq/llama")
            assert job.provider == "groq" and server.complaints == []
            part = job.parts[0]
            JobStore(tmp_path / "batches").update_part(part, batch_id=None, begun_at=job.created, intent_at=job.created)
            assert (await jobs.resume(job.id)).parts[0].batch_id == part.batch_id
            assert len(server.batches) == 1


async def test_azures_files_are_waited_for(tmp_path: Path) -> None:
    async with openai_batches(num_pending_looks=2) as server:
        service = OpenAIBatches(BearerEndpoint(base_url=server.url, flavour=AZURE), name="openai")
        async with BatchJobs(Settings(cache_dir=tmp_path), services={"openai": service}) as jobs:
            job = await jobs.submit([chat("a")], model="my-deployment", provider="openai")
            assert job.state == "running" and server.complaints == []


async def test_batches_go_through_the_proxy_of_the_settings(tmp_path: Path) -> None:
    async with openai_batches() as server, proxy_to(server.url) as proxy:
        settings = Settings(
            openai_endpoint="http://models.example/v1", openai_api_key=KEY, cache_dir=tmp_path, http_proxy=proxy.url
        )
        async with BatchJobs(settings, settle_seconds=0.1) as jobs:
            job = await jobs.submit([chat("a")], model=GPT, provider="openai")
            assert job.state == "running" and server.complaints == []
    assert proxy.asked[0][0] == "POST http://models.example/v1/files HTTP/1.1"


def test_a_pool_for_batches_keeps_to_the_limits_of_the_settings() -> None:
    few = sizes_of(limits_of(Settings(cloud_connection_pool_size=2, cloud_connection_max_age=7.0)))
    assert (few.max_connections, few.max_age_seconds) == (2, 7.0)
    many = sizes_of(limits_of(Settings(cloud_connection_pool_size=100, cloud_connection_max_age=None)))
    assert (many.max_connections, many.max_age_seconds) == (4, None)
    assert many.max_stream_bytes > limits_of(Settings()).max_stream_bytes, "results may be large"
