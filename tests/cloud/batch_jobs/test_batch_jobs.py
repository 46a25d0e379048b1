"""A batch job is checked, sent, waited for and fetched; every request gets its result, in its place, paid once."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from anthropic_batches import AnthropicBatchServer, anthropic_batches
from anthropic_upstream import KEY as ANTHROPIC_KEY
from batch_faults import Hold
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletion
from openai_batches import KEY, OpenAIBatchServer, Refused, openai_batches

from autobot_llm import BatchJobs
from autobot_llm.cloud.batch_jobs import ItemResult, Job, Progress
from autobot_llm.cloud.batch_jobs.openai_service import OpenAIBatches
from autobot_llm.cloud.batch_jobs.service import Limits
from autobot_llm.cloud.batch_jobs.store import JobStore
from autobot_llm.cloud.ledger import FILE_NAME, read_spending
from autobot_llm.dialects.openai.requests import AZURE, OPENAI
from autobot_llm.errors import BudgetExceededError, InvalidRequestError, LLMError, ProviderError
from autobot_llm.providers.openai import Endpoint
from autobot_llm.settings import CloudSettings, Settings

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


# --- OpenAI


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


# --- Anthropic


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
        kept = [lines[f"{job.id}-0"], hologram, b"no JSON", foreign, lines[f"{job.id}-3"], lines[f"{job.id}-3"]]
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


# --- whichever provider


async def test_the_same_requests_are_one_job_until_they_are_fetched(tmp_path: Path) -> None:
    async with openai_jobs(tmp_path) as (server, jobs):
        job = await jobs.submit([chat("a")], model=GPT, provider="openai")
        assert (await jobs.submit([chat("a")], model=GPT, provider="openai")).id == job.id
        assert len(server.batches) == 1
        other = await jobs.submit([chat("a", temperature=0)], model=GPT, provider="openai")
        again = await jobs.submit([chat("a")], model=GPT, provider="openai", again=True)
        assert len({job.id, other.id, again.id}) == len(server.batches) == 3
        assert {folder.name for folder in (tmp_path / "batches").iterdir() if folder.is_dir()} == {
            job.id, other.id, again.id,
        }  # fmt: skip


async def test_many_submit_the_same_file_at_once_and_one_job_comes_of_it(tmp_path: Path) -> None:
    async with openai_jobs(tmp_path) as (server, jobs):
        path = tmp_path / "in.jsonl"
        path.write_text("\n".join(json.dumps(chat(f"{i}")) for i in range(20)))
        tries = (jobs.submit(path, model=GPT, provider="openai") for _ in range(5))
        done = await asyncio.gather(*tries, return_exceptions=True)
        assert len(jobs.jobs()) == len(server.batches) == len(server.files) == 1
        assert {one.id for one in done if isinstance(one, Job)} == {jobs.jobs()[0].id}
        assert {one.code for one in done if isinstance(one, LLMError)} <= {"batch_busy"}


async def test_what_a_job_costs_is_entered_once_at_half_the_price(tmp_path: Path) -> None:
    async with openai_jobs(tmp_path) as (server, jobs):
        job = await jobs.submit([chat(f"{i}") for i in range(4)], model=GPT, provider="openai")
        # 1 token of prompt each, and 20 of answer at 0.6 dollars a million, by half.
        assert job.reserved == pytest.approx(4 * (20 * 0.6) / 1e6 / 2, rel=0.05)
        server.run_all()
        await jobs.wait(job.id, first_poll=FAST)
        await all_of(jobs, job)
        await jobs.fetch(job.id, tmp_path / "out.jsonl")
        done = jobs.find(job.id)
        full = 4 * ((12 - 8) * 0.15 + 8 * 0.075 + 5 * 0.6) / 1e6
        assert done.spent == pytest.approx(full / 2)
        assert done.saved == pytest.approx(full / 2 + 4 * 8 * 0.075 / 1e6)
        assert done.reserved == 0
        (line,) = read_spending(tmp_path / FILE_NAME, "2000-01-01")
        assert (line.model, line.num_requests, line.completion_tokens) == (GPT, 4, 20)
        assert (line.dollars_spent, line.dollars_saved) == (pytest.approx(done.spent), pytest.approx(done.saved))


async def test_a_job_that_could_cost_more_than_is_left_is_not_sent(tmp_path: Path) -> None:
    settings = {"cloud_budget_per_day": 20 * 0.6 / 1e6 / 2 * 5.5}  # five answers of 20 tokens
    async with openai_jobs(tmp_path, settings=settings) as (server, jobs):
        await jobs.submit([chat(f"{i}") for i in range(3)], model=GPT, provider="openai")
        with pytest.raises(BudgetExceededError, match="AUTOBOT_CLOUD_BUDGET_PER_DAY"):
            await jobs.submit([chat(f"more {i}") for i in range(3)], model=GPT, provider="openai")
        assert len(server.batches) == len(jobs.jobs()) == 1
        await jobs.submit([chat("two more"), chat("of them")], model=GPT, provider="openai")
        assert len(server.batches) == 2


async def test_a_job_that_has_not_ended_cannot_be_fetched_and_leaves_no_file(tmp_path: Path) -> None:
    async with openai_jobs(tmp_path) as (_, jobs):
        job = await jobs.submit([chat("a")], model=GPT, provider="openai")
        with pytest.raises(InvalidRequestError, match="0 of 1 requests are done"):
            await jobs.fetch(job.id, tmp_path / "out.jsonl")
        assert not any("out" in name for name in names_in(tmp_path))


async def test_a_file_is_fetched_whole_and_as_often_as_wanted(tmp_path: Path) -> None:
    async with openai_jobs(tmp_path, fails=frozenset({"b"})) as (server, jobs):
        job = await jobs.submit([chat(text, custom_id=text) for text in "abc"], model=GPT, provider="openai")
        server.run_all()
        out = tmp_path / "out.jsonl"
        await jobs.fetch(job.id, out)
        first = out.read_bytes()
        assert [json.loads(line)["custom_id"] for line in first.splitlines()] == ["a", "b", "c"]
        assert [json.loads(line)["error"] is None for line in first.splitlines()] == [True, False, True]
        num_asked = len(server.server.asked)
        await jobs.fetch(job.id, out)
        assert out.read_bytes() == first
        assert len(server.server.asked) == num_asked  # what was downloaded is kept


async def test_progress_is_told_and_waiting_ends_with_the_job(tmp_path: Path) -> None:
    told: list[Progress] = []
    async with openai_jobs(tmp_path) as (server, jobs):
        job = await jobs.submit([chat("a")], model=GPT, provider="openai", on_progress=told.append)
        waiting = asyncio.create_task(jobs.wait(job.id, on_progress=told.append, first_poll=FAST))
        while not any(one.phase == "requests" for one in told):
            await asyncio.sleep(0.01)
        assert not waiting.done()
        server.run_all()
        assert (await waiting).state == "ended"
        assert told[-1] == Progress(phase="requests", num_done=1, num_total=1)


async def test_waiting_survives_a_provider_that_is_out_of_order_for_a_while(tmp_path: Path) -> None:
    num_failures = 0

    def refuse(asked: Any) -> Refused | None:
        nonlocal num_failures
        if asked.method == "GET" and num_failures < 5:
            num_failures += 1
            return Refused(500, "out of order")
        return None

    async with openai_jobs(tmp_path, refuse=refuse) as (server, jobs):
        job = await jobs.submit([chat("a")], model=GPT, provider="openai")
        server.run_all()
        assert (await jobs.wait(job.id, first_poll=FAST)).state == "ended"
        assert num_failures == 5


async def test_a_job_is_found_by_the_beginning_of_its_id_and_an_unknown_one_is_named(tmp_path: Path) -> None:
    async with openai_jobs(tmp_path) as (_, jobs):
        job = await jobs.submit([chat("a")], model=GPT, provider="openai")
        assert jobs.find(job.id[:8]).id == job.id
        with pytest.raises(InvalidRequestError, match=f"no batch job is called 'nope'; known are {job.id}"):
            jobs.find("nope")


async def test_a_job_of_another_address_is_not_asked_about_there(tmp_path: Path) -> None:
    async with openai_jobs(tmp_path) as (server, jobs):
        job = await jobs.submit([chat("a")], model=GPT, provider="openai")
        moved = Settings(openai_endpoint="http://127.0.0.1:9/v1", openai_api_key=KEY, cache_dir=tmp_path)
        async with BatchJobs(moved) as elsewhere:
            with pytest.raises(LLMError, match=f"was submitted to {server.url}"):
                await elsewhere.status(job.id)
