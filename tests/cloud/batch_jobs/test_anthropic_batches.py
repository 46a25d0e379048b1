"""A job at Anthropic: its answers in OpenAI's shape, and no batch of a stranger taken for one of ours."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from anthropic import AsyncAnthropic
from anthropic_batches import anthropic_batches
from anthropic_upstream import KEY as ANTHROPIC_KEY
from batch_faults import Hold
from batch_places import (
    CLAUDE,
    FAST,
    all_of,
    anthropic_jobs,
    chat,
    contents,
)
from openai.types.chat import ChatCompletion
from proxy_server import proxy_to

from autobot_llm import BatchJobs
from autobot_llm.cloud.ledger import FILE_NAME, read_spending
from autobot_llm.settings import Settings


async def test_anthropics_answers_come_in_openais_shape(tmp_path: Path) -> None:
    async with anthropic_jobs(tmp_path, fails=frozenset({"b"})) as (server, jobs):
        job = await jobs.submit([chat(text, custom_id=f"{text}!") for text in "abc"], model=f"anthropic/{CLAUDE}")
        assert job.provider == "anthropic" and len(server.batches) == 1
        server.run_all()
        await jobs.wait(job.id, first_poll=FAST)
        a, b, c = await all_of(jobs, job)
        assert contents([a, c]) == ["about a", "about c"]
        ChatCompletion.model_validate(a.answer, strict=True)
        assert a.answer["usage"]["completion_tokens"] == 5
        assert b.error is not None and (b.error.code, b.error.message) == ("invalid_request_error", "cannot do b")
        assert b.status_code == 400
        assert server.complaints == []


async def test_anthropics_client_works_with_the_same_server(tmp_path: Path) -> None:
    """The server that these tests trust is one that Anthropic's own client works with."""
    async with (
        anthropic_jobs(tmp_path) as (server, jobs),
        AsyncAnthropic(base_url=server.url, api_key=ANTHROPIC_KEY) as client,
    ):
        params = {"model": CLAUDE, "max_tokens": 5, "messages": [{"role": "user", "content": "x"}]}
        made = await client.messages.batches.create(requests=[{"custom_id": "a", "params": params}])
        ours = await jobs.submit([chat("ours")], model=f"anthropic/{CLAUDE}")
        assert [batch.id async for batch in await client.messages.batches.list()] == [ours.parts[0].batch_id, made.id]
        assert (await client.messages.batches.cancel(made.id)).processing_status == "canceling"
        server.run(made.id, rest="canceled", num_answered=0)
        assert (await client.messages.batches.retrieve(made.id)).request_counts.canceled == 1
        assert server.complaints == []


async def test_requests_that_need_another_version_of_anthropics_api_go_apart(tmp_path: Path) -> None:
    async with anthropic_jobs(tmp_path) as (server, jobs):
        job = await jobs.submit([chat("a"), chat("b", temperature=0.5), chat("c")], model=CLAUDE, provider="anthropic")
        versions = [server.headers[part.batch_id or ""]["anthropic-version"] for part in job.parts]
        assert [part.num_items for part in job.parts] == [2, 1] and len(set(versions)) == 2
        server.run_all()
        await jobs.wait(job.id, first_poll=FAST)
        assert contents(await all_of(jobs, job)) == ["about a", "about b", "about c"]
        assert server.complaints == []


async def test_a_cancelled_job_keeps_what_was_answered(tmp_path: Path) -> None:
    async with anthropic_jobs(tmp_path) as (server, jobs):
        job = await jobs.submit([chat(text) for text in "abc"], model=CLAUDE, provider="anthropic")
        cancelled = await jobs.cancel(job.id)
        assert cancelled.is_cancelled and cancelled.parts[0].status == "canceling"
        server.run(job.parts[0].batch_id or "", rest="canceled", num_answered=1)
        await jobs.wait(job.id, first_poll=FAST)
        results = await all_of(jobs, job)
        assert contents(results[:1]) == ["about a"]
        assert [result.error.code for result in results[1:] if result.error] == ["batch_cancelled"] * 2


async def test_a_foreign_batch_that_looks_like_ours_is_never_taken_for_it(tmp_path: Path) -> None:
    """Anthropic's batches carry no note of their sender's: only the ids in the results tell whose one is."""
    async with anthropic_jobs(tmp_path) as (server, jobs):
        foreign = [{"custom_id": f"x-{i}", "params": {"model": CLAUDE, "max_tokens": 1,
                    "messages": [{"role": "user", "content": "hi"}]}} for i in range(2)]  # fmt: skip
        server.hold = hold = Hold(0, "before")
        submitting = asyncio.create_task(jobs.submit([chat("a"), chat("b")], model=CLAUDE, provider="anthropic"))
        await hold.is_reached.wait()
        submitting.cancel()
        await asyncio.wait([submitting])
        (job,) = jobs.jobs()
        other = server.add(foreign)
        assert (await jobs.resume(job.id)).parts[0].state == "unconfirmed"
        server.run(other)
        job = await jobs.resume(job.id)
        assert job.parts[0].batch_id not in (None, other)
        server.run_all()
        await jobs.wait(job.id, first_poll=FAST)
        assert contents(await all_of(jobs, job)) == ["about a", "about b"]


async def test_a_result_that_makes_no_sense_harms_no_other(tmp_path: Path) -> None:
    async with anthropic_jobs(tmp_path) as (server, jobs):
        job = await jobs.submit([chat(text, custom_id=text) for text in "abcd"], model=CLAUDE, provider="anthropic")
        server.run_all()
        batch_id = job.parts[0].batch_id or ""
        lines = {json.loads(line)["custom_id"]: line for line in server.results[batch_id].splitlines()}
        hologram = lines[f"{job.id}-1"].replace(b'"type": "text"', b'"type": "hologram"')
        foreign = lines[f"{job.id}-0"].replace(job.id.encode(), b"job-of-another")
        endless = lines[f"{job.id}-0"].replace(f"{job.id}-0".encode(), f"{job.id}-{'9' * 5000}".encode())
        kept = [
            lines[f"{job.id}-0"],
            hologram,
            b"no JSON",
            foreign,
            endless,
            lines[f"{job.id}-3"],
            lines[f"{job.id}-3"],
        ]
        server.results[batch_id] = b"\n".join(kept)
        await jobs.wait(job.id, first_poll=FAST)
        a, b, c, d = await all_of(jobs, job)
        assert contents([a, d]) == ["about a", "about d"]
        assert b.error is not None and "hologram" in b.error.message
        assert c.error is not None and c.error.code == "missing_result"
        done = jobs.find(job.id)
        assert (done.num_failed, done.parts[0].num_unpriced) == (2, 1)
        (entered,) = read_spending(tmp_path / FILE_NAME, "2000-01-01")
        assert entered.num_requests == 2  # the line that came twice is paid once


@pytest.mark.parametrize("seconds_ahead", [-3600, 3600])
async def test_a_provider_whose_clock_is_wrong_is_understood(tmp_path: Path, seconds_ahead: float) -> None:
    async with anthropic_jobs(tmp_path, seconds_ahead=seconds_ahead) as (server, jobs):
        earlier = server.add([{"custom_id": "x", "params": {}}])  # as many requests as ours, a minute before
        created = datetime.fromisoformat(server.batches[earlier]["created_at"]) - timedelta(minutes=1)
        server.batches[earlier]["created_at"] = created.isoformat()
        server.hold = hold = Hold(0, "after")
        submitting = asyncio.create_task(jobs.submit([chat("a")], model=CLAUDE, provider="anthropic"))
        await hold.is_reached.wait()
        submitting.cancel()
        await asyncio.wait([submitting])
        server.run(list(server.batches)[-1])
        job = await jobs.status(jobs.jobs()[0].id)  # the earlier one, which is still running, cannot be ours
        assert job.parts[0].batch_id == list(server.batches)[-1]
        assert contents(await all_of(jobs, job)) == ["about a"]


async def test_batches_go_through_the_proxy_of_the_settings(tmp_path: Path) -> None:
    async with anthropic_batches() as server, proxy_to(server.url) as proxy:
        settings = Settings(
            anthropic_endpoint="http://models.example",
            anthropic_api_key=ANTHROPIC_KEY,
            cache_dir=tmp_path,
            http_proxy=proxy.url,
        )
        async with BatchJobs(settings, settle_seconds=0.1) as jobs:
            job = await jobs.submit([chat("a")], model=CLAUDE, provider="anthropic")
            assert job.state == "running" and server.complaints == []
    assert proxy.asked[0][0] == "POST http://models.example/v1/messages/batches HTTP/1.1"
