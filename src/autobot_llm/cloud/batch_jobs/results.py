"""Bring a job's results home, count what they cost, and give them in the order of the input. Knows files and lines.

Results come in any order, of several parts. They are kept as they came; an index of where each one is makes an order of
them, so that memory holds three numbers for each request and no answers.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from array import array
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from autobot_llm.cloud.batch_jobs.job import ItemError, ItemResult, Job, Part
from autobot_llm.cloud.batch_jobs.service import BatchService, Outcome
from autobot_llm.cloud.batch_jobs.staging import position_of
from autobot_llm.cloud.batch_jobs.store import JobStore, written_whole
from autobot_llm.cloud.ledger import enter_once
from autobot_llm.cloud.prices import Price
from autobot_llm.cloud.pricing import PriceTable, cost_of
from autobot_llm.errors import ConfigurationError, ProviderError

_NOWHERE = -1
_LINES_AT_ONCE = 256  # between which the event loop may do other work
_FIGURES = 6  # requests, prompt tokens, cached tokens, completion tokens, dollars spent, dollars saved


class _Id(msgspec.Struct):
    custom_id: str


class Results:
    """The results of jobs, from `service` into `store`; what they cost goes into the account at `ledger`."""

    def __init__(self, service: BatchService, store: JobStore, prices: PriceTable, ledger: Path) -> None:
        self._service = service
        self._store = store
        self._prices = prices
        self._ledger = ledger

    async def bring(self, part: Part) -> Part:
        """Download what an ended part has come to and enter its cost; done once, however often it is interrupted.

        Results that somebody has removed since are downloaded again, and cost nothing more.

        Raises the errors of `HttpPool.stream`.
        """
        path = self._store.results_path(part)
        if part.fetched_at is not None and path.exists():
            return part
        if not path.exists():
            try:
                with written_whole(path, part.job) as write:
                    if part.result_files:
                        await self._service.download(part, write)
            except OSError as exc:
                raise ConfigurationError(f"{path} cannot be written: {exc}") from exc
        return await self._entered(part, path)

    async def in_order(self, job: Job) -> AsyncGenerator[ItemResult, None]:
        """One result for each request, in the order of the input. Every part has been brought."""
        parts = {part.number: part for part in job.parts}
        index = await asyncio.to_thread(self._index, job)
        with ExitStack() as open_files:
            files = {
                part.number: open_files.enter_context(path.open("rb"))
                for part in job.parts
                if (path := self._store.results_path(part)).exists()
            }
            for position, number, custom_id in self._store.items(job.id):
                offset, size = index.offsets[position], index.sizes[position]
                if offset == _NOWHERE:
                    yield ItemResult(custom_id=custom_id, error=_missing(parts[number]))
                    continue
                file = files[index.parts[position]]
                file.seek(offset)
                outcome = await self._read(file.read(size))
                assert outcome is not None, "the index has only lines with an id"
                yield msgspec.structs.replace(outcome.result, custom_id=custom_id)

    async def _entered(self, part: Part, path: Path) -> Part:
        sums: dict[str, list[float]] = {}
        seen: set[str] = set()
        num_failed = num_unpriced = 0
        with path.open("rb") as file:
            for number, line in enumerate(filter(bytes.strip, file)):
                if number % _LINES_AT_ONCE == 0:
                    await asyncio.sleep(0)
                outcome = await self._read(line)
                if outcome is None or outcome.custom_id in seen or position_of(part.job, outcome.custom_id) is None:
                    continue
                seen.add(outcome.custom_id)
                num_failed += outcome.result.error is not None
                if outcome.usage is None:
                    num_unpriced += outcome.is_unreadable
                    continue
                model, price = self._price_of(outcome.model, part.model)
                if price is None:
                    num_unpriced += 1
                    continue
                cost, usage = cost_of(price, outcome.usage, is_batch=True), outcome.usage
                tokens = (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)
                row = sums.setdefault(model, [0.0] * _FIGURES)
                for place, figure in enumerate((1, *tokens, cost.spent, cost.saved)):
                    row[place] += figure
        now = time.time()
        day = datetime.fromtimestamp(now, UTC).date().isoformat()
        if sums:
            try:
                await asyncio.to_thread(enter_once, self._ledger, part.name, day, self._service.name, sums)
            except (sqlite3.Error, OSError) as exc:
                raise ConfigurationError(f"what is spent cannot be written to {self._ledger}: {exc}") from exc
        return self._store.update_part(
            part,
            fetched_at=now,
            costs={model: (row[4], row[5]) for model, row in sums.items()},
            num_unpriced=num_unpriced,
            num_done=len(seen),
            num_failed=num_failed + part.num_items - len(seen),
        )

    async def _read(self, line: bytes) -> Outcome | None:
        """What a line says; of one that makes no sense that it does not, and None where nobody can tell whose it is."""
        try:
            return await self._service.read(line)
        except ProviderError as error:
            if (custom_id := _id_in(line)) is None:
                return None
            reason = ItemError(code=error.code or "malformed_answer", message=error.message)
            result = ItemResult(custom_id=custom_id, error=reason)
            return Outcome(custom_id=custom_id, result=result, is_unreadable=True)

    def _price_of(self, *models: str | None) -> tuple[str, Price | None]:
        """The first of `models` that has a price, and the price."""
        for model in filter(None, models):
            if (price := self._prices.of(self._service.name, model)) is not None:
                return model, price
        return "", None

    def _index(self, job: Job) -> _Index:
        index = _Index(job.num_items)
        for part in job.parts:
            path = self._store.results_path(part)
            for offset, line in _lines(path) if path.exists() else ():
                custom_id = _id_in(line)
                position = None if custom_id is None else position_of(job.id, custom_id)
                # Of several results for one request the first counts, as for the cost.
                if position is None or position >= job.num_items or index.offsets[position] != _NOWHERE:
                    continue
                index.parts[position], index.offsets[position], index.sizes[position] = part.number, offset, len(line)
        return index


class _Index:
    """Where the result of each request is: the part, and the place of the line in that part's file."""

    def __init__(self, num_items: int) -> None:
        self.parts = array("q", [_NOWHERE]) * num_items
        self.offsets = array("q", [_NOWHERE]) * num_items
        self.sizes = array("q", [0]) * num_items


def _id_in(line: bytes) -> str | None:
    try:
        return msgspec.json.decode(line, type=_Id).custom_id
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    offset = 0
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                yield offset, line
            offset += len(line)


def _missing(part: Part) -> ItemError:
    """Why a request of `part` has no result of its own."""
    if part.state == "refused":
        return ItemError(code="batch_refused", message=f"the provider took none of the batch: {part.failure}")
    if part.state == "withdrawn":
        return ItemError(code="batch_cancelled", message="the job was cancelled before this request was sent")
    match part.status:
        case "cancelled" | "cancelling" | "canceling":
            return ItemError(code="batch_cancelled", message="the batch was cancelled before this request was answered")
        case "expired":
            return ItemError(code="batch_expired", message="the batch's time was over before this request was answered")
        case "failed":
            return ItemError(
                code="batch_failed", message=f"the whole batch failed: {part.failure or 'no reason given'}"
            )
    return ItemError(code="missing_result", message=part.failure or "the provider sent no result for this request")
