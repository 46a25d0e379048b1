"""OpenAI's files and batches, strict about what is sent. For tests of several folders.

Each body is held against the shapes that OpenAI publishes with its client, each line of an input file too, and what is
answered is parsed by the client's own types before it is sent.
"""

from __future__ import annotations

import contextlib
import email
import email.policy
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

from batch_faults import Hold, stopping
from openai.types import Batch, FileObject
from openai.types.batch_create_params import BatchCreateParams
from openai_upstream import Json, _wrong_object, complaint, embeddings, whole
from raw_server import Asked, RawServer, Wire, raw_server

KEY = "sk-batch-secret"
MAX_LINES = 50_000
MAX_BYTES = 200_000_000

Answer = Callable[[str, Json], Json]


def echo(custom_id: str, body: Json) -> Json:
    """The answer to a chat: the text that it ends with."""
    return whole({"content": f"about {body['messages'][-1]['content']}"}) | {"model": body["model"]}


class Refused(Exception):
    """Answered with a status and an error of OpenAI's form."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class OpenAIBatchServer:
    """What was sent, and the batches of it. `fails` are texts of requests that fail; `drops` of those that vanish.

    `keeps_metadata` False is a compatible cloud that ignores it. A file is "pending" for `num_pending_looks` looks.
    """

    answer: Answer = echo
    fails: frozenset[str] = frozenset()
    drops: frozenset[str] = frozenset()
    keeps_metadata: bool = True
    num_pending_looks: int = 0
    page_size: int = 2
    hold: Hold | None = None
    refuse: Callable[[Asked], Refused | None] = lambda _: None
    files: dict[str, Json] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)
    batches: dict[str, Json] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)
    server: RawServer = field(default_factory=RawServer)
    num_made: int = 0

    @property
    def url(self) -> str:
        return f"{self.server.url}/v1"

    def environment(self) -> dict[str, str]:
        return {"AUTOBOT_OPENAI_ENDPOINT": self.url, "OPENAI_API_KEY": KEY}

    async def play(self, wire: Wire, asked: Asked) -> None:
        hold = stopping(self.hold, asked)
        try:
            if refused := self.refuse(asked):
                raise refused
            await hold.stop("before", wire)
            answer = self.act(asked)
            await hold.stop("after", wire)
            await hold.stop("unrecorded", wire)
        except Refused as refusal:
            self.complaints.append(str(refusal))
            error = {"message": str(refusal), "type": "invalid_request_error", "param": None, "code": None}
            await wire.reply(
                json.dumps({"error": error}).encode(), status=refusal.status, content_type="application/json"
            )
            return
        if isinstance(answer, bytes):
            await self._send_content(wire, answer, hold)
        else:
            await wire.reply(json.dumps(answer).encode(), content_type="application/json")

    async def _send_content(self, wire: Wire, data: bytes, hold: Hold) -> None:
        await wire.begin_stream("application/octet-stream")
        half = len(data) // 2
        if half:
            await wire.piece(data[:half])
        await hold.stop("half", wire)
        await wire.piece(data[half:] or b"\n")
        await wire.end_stream()

    def act(self, asked: Asked) -> Json | bytes:
        if asked.headers.get("authorization") != f"Bearer {KEY}":
            raise Refused(401, "Incorrect API key provided")
        url = urlsplit(asked.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        parts = url.path.removeprefix("/v1/").split("/")
        match asked.method, parts:
            case "POST", ["files"]:
                return self._upload(asked)
            case "GET", ["files"]:
                newest = [file for file in reversed(self.files.values()) if file["purpose"] == query.get("purpose")]
                if query.get("order") != "desc":
                    newest.reverse()
                return self._page(newest, query)
            case "GET", ["files", file_id]:
                return self._file(file_id)
            case "GET", ["files", file_id, "content"]:
                self._file(file_id)
                return self.contents[file_id]
            case "POST", ["batches"]:
                return self._create(asked)
            case "GET", ["batches"]:
                return self._page([self._shown(one) for one in reversed(self.batches)], query)
            case "GET", ["batches", batch_id]:
                return self._shown(batch_id)
            case "POST", ["batches", batch_id, "cancel"]:
                return self._cancel(batch_id)
        raise Refused(404, f"there is no {asked.method} {url.path}")

    def _new_id(self, kind: str) -> str:
        self.num_made += 1
        return f"{kind}-{self.num_made:04d}"

    def _upload(self, asked: Asked) -> Json:
        kind = asked.headers.get("content-type", "")
        if not kind.startswith("multipart/form-data"):
            raise Refused(400, f"expected multipart/form-data, got {kind}")
        head = f"content-type: {kind}\r\n\r\n".encode()
        form = email.message_from_bytes(head + asked.body, policy=email.policy.HTTP)
        fields = {part.get_param("name", header="content-disposition"): part for part in form.iter_parts()}
        if fields.keys() != {"purpose", "file"}:
            raise Refused(400, f"the form has the fields {sorted(map(str, fields))}")
        if (purpose := fields["purpose"].get_content().strip()) != "batch":
            raise Refused(400, f"purpose: {purpose!r}")
        data = fields["file"].get_payload(decode=True)
        return self.add_file(fields["file"].get_filename(), data, "batch")

    def add_file(self, name: str | None, data: bytes, purpose: str) -> Json:
        file_id = self._new_id("file")
        self.contents[file_id] = data
        self.files[file_id] = {
            "id": file_id, "object": "file", "bytes": len(data), "created_at": int(time.time()), "filename": name,
            "purpose": purpose, "status": "pending" if self.num_pending_looks else "processed",
        }  # fmt: skip
        return self._file(file_id, is_look=False)

    def _file(self, file_id: str, *, is_look: bool = True) -> Json:
        if file_id not in self.files:
            raise Refused(404, f"No such File object: {file_id}")
        file = self.files[file_id]
        if file["status"] == "pending" and is_look:
            self.num_pending_looks -= 1
            if self.num_pending_looks <= 0:
                file["status"] = "processed"
        if file["status"] != "pending":  # Azure's word
            FileObject.model_validate(file)
        return file

    def _page(self, all_of_them: list[Json], query: Mapping[str, str]) -> Json:
        limit = min(int(query.get("limit", "20")), self.page_size)
        ids = [one["id"] for one in all_of_them]
        begin = ids.index(query["after"]) + 1 if "after" in query else 0
        data = all_of_them[begin : begin + limit]
        return {
            "object": "list", "data": data, "has_more": begin + limit < len(ids),
            "first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None,
        }  # fmt: skip

    def _create(self, asked: Asked) -> Json:
        body = json.loads(asked.body)
        if asked.headers.get("content-type") != "application/json":
            raise Refused(400, "content-type is not application/json")
        if wrong := _wrong_object(BatchCreateParams, body, "body"):
            raise Refused(400, wrong)
        file = self._file(body["input_file_id"], is_look=False)
        if file["status"] != "processed":
            raise Refused(400, f"The input file is in '{file['status']}' state")
        lines = self.contents[file["id"]].splitlines()
        if file["purpose"] != "batch" or len(lines) > MAX_LINES or file["bytes"] > MAX_BYTES:
            raise Refused(400, "the file cannot be the input of a batch")
        batch_id = self._new_id("batch")
        batch: Json = {
            "id": batch_id, "object": "batch", "endpoint": body["endpoint"], "errors": None,
            "input_file_id": file["id"], "completion_window": "24h", "status": "validating", "output_file_id": None,
            "error_file_id": None, "created_at": int(time.time()), "expires_at": int(time.time()) + 86400,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": body.get("metadata") if self.keeps_metadata else None,
        }  # fmt: skip
        self.batches[batch_id] = batch
        if problems := check_lines(lines, body["endpoint"]):
            self.complaints += [problem["message"] for problem in problems]
            batch |= {"status": "failed", "failed_at": int(time.time()), "errors": {"object": "list", "data": problems}}
        return self._shown(batch_id)

    def _shown(self, batch_id: str) -> Json:
        if batch_id not in self.batches:
            raise Refused(404, f"No batch found with id '{batch_id}'.")
        Batch.model_validate(self.batches[batch_id], strict=True)
        return self.batches[batch_id]

    def _cancel(self, batch_id: str) -> Json:
        batch = self._shown(batch_id)
        if batch["status"] not in ("validating", "in_progress", "finalizing"):
            raise Refused(400, f"Cannot cancel a batch with status '{batch['status']}'.")
        batch |= {"status": "cancelling", "cancelling_at": int(time.time())}
        return self._shown(batch_id)

    # What tests do with the batches

    def run(self, batch_id: str, *, status: str = "completed", num_answered: int | None = None) -> None:
        """End the batch with `status`; of its requests the first `num_answered` have been worked on."""
        batch = self.batches[batch_id]
        if batch["status"] == "failed":
            return
        requests = [json.loads(line) for line in self.contents[batch["input_file_id"]].splitlines()]
        done, failed = [], []
        for request in requests[:num_answered]:
            outcome = self._outcome(request)
            if outcome is not None:
                (failed if outcome["response"]["status_code"] >= 400 else done).append(outcome)
        for request in requests[len(requests) if num_answered is None else num_answered :]:
            if status == "expired":
                error = {"code": "batch_expired", "message": "This request could not be executed in time."}
                failed.append(
                    {"id": "batch_req_0", "custom_id": request["custom_id"], "response": None, "error": error}
                )
        for name, lines in (("output_file_id", done), ("error_file_id", failed)):
            random.shuffle(lines)
            if lines:
                data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
                batch[name] = self.add_file(f"{batch_id}.jsonl", data, "batch_output")["id"]
        counts = {"total": len(requests), "completed": len(done), "failed": len(failed)}
        batch |= {"status": status, "request_counts": counts, f"{status}_at": int(time.time())}
        self._shown(batch_id)

    def run_all(self) -> None:
        for batch_id, batch in self.batches.items():
            if batch["status"] in ("validating", "in_progress"):
                self.run(batch_id)

    def _outcome(self, request: Json) -> Json | None:
        body = request["body"]
        text = "" if "input" in body else body["messages"][-1]["content"]
        if text in self.drops:
            return None
        if text in self.fails:
            error = {"message": f"cannot do {text}", "type": "invalid_request_error", "param": None, "code": "no_way"}
            response = {"status_code": 400, "request_id": "req-1", "body": {"error": error}}
        else:
            answer = embeddings(body) if "input" in body else self.answer(request["custom_id"], body)
            response = {"status_code": 200, "request_id": "req-1", "body": answer}
        return {"id": "batch_req_1", "custom_id": request["custom_id"], "response": response, "error": None}


def check_lines(lines: list[bytes], endpoint: str) -> list[Json]:
    """What is wrong with the lines of an input file, as OpenAI's own list of errors."""
    problems: list[Json] = []
    seen: set[str] = set()
    models: set[str] = set()
    for number, data in enumerate(lines, 1):
        line = json.loads(data)
        wrong = None
        if line.keys() != {"custom_id", "method", "url", "body"}:
            wrong = f"fields {sorted(line)}"
        elif line["method"] != "POST" or line["url"] != endpoint:
            wrong = f"{line['method']} {line['url']}"
        elif line["custom_id"] in seen:
            wrong = f"the custom_id {line['custom_id']} is not unique"
        else:
            seen.add(line["custom_id"])
            models.add(line["body"].get("model"))
            wrong = complaint(endpoint.removeprefix("/v1"), line["body"], {})
            if line["body"].get("stream"):
                wrong = "stream"
        if wrong is None and len(models) > 1:
            wrong = f"more than one model: {sorted(models)}"
        if wrong is not None:
            problems.append({"code": "invalid_json_line", "message": wrong, "param": None, "line": number})
    if not lines:
        problems.append({"code": "empty_file", "message": "the file is empty", "param": None, "line": None})
    return problems


@contextlib.asynccontextmanager
async def openai_batches(**fields: Any) -> AsyncIterator[OpenAIBatchServer]:
    """Serve on a free port."""
    upstream = OpenAIBatchServer(**fields)
    async with raw_server(upstream.play) as server:
        upstream.server = server
        yield upstream
