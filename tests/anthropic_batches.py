"""Anthropic's message batches, strict about what is sent. For tests of several folders.

Written from https://platform.claude.com/docs/en/api/messages/batches; each request of a batch is checked as one by
itself is, and what is answered is parsed by the types of Anthropic's own client before it is sent.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any
from urllib.parse import parse_qs, urlsplit

from anthropic.types.messages import MessageBatch, MessageBatchIndividualResponse
from anthropic_reference import SAMPLING, Violation, check_messages, require
from anthropic_upstream import KEY, USAGE, error
from batch_faults import Hold, stopping
from raw_server import Asked, RawServer, Wire, raw_server

Json = dict[str, Any]
_COUNTS = ("processing", "succeeded", "errored", "canceled", "expired")
_STATUS = {"invalid_request_error": 400, "authentication_error": 401, "not_found_error": 404, "overloaded_error": 529}


class Refused(Exception):
    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class AnthropicBatchServer:
    """What was sent, and the batches of it. `fails` are texts of requests that fail."""

    fails: frozenset[str] = frozenset()
    page_size: int = 2
    seconds_ahead: float = 0.0  # of its clock
    hold: Hold | None = None
    batches: dict[str, Json] = field(default_factory=dict)
    requests: dict[str, list[Json]] = field(default_factory=dict)
    results: dict[str, bytes] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)
    headers: dict[str, Mapping[str, str]] = field(default_factory=dict)
    server: RawServer = field(default_factory=RawServer)

    @property
    def url(self) -> str:
        return self.server.url

    def environment(self) -> dict[str, str]:
        return {"AUTOBOT_ANTHROPIC_ENDPOINT": self.url, "ANTHROPIC_API_KEY": KEY}

    async def play(self, wire: Wire, asked: Asked) -> None:
        hold = stopping(self.hold, asked)
        try:
            await hold.stop("before", wire)
            answer = self.act(asked)
            await hold.stop("after", wire)
            await hold.stop("unrecorded", wire)
        except (Refused, Violation) as refusal:
            self.complaints.append(str(refusal))
            kind = refusal.kind if isinstance(refusal, Refused) else "invalid_request_error"
            await wire.reply(error(kind, str(refusal)), status=_STATUS[kind], content_type="application/json")
            return
        if isinstance(answer, dict):
            await wire.reply(
                json.dumps(answer).encode(),
                content_type="application/json",
                request_id="req_1",
                date=format_datetime(self._now(), usegmt=True),
            )
            return
        await wire.begin_stream("application/x-jsonl")
        half = len(answer) // 2
        await wire.piece(answer[:half])
        await hold.stop("half", wire)
        await wire.piece(answer[half:])
        await wire.end_stream()

    def _now(self) -> datetime:
        return datetime.now(UTC) + timedelta(seconds=self.seconds_ahead)

    def act(self, asked: Asked) -> Json | bytes:
        require(asked.headers.get("anthropic-version") in ("2023-06-01", "2026-10-21"), "anthropic-version")
        keys = {asked.headers.get("x-api-key"), asked.headers.get("authorization", "").removeprefix("Bearer ")}
        if KEY not in keys:  # either way is Anthropic's
            raise Refused("authentication_error", "invalid x-api-key")
        url = urlsplit(asked.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        match asked.method, url.path.removeprefix("/v1/messages/batches").split("/")[1:]:
            case "POST", []:
                return self._create(asked)
            case "GET", []:
                return self._page(query)
            case "GET", [batch_id]:
                return self._shown(batch_id)
            case "GET", [batch_id, "results"]:
                self._shown(batch_id)
                if batch_id not in self.results:
                    raise Refused("not_found_error", "the results are not there yet")
                return self.results[batch_id]
            case "POST", [batch_id, "cancel"]:
                return self._cancel(batch_id)
        raise Refused("not_found_error", f"there is no {asked.method} {url.path}")

    def _create(self, asked: Asked) -> Json:
        require(asked.headers.get("content-type") == "application/json", "content-type is not application/json")
        require(len(asked.body) <= 256_000_000, "the batch is too large")
        body = json.loads(asked.body)
        require(body.keys() == {"requests"}, f"fields {sorted(body)}")
        require(1 <= len(body["requests"]) <= 100_000, "requests: 1 to 100,000")
        ids = [request.get("custom_id", "") for request in body["requests"]]
        require(len(ids) == len(set(ids)), "custom_id: not unique")
        for request in body["requests"]:
            require(request.keys() == {"custom_id", "params"}, f"requests: fields {sorted(request)}")
            require(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", request["custom_id"]), "custom_id: its form")
            params = request["params"]
            require(not params.get("stream") and "speed" not in params, "stream and speed are not for batches")
            check_messages(params)
            if asked.headers["anthropic-version"] == "2026-10-21":
                require(not SAMPLING & params.keys(), "Extra inputs are not permitted")
        batch_id = self.add(body["requests"])
        self.headers[batch_id] = asked.headers
        return self._shown(batch_id)

    def add(self, requests: list[Json]) -> str:
        """A batch of these requests, whoever sent it."""
        batch_id = f"msgbatch_{len(self.batches) + 1:04d}"
        now = self._now()
        counts = dict.fromkeys(_COUNTS, 0) | {"processing": len(requests)}
        self.batches[batch_id] = {
            "id": batch_id, "type": "message_batch", "processing_status": "in_progress", "request_counts": counts,
            "created_at": now.isoformat(), "expires_at": (now + timedelta(days=1)).isoformat(), "ended_at": None,
            "archived_at": None, "cancel_initiated_at": None, "results_url": None,
        }  # fmt: skip
        self.requests[batch_id] = requests
        return batch_id

    def _shown(self, batch_id: str) -> Json:
        if batch_id not in self.batches:
            raise Refused("not_found_error", f"no batch {batch_id}")
        MessageBatch.model_validate(self.batches[batch_id])
        return self.batches[batch_id]

    def _page(self, query: Mapping[str, str]) -> Json:
        newest = [self._shown(batch_id) for batch_id in reversed(self.batches)]
        ids = [batch["id"] for batch in newest]
        begin = ids.index(query["after_id"]) + 1 if "after_id" in query else 0
        limit = min(int(query.get("limit", "20")), self.page_size)
        data = newest[begin : begin + limit]
        return {
            "data": data, "has_more": begin + limit < len(ids), "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
        }  # fmt: skip

    def _cancel(self, batch_id: str) -> Json:
        batch = self._shown(batch_id)
        if batch["processing_status"] == "ended":
            raise Refused("invalid_request_error", "the batch has ended")
        batch |= {"processing_status": "canceling", "cancel_initiated_at": self._now().isoformat()}
        return self._shown(batch_id)

    # What tests do with the batches

    def run(self, batch_id: str, *, rest: str = "succeeded", num_answered: int | None = None) -> None:
        """End the batch; what comes after its first `num_answered` requests ends as `rest`."""
        requests = self.requests[batch_id]
        counts = dict.fromkeys(_COUNTS, 0)
        lines: list[bytes] = []
        for place, request in enumerate(requests):
            result = self._result(request["params"])
            if num_answered is not None and place >= num_answered:
                result = {"type": rest}
            counts[result["type"]] += 1
            line = {"custom_id": request["custom_id"], "result": result}
            MessageBatchIndividualResponse.model_validate(line)
            lines.append(json.dumps(line).encode())
        random.shuffle(lines)
        self.results[batch_id] = b"\n".join(lines)  # the last line has no end
        now = self._now().isoformat()
        self.batches[batch_id] |= {
            "processing_status": "ended", "request_counts": counts, "ended_at": now,
            "results_url": f"https://elsewhere.example/{batch_id}",
        }  # fmt: skip
        self._shown(batch_id)

    def run_all(self) -> None:
        for batch_id, batch in self.batches.items():
            if batch["processing_status"] == "in_progress":
                self.run(batch_id)

    def _result(self, params: Json) -> Json:
        last = params["messages"][-1]["content"]
        text = last if isinstance(last, str) else last[0]["text"]
        if text in self.fails:
            details = {"type": "invalid_request_error", "message": f"cannot do {text}"}
            return {"type": "errored", "error": {"type": "error", "error": details, "request_id": "req_9"}}
        message = {
            "id": "msg_1", "type": "message", "role": "assistant", "model": params["model"],
            "content": [{"type": "text", "text": f"about {text}"}], "stop_reason": "end_turn", "stop_sequence": None,
            "usage": USAGE | {"output_tokens": 5},
        }  # fmt: skip
        return {"type": "succeeded", "message": message}


@contextlib.asynccontextmanager
async def anthropic_batches(**fields: Any) -> AsyncIterator[AnthropicBatchServer]:
    """Serve on a free port."""
    upstream = AnthropicBatchServer(**fields)
    async with raw_server(upstream.play) as server:
        upstream.server = server
        yield upstream
