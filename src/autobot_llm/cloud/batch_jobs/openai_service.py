"""Batches of OpenAI, Azure OpenAI and every compatible cloud. Knows which calls to make; shapes are the dialect's.

A part is known again by the name of its file, which has the job's id in it, and by its batch's input file and metadata.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection
from pathlib import Path
from typing import TypeVar

from autobot_llm.cloud.batch_jobs.job import ItemError, ItemResult, Part
from autobot_llm.cloud.batch_jobs.service import (
    CALL_SECONDS,
    DEFAULT_SIZES,
    Kind,
    Limits,
    Outcome,
    WireItem,
    Write,
    upload_seconds,
    write_lines,
)
from autobot_llm.cloud.retry import RateLimitHandler
from autobot_llm.dialects.bodies import encode, read_answer, read_object
from autobot_llm.dialects.openai import batches as wire
from autobot_llm.dialects.openai.embeddings import read_embedding_body
from autobot_llm.dialects.openai.requests import AZURE, write_chat
from autobot_llm.errors import ConfigurationError, InvalidRequestError, ProviderError, ProviderUnavailable
from autobot_llm.providers.openai import Endpoint
from autobot_llm.transport.network import DEFAULT_NETWORK, Network, PoolLimits
from autobot_llm.transport.pool import HttpPool
from autobot_llm.transport.upload import FileBody
from autobot_llm.types import LLMRequest

LIMITS = Limits(max_requests=wire.MAX_REQUESTS, max_bytes=wire.MAX_BYTES)
FILE_SECONDS = 600.0  # until an uploaded file is ready to be used
NOTE = "autobot_job"  # the key of the metadata in which a batch carries the name of its part
CLOCK_MARGIN = 600.0  # seconds by which the provider's clock may differ from ours
_ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
_JSON = {"content-type": "application/json"}
_MOST_PAGES = 100

KindT = TypeVar("KindT")
ObjectT = TypeVar("ObjectT", wire.FileObject, wire.BatchObject)


class OpenAIBatches:
    """The batches of the server at `endpoint`; `name` is the provider's.

    A compatible cloud may have smaller `limits` than OpenAI's, which are the default.
    """

    uploads = True
    separator = b"\n"

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        name: str,
        limits: Limits = LIMITS,
        sizes: PoolLimits = DEFAULT_SIZES,
        network: Network = DEFAULT_NETWORK,
    ) -> None:
        if endpoint.deployment is not None:
            raise ConfigurationError(
                f"provider '{name}': batch jobs need the address without a deployment, https://NAME.openai.azure.com"
            )
        self.name = name
        self.address = endpoint.shown
        self.limits = limits
        self._flavour = endpoint.flavour
        key = {name: value for name, value in endpoint.headers.items() if name != "content-type"}
        self._pool = HttpPool(endpoint.base_url, headers=key, limits=sizes, network=network, name=name)
        self._retries = RateLimitHandler()

    async def close(self) -> None:
        await self._pool.close()

    def write_chat(self, custom_id: str, request: LLMRequest, model: str) -> WireItem:
        body = write_chat(request, model, self._flavour)
        return WireItem(data=wire.write_line(custom_id, wire.CHAT_URL, body), kind=Kind(wire.CHAT_URL, model))

    def write_embedding(self, custom_id: str, body: bytes, model: str) -> WireItem:
        request, _ = read_embedding_body(body, request_id=custom_id, tenant="")
        named = encode(read_object(body) | {"model": model})
        data = wire.write_line(custom_id, wire.EMBEDDINGS_URL, named)
        return WireItem(data=data, kind=Kind(wire.EMBEDDINGS_URL, model), weight=len(request.inputs))

    async def upload(self, part: Part, path: Path) -> str:
        before, after, kind = wire.upload_frame(f"{part.name}.jsonl")
        answer = await self._pool.request(
            "POST", wire.FILES, body=FileBody(path, before, after), headers={"content-type": kind},
            timeout=upload_seconds(part.num_bytes), may_repeat=False,
        )  # fmt: skip
        return read_answer(answer.body, wire.FileObject, self.name).id

    async def find_upload(self, part: Part, path: Path, since: float) -> str | None:
        size = FileBody(path).num_bytes

        def is_ours(file: wire.FileObject) -> bool:
            return file.filename == f"{part.name}.jsonl" and file.bytes in (None, size)

        found = await self._found(wire.files_page, wire.Page[wire.FileObject], is_ours, since)
        return None if found is None else found.id

    async def create(self, part: Part, path: Path) -> str:
        assert part.file_id is not None, "a part is uploaded before it is created"
        if self._flavour is AZURE:
            await self._until_ready(part.file_id)
        body = wire.write_batch(part.file_id, part.url, {NOTE: part.name})
        answer = await self._pool.request(
            "POST", wire.BATCHES, body=body, headers=_JSON, timeout=CALL_SECONDS, may_repeat=False
        )
        return read_answer(answer.body, wire.BatchObject, self.name).id

    async def find(self, part: Part, since: float, known: Collection[str], owns: Callable[[str], bool]) -> str | None:
        def is_ours(batch: wire.BatchObject) -> bool:
            return batch.input_file_id == part.file_id or (batch.metadata or {}).get(NOTE) == part.name

        found = await self._found(wire.batches_page, wire.Page[wire.BatchObject], is_ours, since)
        return None if found is None else found.id

    async def look(self, part: Part) -> dict[str, object]:
        assert part.batch_id is not None, "only what was created can be looked at"
        batch = await self._get(wire.batch_path(part.batch_id), wire.BatchObject)
        counts = batch.request_counts or wire.RequestCounts()
        files = tuple(file for file in (batch.output_file_id, batch.error_file_id) if file is not None)
        return {
            "status": batch.status,
            "has_ended": batch.status in _ENDED,
            "num_done": counts.completed + counts.failed,
            "num_failed": counts.failed,
            "result_files": files,
            "failure": wire.failure_of(batch),
        }

    async def cancel(self, part: Part) -> None:
        assert part.batch_id is not None, "only what was created can be cancelled"
        path = wire.cancel_path(part.batch_id)
        try:
            await self._retries.execute_with_retry(lambda: self._pool.request("POST", path, timeout=CALL_SECONDS))
        except InvalidRequestError:
            if not (await self.look(part))["has_ended"]:
                raise

    async def download(self, part: Part, write: Write) -> None:
        for file_id in part.result_files:
            async with self._pool.stream("GET", wire.content_path(file_id)) as answer:
                await write_lines(answer.chunks(), write)

    async def read(self, line: bytes) -> Outcome:
        said = read_answer(line, wire.ResultLine, self.name)
        response, error = said.response, wire.error_of(said)
        model, usage = (None, None) if response is None else wire.usage_of(response.body)
        result = ItemResult(
            custom_id=said.custom_id,
            id=said.id,
            status_code=None if response is None else response.status_code,
            request_id=None if response is None else response.request_id,
            body=None if response is None else response.body,
            error=None if error is None else ItemError(code=error.code or "error", message=error.message or ""),
        )
        return Outcome(custom_id=said.custom_id, result=result, model=model, usage=usage)

    async def _until_ready(self, file_id: str) -> None:
        """Azure refuses a batch of a file that it has not looked through yet."""
        wait = 0.5
        try:
            async with asyncio.timeout(FILE_SECONDS):
                while True:
                    file = await self._get(wire.file_path(file_id), wire.FileObject)
                    if file.status not in ("pending", "running"):
                        break
                    await asyncio.sleep(wait)
                    wait = min(2 * wait, 15.0)
        except TimeoutError as exc:
            raise ProviderUnavailable(
                f"{self.name} has not looked through the uploaded file within {FILE_SECONDS:g} s", may_have_begun=False
            ) from exc
        if file.status == "error":
            raise InvalidRequestError(f"{self.name} cannot use the uploaded file: {file.status_details or 'no reason'}")

    async def _found(
        self,
        page_after: Callable[[str | None], str],
        kind: type[wire.Page[ObjectT]],
        is_ours: Callable[[ObjectT], bool],
        since: float,
    ) -> ObjectT | None:
        async for one in self._listed(page_after, kind):
            if is_ours(one):
                return one
            if 0 < one.created_at < since - CLOCK_MARGIN:
                break
        return None

    async def _listed(
        self, page_after: Callable[[str | None], str], kind: type[wire.Page[ObjectT]]
    ) -> AsyncGenerator[ObjectT, None]:
        after: str | None = None
        for _ in range(_MOST_PAGES):
            page = await self._get(page_after(after), kind)
            for one in page.data:
                yield one
            if not page.has_more or not page.data or page.data[-1].id == after:
                return
            after = page.data[-1].id
        raise ProviderError(f"{self.name} lists its files or batches without an end")

    async def _get(self, path: str, kind: type[KindT]) -> KindT:
        async def ask() -> bytes:
            return (await self._pool.request("GET", path, timeout=CALL_SECONDS)).body

        return read_answer(await self._retries.execute_with_retry(ask), kind, self.name)
