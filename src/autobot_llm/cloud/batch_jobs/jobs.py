"""Batch jobs from beginning to end: submit, look, wait, cancel, fetch. Knows the order of work; the parts do it."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from contextlib import aclosing, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from autobot_llm.cloud.batch_jobs.job import ItemResult, Job, Progress
from autobot_llm.cloud.batch_jobs.reading import RequestWriter, read_lines
from autobot_llm.cloud.batch_jobs.results import Results
from autobot_llm.cloud.batch_jobs.service import BatchService
from autobot_llm.cloud.batch_jobs.services import (
    account_name,
    batch_service,
    default_model,
    known_services,
)
from autobot_llm.cloud.batch_jobs.staging import Staged, stage
from autobot_llm.cloud.batch_jobs.store import JobBusy, JobStore, written_whole
from autobot_llm.cloud.batch_jobs.submission import SETTLE_SECONDS, Submission
from autobot_llm.cloud.budgets import Budgets
from autobot_llm.cloud.ledger import FILE_NAME, Ledger
from autobot_llm.cloud.pricing import load_prices
from autobot_llm.cloud.retry import is_transient
from autobot_llm.errors import ConfigurationError, InvalidRequestError, LLMError
from autobot_llm.settings import Settings, load_settings

FIRST_POLL = 2.0  # seconds
LONGEST_POLL = 60.0
CANCELLING = frozenset({"cancelling", "canceling"})
_MOST_FAILED_POLLS = 30  # in a row, each with retries of its own

OnProgress = Callable[[Progress], None]
Requests = str | Path | Iterable[Mapping[str, Any]]


class BatchJobs:
    """Jobs of many requests that a provider answers within a day, at half the price.

        async with BatchJobs.from_env() as batches:
            job = await batches.submit(Path("requests.jsonl"), provider="openai", model="gpt-5.4-mini")
            job = await batches.wait(job.id)
            async for result in batches.results(job.id):
                print(result.custom_id, result.error or result.answer)

    What is known of a job is on the disk, under AUTOBOT_BATCH_DIR: any process may go on where another one ended, also
    one that was killed, and nothing is sent twice. Belongs to one event loop. `services` stand for the providers of
    their names, and are closed with this. `settle_seconds` is how long after a crash a request may still arrive at the
    provider.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        services: Mapping[str, BatchService] | None = None,
        settle_seconds: float = SETTLE_SECONDS,
    ) -> None:
        self.settings = settings or Settings()
        self._store = JobStore(self.settings.batch_dir or self.settings.cache_dir / "batches")
        self._prices = load_prices(self.settings.cloud_prices)
        self._ledger = self.settings.cache_dir / FILE_NAME
        self._settle_seconds = settle_seconds
        self._services = dict(services or {})

    @classmethod
    def from_env(cls) -> BatchJobs:
        """With the settings of the environment and of `.env`."""
        return cls(load_settings())

    async def __aenter__(self) -> BatchJobs:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close every connection; jobs go on at their providers."""
        services, self._services = self._services, {}
        for service in services.values():
            await service.close()

    def jobs(self) -> list[Job]:
        """Every job as it was last seen, the latest first; nobody is asked."""
        return self._store.jobs()

    def find(self, job: str) -> Job:
        """The job of this id, or whose id begins so, as it was last seen. Raises InvalidRequestError."""
        return self._store.job(job)

    async def submit(
        self,
        requests: Requests,
        *,
        provider: str | None = None,
        model: str | None = None,
        again: bool = False,
        on_progress: OnProgress | None = None,
    ) -> Job:
        """Check all of `requests`, then send them, and return the job.

        `requests` is a file with one JSON object on each line, or such objects, which are asked for in a thread:
        OpenAI's batch lines, or chat bodies with or without a `custom_id`. `provider` defaults to the one that `model`
        begins with, else to that of the settings; `model` is for requests that name none. The same requests are not
        sent again while their job is not fetched, unless `again`: the job that they already are is returned, and what
        of it was not sent yet is.

        Raises InvalidRequestError with the line and the field before anything is sent, BudgetExceededError, and the
        errors of the provider: then the job is there and unfinished, and `resume` goes on with it.
        """
        requests = Path(requests) if isinstance(requests, str) else requests
        name, model = self._chosen(provider, model)
        service = self._service(name)
        job, items = await self._staged(requests, service, model, on_progress)
        kept: Job | None = None
        try:
            same = None if again else next((known for known in self._store.jobs() if _is_same(known, job)), None)
            if same is None:
                await self._check_budget(job)
            # Not in a thread: cancelled here, it would be unknown whether the job is there.
            kept = same or self._store.add(job, items, None if again else lambda known: _is_same(known, job))
        finally:
            if kept is not job:
                await asyncio.to_thread(shutil.rmtree, self._store.folder(job.id), ignore_errors=True)
        return await self.resume(kept.id, on_progress=on_progress)

    async def resume(self, job: str, *, on_progress: OnProgress | None = None) -> Job:
        """Send what of a job was not sent yet; a job that was cancelled, or sent whole, stays as it is."""
        found = self._store.job(job)
        if found.state != "unfinished":
            return found
        if found.is_cancelled:
            return await self.cancel(found.id)
        with self._store.lock(found.id):
            found = self._store.job(found.id)
            try:
                await self._submission(found).submit(found, on_progress)
            except OSError as exc:
                raise ConfigurationError(f"the requests of {found.id} cannot be read: {exc}") from exc
        return self._store.job(found.id)

    async def status(self, job: str) -> Job:
        """The job as it is now: the provider is asked about every part that it has. Nothing is sent.

        A part of which nobody knows whether it arrived, because a process ended just then, is looked for.
        """
        found = self._store.job(job)
        service = self._service_of(found)
        if found.state == "unfinished":
            with suppress(JobBusy), self._store.lock(found.id):
                for part in self._store.job(found.id).parts:
                    if part.state == "unconfirmed":
                        part = await self._submission(found).reconcile(part)
                    if part.state == "unsent" and found.is_cancelled:
                        self._store.update_part(part, is_withdrawn=True)
            found = self._store.job(found.id)
        for part in found.parts:
            if part.state != "running":
                continue
            seen = await service.look(part)
            if found.is_cancelled and not seen["has_ended"] and seen["status"] not in CANCELLING:
                await service.cancel(part)
                seen = await service.look(part)
            self._store.update_part(part, **seen)
        return self._settled(self._store.job(found.id))

    async def wait(self, job: str, *, on_progress: OnProgress | None = None, first_poll: float = FIRST_POLL) -> Job:
        """Look at the job, less and less often, until all of it has ended. Being cancelled leaves the job as it is.

        What of it was not sent yet is sent first. A provider that is out of order is asked again for a while.
        """
        found = self._store.job(job)
        pause, num_failures = first_poll, 0
        while True:
            try:
                if any(part.state == "unsent" for part in found.parts) and not found.is_cancelled:
                    with suppress(JobBusy):
                        found = await self.resume(found.id, on_progress=on_progress)
                found = await self.status(found.id)
                num_failures = 0
            except LLMError as error:
                num_failures += 1
                if not is_transient(error) or num_failures > _MOST_FAILED_POLLS:
                    raise
            if on_progress is not None:
                on_progress(Progress(phase="requests", num_done=found.num_done, num_total=found.num_items))
            if all(part.is_settled for part in found.parts):
                return found
            await asyncio.sleep(pause)
            pause = min(1.5 * pause, LONGEST_POLL)

    async def cancel(self, job: str) -> Job:
        """Have the provider stop, and send no more of the job. What is answered by then can be fetched, and is paid.

        A part of which nobody knows yet whether the provider has it is cancelled once that is known, by `status`.
        """
        found = self._store.job(job)
        with self._store.lock(found.id):  # so that nobody sends more of it just now
            self._store.update_job(found.id, is_cancelled=True)
        return await self.status(found.id)

    async def results(self, job: str) -> AsyncGenerator[ItemResult, None]:
        """One result for each request, in the order of the input; the first call downloads them.

        Raises InvalidRequestError while the job has not ended.
        """
        found = await self._brought(job)
        async with aclosing(self._results(found).in_order(found)) as results:
            async for result in results:
                yield result

    async def fetch(self, job: str, out: Path) -> Job:
        """Write the results to the file `out`, in the order of the input, one line of OpenAI's form each.

        The file is there whole or not at all, and may be fetched again. Raises what `results` does, and
        ConfigurationError where the file cannot be written.
        """
        found = await self._brought(job)
        try:
            with self._store.lock(found.id), written_whole(out, found.id) as write:
                async with aclosing(self._results(found).in_order(found)) as results:
                    async for result in results:
                        write(result.line() + b"\n")
        except OSError as exc:
            raise ConfigurationError(f"{out} cannot be written: {exc}") from exc
        return found

    # What they are made of

    def _chosen(self, provider: str | None, model: str | None) -> tuple[str, str | None]:
        known = known_services(self.settings)
        prefix = (model or "").partition("/")[0]
        name = provider or (prefix if prefix in known else account_name(self.settings))
        if name not in known:
            raise InvalidRequestError(
                f"provider='{name}': expected one that has batch jobs: {', '.join(known)}", param="provider"
            )
        return name, model or default_model(self.settings, name)

    async def _staged(
        self, requests: Requests, service: BatchService, model: str | None, on_progress: OnProgress | None
    ) -> tuple[Job, list[tuple[int, int, str]]]:
        """The job that `requests` make, its parts on the disk, and its items."""
        job_id = f"job-{secrets.token_hex(6)}"
        folder = self._store.new_folder(job_id)
        is_given_up = threading.Event()

        def on_line(num_lines: int) -> None:
            if is_given_up.is_set():
                raise asyncio.CancelledError
            if on_progress is not None and num_lines % 500 == 0:
                on_progress(Progress(phase="requests read", num_done=num_lines, num_total=0))

        def work() -> Staged:
            writer = RequestWriter(service, model, known_services(self.settings))
            try:
                lines = read_lines(_bytes_of(requests))
                staged = stage(
                    job_id,
                    lines,
                    writer,
                    service,
                    self._prices,
                    lambda number: folder / f"part-{number}.jsonl",
                    on_line,
                )
                _sync(folder)
                _sync(folder.parent)
            except BaseException as exc:
                shutil.rmtree(folder, ignore_errors=True)
                if isinstance(exc, OSError):
                    message = f"the requests cannot be read, or not be kept in {folder}: {exc}"
                    raise ConfigurationError(message) from exc
                raise
            return staged

        try:
            staged = await asyncio.to_thread(work)
        finally:
            is_given_up.set()
        job = Job(
            id=job_id,
            created=time.time(),
            provider=service.name,
            address=service.address,
            source=str(requests) if isinstance(requests, Path) else "",
            digest=staged.digest,
            num_items=len(staged.items),
            reserved=staged.dollars,
            unpriced=staged.unpriced,
            parts=staged.parts,
        )
        return job, staged.items

    async def _check_budget(self, job: Job) -> None:
        """Raises BudgetExceededError where the job, and those that are not fetched yet, could cost too much."""
        settings = self.settings
        ledger = Ledger(self._ledger)
        budgets = Budgets(ledger, settings.cloud_budget_per_day, settings.cloud_budget_per_month)
        if not budgets.are_set:
            return
        await ledger.start()
        for dollars in (*(known.reserved for known in self._store.jobs()), job.reserved):
            await budgets.reserve(dollars)

    def _settled(self, job: Job) -> Job:
        """`job`, which sets no more money aside once nothing more of it is to be paid."""
        is_paid = all(part.fetched_at is not None or (part.is_settled and not part.result_files) for part in job.parts)
        if not (is_paid and job.reserved):
            return job
        self._store.update_job(job.id, reserved=0.0)
        return msgspec.structs.replace(job, reserved=0.0)

    async def _brought(self, job: str) -> Job:
        found = self._store.job(job)
        if not all(part.is_settled for part in found.parts):
            found = await self.status(found.id)
        if not all(part.is_settled for part in found.parts):
            raise InvalidRequestError(
                f"{found.id} has not ended: {found.num_done:,} of {found.num_items:,} requests are done",
                param="job",
                code="batch_not_ended",
            )
        if any(part.fetched_at is None or not self._store.results_path(part).exists() for part in found.parts):
            with self._store.lock(found.id):
                for part in self._store.job(found.id).parts:
                    await self._results(found).bring(part)
        return self._settled(self._store.job(found.id))

    def _results(self, job: Job) -> Results:
        return Results(self._service_of(job), self._store, self._prices, self._ledger)

    def _submission(self, job: Job) -> Submission:
        return Submission(self._service_of(job), self._store, settle_seconds=self._settle_seconds)

    def _service_of(self, job: Job) -> BatchService:
        service = self._service(job.provider)
        if service.address != job.address:
            raise ConfigurationError(
                f"{job.id} was submitted to {job.address}, and '{job.provider}' is now at {service.address}"
            )
        return service

    def _service(self, name: str) -> BatchService:
        if name not in self._services:
            self._services[name] = batch_service(self.settings, name)
        return self._services[name]


def _is_same(known: Job, job: Job) -> bool:
    """Whether `known` asks the same as `job`, and its answers are still to come."""
    if known.digest != job.digest or known.state == "fetched" or known.is_cancelled:
        return False
    return not all(part.state == "refused" or part.status == "failed" for part in known.parts)


def _bytes_of(requests: Requests) -> Iterator[bytes]:
    if isinstance(requests, str | Path):
        with Path(requests).open("rb") as file:
            yield from file
        return
    yield from map(msgspec.json.encode, requests)


def _sync(folder: Path) -> None:
    """Have the names of the folder's files on the disk."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
