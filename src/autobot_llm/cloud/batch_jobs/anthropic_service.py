"""Anthropic's message batches. Knows which calls to make; shapes are the dialect's.

A batch carries no note of its sender's, so a part is known again by the ids of its requests, which have the job's id in
them. They can be read once the batch has ended. Until then a batch of the right size and time could be ours, and the
part is neither sent again nor given up: nothing is asked, and paid, twice.
"""

from __future__ import annotations

import email.utils
import time
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import aclosing
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import msgspec

from autobot_llm.cloud.batch_jobs.job import ItemError, ItemResult, Part
from autobot_llm.cloud.batch_jobs.service import (
    CALL_SECONDS,
    DEFAULT_SIZES,
    Kind,
    Limits,
    Outcome,
    Undecided,
    WireItem,
    Write,
    upload_seconds,
    write_lines,
)
from autobot_llm.cloud.retry import RateLimitHandler
from autobot_llm.collect import collect
from autobot_llm.dialects.anthropic import batches as wire
from autobot_llm.dialects.anthropic.answers import AnswerReader
from autobot_llm.dialects.anthropic.requests import NEWEST_VERSION, write_request
from autobot_llm.dialects.bodies import encode, read_answer
from autobot_llm.dialects.openai.batches import CHAT_URL
from autobot_llm.dialects.openai.replies import ChatReply
from autobot_llm.errors import InvalidRequestError, ProviderError, UnsupportedError
from autobot_llm.transport.ndjson import lines
from autobot_llm.transport.network import DEFAULT_NETWORK, Network, PoolLimits
from autobot_llm.transport.pool import HttpAnswer, HttpPool
from autobot_llm.transport.upload import FileBody
from autobot_llm.types import Event, Finish, LLMRequest

SERVER_SECONDS = 600.0  # that Anthropic may take to create a batch which it has got
CLOCK_MARGIN = 86_400.0  # seconds by which its clock may differ from ours, where it does not tell its time
DATE_MARGIN = 30.0  # seconds, where it does: the header has whole seconds, and the answer was on its way
_MOST_PAGES = 100
_VERSION = "anthropic-version"
_WITHOUT_ANSWER = {
    "canceled": ItemError(code="batch_cancelled", message="the batch was cancelled before this request was sent"),
    "expired": ItemError(code="batch_expired", message="the batch's time was over before this request was sent"),
}


class AnthropicBatches:
    """The batches of the API at `endpoint`."""

    name = "anthropic"
    uploads = False
    separator = wire.SEPARATOR

    def __init__(
        self,
        endpoint: str,
        api_key: str | None,
        *,
        sizes: PoolLimits = DEFAULT_SIZES,
        network: Network = DEFAULT_NETWORK,
    ) -> None:
        url = urlsplit(endpoint)
        self.address = urlunsplit((url.scheme, url.netloc.rpartition("@")[2], url.path, "", ""))
        self.limits = Limits(max_requests=wire.MAX_REQUESTS, max_bytes=wire.MAX_BYTES)
        headers = {"content-type": "application/json"} | ({} if api_key is None else {"x-api-key": api_key})
        self._pool = HttpPool(endpoint, headers=headers, limits=sizes, network=network, name=self.name)
        self._retries = RateLimitHandler()

    async def close(self) -> None:
        await self._pool.close()

    def write_chat(self, custom_id: str, request: LLMRequest, model: str) -> WireItem:
        call = write_request(request, model)
        if "speed" in call.body:
            raise UnsupportedError("speed: a batch has none; expected a request without it", param="speed")
        params = {name: value for name, value in call.body.items() if name != "stream"}  # a batch never streams
        data = wire.write_item(custom_id, msgspec.Raw(encode(params)))
        return WireItem(data=data, kind=Kind(CHAT_URL, "", tuple(sorted(call.headers.items()))))

    def write_embedding(self, custom_id: str, body: bytes, model: str) -> WireItem:
        raise UnsupportedError("url: Anthropic makes no embeddings; expected /v1/chat/completions", param="url")

    async def upload(self, part: Part, path: Path) -> str:
        raise NotImplementedError("a message batch is one request")

    async def find_upload(self, part: Part, path: Path, since: float) -> str | None:
        raise NotImplementedError("a message batch is one request")

    async def create(self, part: Part, path: Path) -> str:
        body = FileBody(path, wire.BEFORE, wire.AFTER)
        answer = await self._pool.request(
            "POST",
            wire.BATCHES,
            body=body,
            headers=part.headers,
            timeout=upload_seconds(part.num_bytes),
            may_repeat=False,
        )
        return read_answer(answer.body, wire.MessageBatch, self.name).id

    async def find(self, part: Part, since: float, known: Collection[str], owns: Callable[[str], bool]) -> str | None:
        undecided: list[str] = []
        until = (part.intent_at or since) + upload_seconds(part.num_bytes) + SERVER_SECONDS
        async with aclosing(self._listed(since, until)) as batches:
            async for batch in batches:
                if batch.id in known or batch.request_counts.total != part.num_items:
                    continue
                if batch.processing_status != "ended":
                    undecided.append(batch.id)
                elif batch.archived_at is None and await self._has(batch.id, owns):
                    return batch.id
        if undecided:
            raise Undecided(tuple(undecided))
        return None

    async def look(self, part: Part) -> dict[str, object]:
        assert part.batch_id is not None, "only what was created can be looked at"
        answer = await self._get(wire.batch_path(part.batch_id))
        batch = read_answer(answer, wire.MessageBatch, self.name)
        counts, has_ended = batch.request_counts, batch.processing_status == "ended"
        num_failed = counts.errored + counts.canceled + counts.expired
        return {
            "status": batch.processing_status,
            "has_ended": has_ended,
            "num_done": counts.succeeded + num_failed,
            "num_failed": num_failed,
            "result_files": (part.batch_id,) if has_ended and batch.archived_at is None else (),
            "failure": "" if batch.archived_at is None else "the results were not fetched in time and are gone",
        }

    async def cancel(self, part: Part) -> None:
        assert part.batch_id is not None, "only what was created can be cancelled"
        path = wire.cancel_path(part.batch_id)
        headers = {_VERSION: NEWEST_VERSION}
        try:
            await self._retries.execute_with_retry(
                lambda: self._pool.request("POST", path, headers=headers, timeout=CALL_SECONDS)
            )
        except InvalidRequestError:
            if not (await self.look(part))["has_ended"]:
                raise

    async def download(self, part: Part, write: Write) -> None:
        assert part.batch_id is not None, "only what was created can be fetched"
        headers = {_VERSION: part.headers.get(_VERSION, NEWEST_VERSION)}
        async with self._pool.stream("GET", wire.results_path(part.batch_id), headers=headers) as answer:
            await write_lines(answer.chunks(), write)

    async def read(self, line: bytes) -> Outcome:
        said = read_answer(line, wire.ResultLine, self.name)
        custom_id, result = said.custom_id, said.result
        if result.type == "succeeded" and bytes(result.message):
            return await self._read_message(custom_id, bytes(result.message))
        if result.type == "errored":
            fields = result.error or wire.ErrorFields()
            body = encode({"error": fields.error})
            error = ItemError(code=fields.error.type, message=fields.error.message)
            failed = ItemResult(
                custom_id=custom_id, id=custom_id, status_code=fields.status, request_id=fields.request_id,
                body=msgspec.Raw(body), error=error,
            )  # fmt: skip
            return Outcome(custom_id=custom_id, result=failed)
        if (reason := _WITHOUT_ANSWER.get(result.type)) is None:
            raise ProviderError(f"anthropic sent a result of an unknown kind: {line[:200]!r}", code="malformed_answer")
        return Outcome(custom_id=custom_id, result=ItemResult(custom_id=custom_id, id=custom_id, error=reason))

    async def _read_message(self, custom_id: str, message: bytes) -> Outcome:
        reader = AnswerReader(custom_id, self.name)
        events = reader.read_message(message)

        async def answer() -> AsyncGenerator[Event, None]:
            for event in events:
                yield event
            yield Finish(usage=reader.usage)

        response = await collect(answer())
        reply = ChatReply(custom_id, created=0)
        fields = msgspec.json.decode(reply.body(reply.lasting(response), response), type=dict[str, msgspec.Raw])
        del fields["autobot"]  # nothing was measured: the batch tells neither times nor what was saved
        result = ItemResult(
            custom_id=custom_id, id=custom_id, status_code=200, request_id=None, body=msgspec.Raw(encode(fields))
        )
        return Outcome(custom_id=custom_id, result=result, model=response.model, usage=reader.usage)

    async def _has(self, batch_id: str, owns: Callable[[str], bool]) -> bool:
        """Whether the first of the batch's results is one of ours."""
        headers = {_VERSION: NEWEST_VERSION}
        async with (
            self._pool.stream("GET", wire.results_path(batch_id), headers=headers) as answer,
            aclosing(answer.chunks()) as chunks,
            aclosing(lines(chunks)) as results,
        ):
            async for line in results:
                return owns(read_answer(line, wire.ResultLine, self.name).custom_id)
        return False

    async def _listed(self, since: float, until: float) -> AsyncGenerator[wire.MessageBatch, None]:
        """The batches that may have been created between two times of our clock, the latest first."""
        after: str | None = None
        for _ in range(_MOST_PAGES):
            answer = await self._answer(wire.batches_page(after))
            page = read_answer(answer.body, wire.Page, self.name)
            ahead, margin = _clock_difference(answer.headers.get("date", ""))
            for batch in page.data:
                created = batch.created_at.timestamp() - ahead
                if created < since - margin:
                    return
                if created <= until + margin:
                    yield batch
            if not page.has_more or not page.data or page.data[-1].id == after:
                return
            after = page.data[-1].id
        raise ProviderError(f"{self.name} lists its batches without an end")

    async def _get(self, path: str) -> bytes:
        return (await self._answer(path)).body

    async def _answer(self, path: str) -> HttpAnswer:
        headers = {_VERSION: NEWEST_VERSION}
        return await self._retries.execute_with_retry(
            lambda: self._pool.request("GET", path, headers=headers, timeout=CALL_SECONDS)
        )


def _clock_difference(date: str) -> tuple[float, float]:
    """By how many seconds the clock that wrote the header `date` is ahead of ours, and how far that may be wrong."""
    try:
        theirs = email.utils.parsedate_to_datetime(date).timestamp()
    except ValueError:
        return 0.0, CLOCK_MARGIN
    return theirs - time.time(), DATE_MARGIN
