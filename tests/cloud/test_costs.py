"""The account of what was spent, and the budgets."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from autobot_llm import LLMInterface, Settings
from autobot_llm.cloud.ledger import FILE_NAME, Ledger, read_spending
from autobot_llm.errors import BudgetExceededError, ProviderError
from autobot_llm.providers.scripted import Line, Script, ScriptedProvider
from autobot_llm.types import ChoiceEnd, Finish, LLMRequest, LLMResponse, TextDelta, Usage

HELLO = [{"role": "user", "content": "x" * 4000}]  # about a thousand tokens
USAGE = Usage(prompt_tokens=1000, completion_tokens=100)
MODEL = "gpt-4o"
COST = (2.5 * 1000 + 10 * 100) / 1e6


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


class Clock:
    def __init__(self, text: str) -> None:
        self.now = at(text)

    def __call__(self) -> float:
        return self.now


def provider(script: Script | None = None, **fields: Any) -> ScriptedProvider:
    answer: list[Line] = ["hello", ChoiceEnd(finish_reason="stop"), Finish(usage=USAGE)]
    return ScriptedProvider(answer if script is None else script, name="openai", models=[MODEL, "unheard-of"], **fields)


def interface(cache_dir: Path, upstream: ScriptedProvider | None = None, **settings: Any) -> LLMInterface:
    given = {"cache_enabled": False, "cloud_retry_max_attempts": 0, **settings}
    return LLMInterface(
        Settings(provider="openai", default_model=MODEL, cache_dir=cache_dir, **given),
        providers={"openai": upstream or provider()},
    )


def spent_in(response: LLMResponse) -> float | None:
    return next((line.dollars_spent for line in response.optimizations if line.name == "cost"), None)


async def test_an_answer_tells_its_cost_and_the_account_has_it_after_a_restart(tmp_path: Path) -> None:
    async with interface(tmp_path) as llm:
        response = await llm.chat_completion(HELLO, model=MODEL, tenant="t")
    assert spent_in(response) == pytest.approx(COST)
    async with interface(tmp_path) as llm:
        await llm.chat_completion(HELLO, model=MODEL, tenant="t")
        assert llm.get_metrics()["openai"]["dollars_spent"] == pytest.approx(COST)
    (line,) = read_spending(tmp_path / FILE_NAME, "2000-01-01")
    assert (line.provider, line.model, line.tenant, line.num_requests) == ("openai", MODEL, "t", 2)
    assert (line.prompt_tokens, line.completion_tokens) == (2000, 200)
    assert line.dollars_spent == pytest.approx(2 * COST)


async def test_no_file_is_made_where_nothing_was_spent(tmp_path: Path) -> None:
    path = tmp_path / "not" / "yet" / FILE_NAME
    ledger = Ledger(path)
    await ledger.start()
    await ledger.close()
    assert not path.parent.parent.exists()


async def test_a_model_without_a_price_costs_nothing_that_is_known(tmp_path: Path) -> None:
    async with interface(tmp_path) as llm:
        response = await llm.chat_completion(HELLO, model="unheard-of")
    assert spent_in(response) is None
    assert read_spending(tmp_path / FILE_NAME, "2000-01-01") == []


async def test_a_request_that_could_exceed_the_budget_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    upstream = provider()
    async with interface(tmp_path, upstream, cloud_budget_per_day=2.5 * COST) as llm:
        await llm.chat_completion(HELLO, model=MODEL, max_tokens=100)
        await llm.chat_completion(HELLO, model=MODEL, max_tokens=100)
        with pytest.raises(BudgetExceededError, match="AUTOBOT_CLOUD_BUDGET_PER_DAY") as raised:
            await llm.chat_completion(HELLO, model=MODEL, max_tokens=100)
    assert raised.value.status == 402
    assert 0 < (raised.value.retry_after or 0) <= 24 * 3600
    assert len(upstream.requests) == 2
    async with interface(tmp_path, upstream, cloud_budget_per_month=2.5 * COST) as llm:
        with pytest.raises(BudgetExceededError, match="AUTOBOT_CLOUD_BUDGET_PER_MONTH"):
            await llm.chat_completion(HELLO, model=MODEL, max_tokens=100)


async def test_requests_side_by_side_do_not_exceed_the_budget_together(tmp_path: Path) -> None:
    upstream = provider(delay=0.005)
    async with interface(tmp_path, upstream, cloud_budget_per_day=5.5 * COST) as llm:
        ended = await asyncio.gather(
            *(llm.chat_completion(HELLO, model=MODEL, max_tokens=100, seed=number) for number in range(20)),
            return_exceptions=True,
        )
    assert sum(isinstance(one, LLMResponse) for one in ended) == 5
    assert sum(isinstance(one, BudgetExceededError) for one in ended) == 15


async def test_what_was_set_aside_is_free_again_when_requests_fail_or_are_given_up(tmp_path: Path) -> None:
    upstream = provider()
    async with interface(tmp_path, provider([ProviderError("no")]), cloud_budget_per_day=1.5 * COST) as llm:
        for _ in range(5):
            with pytest.raises(ProviderError):
                await llm.chat_completion(HELLO, model=MODEL, max_tokens=100)
    async with interface(tmp_path, upstream, cloud_budget_per_day=1.5 * COST) as llm:
        assert await llm.chat_completion(HELLO, model=MODEL, max_tokens=100)


async def test_an_answer_that_is_given_up_counts_by_what_had_come(tmp_path: Path) -> None:
    async with interface(tmp_path, provider(["a" * 400, "b" * 400])) as llm:
        request = LLMRequest(prompt="x" * 4000, model=MODEL, stream=True)
        events = llm.events(request)
        async for event in events:
            if isinstance(event, TextDelta):
                break
        await events.aclose()
    (line,) = read_spending(tmp_path / FILE_NAME, "2000-01-01")
    assert (line.prompt_tokens, line.completion_tokens) == (1000, 100)


async def test_a_budget_with_a_model_whose_price_is_unknown_warns_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="autobot_llm.cloud"):
        async with interface(tmp_path, cloud_budget_per_day=1.0) as llm:
            for _ in range(3):
                await llm.chat_completion(HELLO, model="unheard-of")
    assert len([one for one in caplog.records if "price of openai/unheard-of" in one.getMessage()]) == 1


async def test_days_and_months_end_at_midnight_utc(tmp_path: Path) -> None:
    clock = Clock("2026-11-29T23:00:00")
    ledger = Ledger(tmp_path / FILE_NAME, clock=clock)
    await ledger.start()
    ledger.add("p", "m", "", USAGE, spent=1.0, saved=0.0)
    assert (ledger.spent_today(), ledger.spent_this_month()) == (1.0, 1.0)
    assert ledger.seconds_left(of_month=False) == 3600
    assert ledger.seconds_left(of_month=True) == 25 * 3600
    clock.now += 3600
    ledger.add("p", "m", "", USAGE, spent=2.0, saved=0.0)
    assert (ledger.spent_today(), ledger.spent_this_month()) == (2.0, 3.0)
    clock.now += 24 * 3600
    assert (ledger.spent_today(), ledger.spent_this_month()) == (0.0, 0.0)
    await ledger.close()
    assert [line.day for line in read_spending(tmp_path / FILE_NAME, "2026-11-30")] == ["2026-11-30"]


async def test_processes_share_one_account(tmp_path: Path) -> None:
    clock = Clock("2026-11-10T12:00:00")
    first, second = (Ledger(tmp_path / FILE_NAME, clock=clock) for _ in range(2))
    await asyncio.gather(first.start(), second.start())
    first.add("p", "m", "", USAGE, spent=1.0, saved=0.5)
    await first.close()
    second.add("p", "m", "", USAGE, spent=2.0, saved=0.0)
    await second.close()
    assert second.spent_today() == 3.0
    (line,) = read_spending(tmp_path / FILE_NAME, "2026-11-10")
    assert (line.num_requests, line.dollars_spent, line.dollars_saved) == (2, 3.0, 0.5)


@pytest.mark.parametrize("fault", ["corrupt", "locked", "a folder"])
async def test_an_account_that_cannot_be_written_fails_no_request_and_warns_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    path = tmp_path / FILE_NAME
    holder = None
    if fault == "corrupt":
        path.write_bytes(b"this is no database" * 100)
    elif fault == "a folder":
        path.mkdir()
    else:
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("BEGIN EXCLUSIVE")
    ledger = Ledger(path, clock=Clock("2026-11-10T12:00:00"), patience=0.01)
    with caplog.at_level(logging.WARNING, logger="autobot_llm.cloud"):
        await ledger.start()
        ledger.add("p", "m", "", USAGE, spent=1.0, saved=0.0)
        assert ledger.spent_today() == 1.0
        if holder is not None:
            holder.close()
        await ledger.close()
    assert len(caplog.records) == 1
    if fault == "locked":
        assert [line.dollars_spent for line in read_spending(path, "2026-11-10")] == [1.0], "it is written later"


async def test_a_kept_or_a_shared_answer_costs_nothing_and_saves_what_it_had_cost(tmp_path: Path) -> None:
    upstream = provider(delay=0.005)
    question: dict[str, Any] = {"model": MODEL, "temperature": 0.0}
    async with interface(tmp_path, upstream, cache_enabled=True) as llm:
        shared = await asyncio.gather(*(llm.chat_completion(HELLO, **question) for _ in range(4)))
        kept = await llm.chat_completion(HELLO, **question)
    assert len(upstream.requests) == 1
    assert [spent_in(response) for response in shared].count(None) == 3
    for response in (kept, *shared):
        saved = sum(line.dollars_saved or 0.0 for line in response.optimizations)
        assert saved + (spent_in(response) or 0.0) == pytest.approx(COST)
    (line,) = read_spending(tmp_path / FILE_NAME, "2000-01-01")
    assert line.num_requests == 1
