"""A batch job is sent once, waited for and fetched whole, and is paid once, whichever provider has it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from batch_places import (
    FAST,
    GPT,
    all_of,
    chat,
    contents,
    names_in,
    openai_jobs,
)
from openai_batches import KEY, Refused

from autobot_llm import BatchJobs
from autobot_llm.cloud.batch_jobs import Job, Progress
from autobot_llm.cloud.batch_jobs.store import JobStore
from autobot_llm.cloud.ledger import FILE_NAME, read_spending
from autobot_llm.errors import BudgetExceededError, InvalidRequestError, LLMError
from autobot_llm.settings import Settings


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
        assert done.costs == {GPT: (done.spent, done.saved)}
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


async def test_results_that_were_removed_here_are_downloaded_again_and_paid_once(tmp_path: Path) -> None:
    async with openai_jobs(tmp_path) as (server, jobs):
        job = await jobs.submit([chat("a"), chat("b")], model=GPT, provider="openai")
        server.run_all()
        await jobs.fetch(job.id, tmp_path / "out.jsonl")
        JobStore(tmp_path / "batches").results_path(job.parts[0]).unlink()
        assert contents(await all_of(jobs, job)) == ["about a", "about b"]
        (line,) = read_spending(tmp_path / FILE_NAME, "2000-01-01")
        assert line.num_requests == 2


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
