"""Whenever the process is killed, nothing is lost, nothing is sent twice, and nothing is paid twice.

A real `autobot-llm batch` is killed by SIGKILL at each boundary between two steps. The server stops it there: before it
does what is asked, or after it has done it and before it answers; and where what it answered is still to be written
down, another process holds the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from anthropic_batches import AnthropicBatchServer, anthropic_batches
from batch_faults import Hold
from openai_batches import OpenAIBatchServer, openai_batches

from autobot_llm.cloud.batch_jobs import BatchJobs, Job
from autobot_llm.cloud.batch_jobs.store import FILE_NAME as JOBS
from autobot_llm.cloud.ledger import FILE_NAME as LEDGER
from autobot_llm.cloud.ledger import read_spending
from autobot_llm.settings import load_settings

COMMAND = [sys.executable, "-c", "import sys; from autobot_llm.cli.main import main; sys.exit(main())", "batch"]
Server = OpenAIBatchServer | AnthropicBatchServer
PATIENCE = 30.0
NUM_REQUESTS = 6


def lines() -> str:
    """Six requests that make two batches of three: of two models, or of two versions of Anthropic's API."""
    chats = (
        {"custom_id": f"q{i}", "model": f"m-{i % 2}", "messages": [{"role": "user", "content": f"{i}"}],
         "max_tokens": 9} | ({"temperature": 0.5} if i % 2 else {})
        for i in range(NUM_REQUESTS)
    )  # fmt: skip
    return "".join(json.dumps(one) + "\n" for one in chats)


class Place:
    """The folder, the environment and the commands of one user."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.folder = folder
        self.server = server
        self.provider = "openai" if isinstance(server, OpenAIBatchServer) else "anthropic"
        self.file = folder / "in.jsonl"
        self.file.write_text(lines())
        prices = {f"{self.provider}/m-{i}": {"input": 1.0, "output": 2.0, "dated": "2026-11-01"} for i in range(2)}
        (folder / "prices.json").write_text(json.dumps(prices))
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("AUTOBOT_")}
        self.environment = inherited | server.environment() | {
            "AUTOBOT_CACHE_DIR": str(folder / "cache"),
            "AUTOBOT_BATCH_DIR": str(folder / "jobs"),
            "AUTOBOT_CLOUD_PRICES": str(folder / "prices.json"),
        }  # fmt: skip

    @contextlib.asynccontextmanager
    async def started(self, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
        process = await asyncio.create_subprocess_exec(
            *COMMAND, *arguments, cwd=self.folder, env=self.environment,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.communicate()

    async def run(self, *arguments: str) -> tuple[int | None, str, str]:
        async with self.started(*arguments) as process:
            out, err = await asyncio.wait_for(process.communicate(), PATIENCE)
            return process.returncode, out.decode(), err.decode()

    async def killed_at(self, hold: Hold, *arguments: str) -> None:
        """Run the command until the server holds it, and kill it there."""
        self.server.hold = hold
        async with self.started(*arguments) as process:
            await asyncio.wait_for(hold.is_reached.wait(), PATIENCE)
            if hold.mode == "unrecorded":
                await asyncio.sleep(0.3)  # for the answer to be read; it cannot be written down
            process.send_signal(signal.SIGKILL)
            await process.wait()
        self.server.hold = None

    def jobs(self) -> BatchJobs:
        return BatchJobs(load_settings(environ=self.environment, env_file=None), settle_seconds=0.2)

    def submit(self) -> tuple[str, ...]:
        return ("submit", str(self.file), "--provider", self.provider)


@contextlib.asynccontextmanager
async def place(provider: str, folder: Path, **fields: Any) -> AsyncIterator[Place]:
    make = openai_batches if provider == "openai" else anthropic_batches
    async with make(**fields) as server:  # type: ignore[operator]
        yield Place(folder, server)


@contextlib.contextmanager
def held(path: Path) -> Any:
    """Nobody else can write to the SQLite file at `path` meanwhile."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as file:
        file.execute("PRAGMA journal_mode=WAL")
        file.execute("BEGIN IMMEDIATE")
        yield file
        file.execute("ROLLBACK")


async def ended_and_fetched(one: Place, job: Job) -> None:
    """The server has each part once, the results are complete and in order, and the cost is entered once."""
    async with one.jobs() as jobs:
        waiting = asyncio.create_task(jobs.wait(job.id, first_poll=0.05))
        while not waiting.done():
            one.server.run_all()
            await asyncio.sleep(0.05)
        assert (await waiting).state in ("ended", "fetched")
        assert len(one.server.batches) == len(job.parts) == 2
        results = [result async for result in jobs.results(job.id)]
    assert [result.custom_id for result in results] == [f"q{i}" for i in range(NUM_REQUESTS)]
    said = [result.answer["choices"][0]["message"]["content"] for result in results]
    assert said == [f"about {i}" for i in range(NUM_REQUESTS)]
    assert one.server.complaints == []
    entered = read_spending(one.folder / "cache" / LEDGER, "2000-01-01")
    assert sum(line.num_requests for line in entered) == NUM_REQUESTS


POINTS = [
    *(("openai", at, mode) for at in range(4) for mode in ("before", "after", "unrecorded")),
    *(("anthropic", at, mode) for at in range(2) for mode in ("before", "after", "unrecorded")),
]


@pytest.mark.parametrize(("provider", "at", "mode"), POINTS)
async def test_killed_at_any_step_a_job_is_submitted_once_and_whole(
    tmp_path: Path, provider: str, at: int, mode: str
) -> None:
    async with place(provider, tmp_path) as one:
        hold = Hold(at, mode)
        with contextlib.ExitStack() as locks:
            hold.on_done = lambda: locks.enter_context(held(tmp_path / "jobs" / JOBS))
            await one.killed_at(hold, *one.submit())
        async with one.jobs() as jobs:
            (job,) = jobs.jobs()
            assert job.state == "unfinished"
            # Submitting the file again is what a user does who saw nothing; it goes on with the same job.
            again = await jobs.submit(one.file, provider=provider)
            assert again.id == job.id
        await ended_and_fetched(one, job)
        if isinstance(one.server, OpenAIBatchServer):
            uploads = [file for file in one.server.files.values() if file["purpose"] == "batch"]
            assert len(uploads) == 2


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
async def test_status_finds_what_had_arrived_and_sends_nothing(tmp_path: Path, provider: str) -> None:
    at = 1 if provider == "openai" else 0
    async with place(provider, tmp_path) as one:
        await one.killed_at(Hold(at, "after"), *one.submit())
        assert len(one.server.batches) == 1
        one.server.run_all()
        num_sent = sum(asked.method == "POST" for asked in one.server.server.asked)
        code, out, err = await one.run("status", (await _job(one)).id)
        assert code == 0, err
        assert "batch 1: " in out and "not sent" in out and "submit --resume" in out
        assert sum(asked.method == "POST" for asked in one.server.server.asked) == num_sent
        code, _, err = await one.run("submit", "--resume", (await _job(one)).id)
        assert code == 0, err
        await ended_and_fetched(one, await _job(one))


async def _job(one: Place) -> Job:
    async with one.jobs() as jobs:
        (job,) = jobs.jobs()
        return job


@pytest.mark.parametrize("mode", ["before", "after"])
async def test_killed_while_it_is_cancelled_a_job_is_cancelled_by_the_next_look(tmp_path: Path, mode: str) -> None:
    async with place("openai", tmp_path) as one:
        async with one.jobs() as jobs:
            job = await jobs.submit(one.file, provider="openai")
        await one.killed_at(Hold(0, mode, path="/cancel"), "cancel", job.id)
        async with one.jobs() as jobs:
            await jobs.status(job.id)
        assert {batch["status"] for batch in one.server.batches.values()} == {"cancelling"}


async def test_a_job_that_was_cancelled_before_it_was_sent_whole_is_never_sent(tmp_path: Path) -> None:
    async with place("openai", tmp_path) as one:
        await one.killed_at(Hold(2, "before"), *one.submit())  # the first part is sent, the second one is not
        async with one.jobs() as jobs:
            job = await jobs.cancel((await _job(one)).id)
            await asyncio.sleep(0.3)  # until it is certain that the second one's file never arrived
            assert (await jobs.resume(job.id)).parts[1].state == "withdrawn"
            (batch,) = one.server.batches
            one.server.run(batch, status="cancelled", num_answered=1)
            await jobs.wait(job.id, first_poll=0.05)
            results = [result async for result in jobs.results(job.id)]
        assert [result.error is None for result in results] == [True, *[False] * 5]
        assert {result.error.code for result in results if result.error} == {"batch_cancelled"}


async def test_killed_while_the_file_is_read_there_is_no_job(tmp_path: Path) -> None:
    async with place("openai", tmp_path) as one:
        pipe = tmp_path / "pipe.jsonl"
        os.mkfifo(pipe)
        async with one.started("submit", str(pipe), "--provider", "openai") as process:
            descriptor = await asyncio.to_thread(os.open, pipe, os.O_WRONLY)
            try:
                os.write(descriptor, lines().encode()[:400])
                await asyncio.sleep(0.5)
                process.kill()
                await process.wait()
            finally:
                os.close(descriptor)
        assert one.server.server.asked == []
        async with one.jobs() as jobs:
            assert jobs.jobs() == []
            job = await jobs.submit(one.file, provider="openai")
        await ended_and_fetched(one, job)


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("mode", ["before", "half"])
async def test_killed_while_results_come_there_is_no_half_file_and_they_can_be_fetched(
    tmp_path: Path, provider: str, at: int, mode: str
) -> None:
    async with place(provider, tmp_path) as one:
        async with one.jobs() as jobs:
            job = await jobs.submit(one.file, provider=provider)
            one.server.run_all()
        path = "/content" if provider == "openai" else "/results"
        out = tmp_path / "out.jsonl"
        await one.killed_at(Hold(at, mode, method="GET", path=path), "fetch", job.id, "--out", str(out))
        assert not out.exists()
        results = sorted(file.name for file in (tmp_path / "jobs" / job.id).glob("results-*"))
        assert results == [f"results-{number}.jsonl" for number in range(at)]
        code, _, err = await one.run("fetch", job.id, "--out", str(out))
        assert code == 0, err
        assert [json.loads(line)["custom_id"] for line in out.read_text().splitlines()] == [f"q{i}" for i in range(6)]
        await ended_and_fetched(one, job)
        assert left_over(tmp_path) == []


@pytest.mark.parametrize("locked", [LEDGER, JOBS])
async def test_killed_while_the_cost_is_entered_it_is_entered_once(tmp_path: Path, locked: str) -> None:
    """Before the account has it (the account cannot be written), and after, before the job knows (the store cannot)."""
    async with place("openai", tmp_path) as one:
        async with one.jobs() as jobs:
            job = await jobs.submit(one.file, provider="openai")
            one.server.run_all()
            assert (await jobs.status(job.id)).state == "ended"
        folder = tmp_path / ("cache" if locked == LEDGER else "jobs")
        folder.mkdir(exist_ok=True)
        with held(folder / locked):
            async with one.started("fetch", job.id, "--out", str(tmp_path / "out.jsonl")) as process:
                await until(lambda: (tmp_path / "jobs" / job.id / "results-0.jsonl").exists())
                if locked == JOBS:
                    await until(lambda: is_entered(tmp_path / "cache" / LEDGER))
                else:
                    await asyncio.sleep(0.3)
                process.kill()
                await process.wait()
        assert not (tmp_path / "out.jsonl").exists()
        await ended_and_fetched(one, job)


async def test_two_processes_fetch_at_once_and_the_cost_is_entered_once(tmp_path: Path) -> None:
    async with place("openai", tmp_path) as one:
        async with one.jobs() as jobs:
            job = await jobs.submit(one.file, provider="openai")
            one.server.run_all()
        runs = [one.run("fetch", job.id, "--out", str(tmp_path / f"out-{i}.jsonl")) for i in range(3)]
        codes = [code for code, _, _ in await asyncio.gather(*runs)]
        assert 0 in codes
        await ended_and_fetched(one, job)


def is_entered(ledger: Path) -> bool:
    """Whether the account has anything; it may be in the making just now."""
    try:
        return bool(read_spending(ledger, "2000-01-01"))
    except sqlite3.OperationalError:
        return False


def left_over(folder: Path) -> list[Path]:
    return list(folder.rglob("*.part"))


async def until(condition: Any) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.02)
