"""Send each part of a job exactly once, over crashes. Knows the order of steps; knows no provider's calls.

Before a step the intent is written down, after it the outcome. A process that ends in between leaves the intent, and
whoever goes on asks the provider whether the step was done. It is done again only where the provider does not know of
it, and not before a while has passed: a request that was on its way when its sender died may still arrive, and a large
one takes the provider some time.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any, Literal

from autobot_llm.cloud.batch_jobs.job import Job, Part, Progress
from autobot_llm.cloud.batch_jobs.service import BatchService, Undecided
from autobot_llm.cloud.batch_jobs.staging import position_of
from autobot_llm.cloud.batch_jobs.store import JobStore
from autobot_llm.cloud.retry import HOPELESS_CODES, RetryPolicy, is_transient
from autobot_llm.errors import InvalidRequestError, LLMError

SETTLE_SECONDS = 30.0
BYTES_PER_SECOND = 2_000_000  # at which a provider takes a large request in, at the slowest
_MOST_TRIES = 4
_POLICY = RetryPolicy(base=1.0)

Step = Literal["upload", "create"]
OnProgress = Callable[[Progress], None]


class Submission:
    """Sends parts through `service` and writes down in `store` how far they are. `clock` is as `time.time`."""

    def __init__(
        self,
        service: BatchService,
        store: JobStore,
        *,
        settle_seconds: float = SETTLE_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._service = service
        self._store = store
        self._settle_seconds = settle_seconds
        self._clock = clock

    async def submit(self, job: Job, on_progress: OnProgress | None = None) -> None:
        """Send what is not sent yet. The caller holds the job's lock.

        A part that the provider refuses is marked as refused, and the others are sent all the same. A part of which
        the provider will know later only is left unconfirmed. Raises what stands in the way of all parts: a wrong
        key, a provider that is out of order. What was sent by then stays sent, and `submit` goes on from there.
        """
        for part in job.parts:
            if on_progress is not None:
                on_progress(Progress(phase="batches", num_done=part.number, num_total=len(job.parts)))
            try:
                if self._service.uploads and part.file_id is None and part.state in ("unsent", "unconfirmed"):
                    part = await self._done("upload", part)
                if part.state in ("unsent", "unconfirmed"):
                    await self._done("create", part)
            except Undecided:
                continue

    async def reconcile(self, part: Part) -> Part:
        """Find out what became of an unconfirmed part, and send nothing. It may stay unconfirmed."""
        step: Step = "upload" if self._service.uploads and part.file_id is None else "create"
        try:
            found = await self._find(step, part)
        except Undecided:
            return part
        if found is not None:
            return self._record(step, part, found)
        if self._seconds_to_settle(part) > 0:
            return part
        return self._store.update_part(part, intent_at=None, begun_at=None)

    async def _done(self, step: Step, part: Part) -> Part:
        if part.intent_at is not None:
            found = await self._find_patiently(step, part)
            if found is not None:
                return self._record(step, part, found)
        num_failures = 0
        while True:
            now = self._clock()
            part = self._store.update_part(part, intent_at=now, begun_at=part.begun_at or now)
            try:
                return self._record(step, part, await self._send(step, part))
            except InvalidRequestError as error:
                return self._store.update_part(part, intent_at=None, begun_at=None, failure=error.message)
            except LLMError as error:
                num_failures += 1
                surely_not_begun = not error.may_have_begun or error.code in HOPELESS_CODES - {"malformed_answer"}
                if surely_not_begun:
                    part = self._store.update_part(part, intent_at=None, begun_at=None)
                elif (found := await self._find_patiently(step, part)) is not None:
                    return self._record(step, part, found)
                asked = error.retry_after or 0.0
                if not is_transient(error) or num_failures >= _MOST_TRIES or asked > _POLICY.longest_wait:
                    raise
                await asyncio.sleep(asked + _POLICY.backoff(num_failures, random.random))

    def _record(self, step: Step, part: Part, remote_id: str) -> Part:
        changes: dict[str, Any] = {"file_id": remote_id} if step == "upload" else {"batch_id": remote_id}
        part = self._store.update_part(part, intent_at=None, begun_at=None, **changes)
        if part.batch_id is not None:
            self._store.part_path(part).unlink(missing_ok=True)  # the provider has it, and nobody will send it again
        return part

    async def _send(self, step: Step, part: Part) -> str:
        path = self._store.part_path(part)
        return await (self._service.upload(part, path) if step == "upload" else self._service.create(part, path))

    async def _find_patiently(self, step: Step, part: Part) -> str | None:
        """What `_find` finds, now or once a request that was on its way must have arrived."""
        found = await self._find(step, part)
        if found is None and (wait := self._seconds_to_settle(part)) > 0:
            await asyncio.sleep(wait)
            found = await self._find(step, part)
        return found

    def _seconds_to_settle(self, part: Part) -> float:
        """Until what was on its way must have arrived; no more than the whole while, whatever the clock did."""
        assert part.intent_at is not None, "only what was begun is looked for"
        whole = self._settle_seconds + part.num_bytes / BYTES_PER_SECOND
        return min(whole, part.intent_at + whole - self._clock())

    async def _find(self, step: Step, part: Part) -> str | None:
        since = part.begun_at or self._clock()
        if step == "upload":
            return await self._service.find_upload(part, self._store.part_path(part), since)

        def owns(custom_id: str) -> bool:
            position = position_of(part.job, custom_id)
            return position is not None and self._store.part_of(part.job, position) == part.number

        return await self._service.find(part, since, self._store.known_batches(), owns)
