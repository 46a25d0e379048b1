"""Anthropic's message batches on the wire. Knows shapes; knows no connection.

Format: https://platform.claude.com/docs/en/api/messages/batches. A batch is one body with all its requests; its results
come as one JSON line each, in any order, once all of it has ended. There is no field for a note of the sender's: the
ids of the requests are all by which a batch can be known again.
"""

from __future__ import annotations

from datetime import datetime
from urllib.parse import quote, urlencode

import msgspec

from autobot_llm.dialects.anthropic.answers import STATUS_OF_ERROR
from autobot_llm.dialects.bodies import encode

BATCHES = "/v1/messages/batches"
MAX_REQUESTS = 100_000
MAX_BYTES = 256_000_000
BEFORE, SEPARATOR, AFTER = b'{"requests":[', b",\n", b"]}"
_PAGE = 100


class RequestCounts(msgspec.Struct, frozen=True, kw_only=True):
    """All are `processing` until the whole batch has ended."""

    processing: int = 0
    succeeded: int = 0
    errored: int = 0
    canceled: int = 0
    expired: int = 0

    @property
    def total(self) -> int:
        return self.processing + self.succeeded + self.errored + self.canceled + self.expired


class MessageBatch(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    processing_status: str
    created_at: datetime
    request_counts: RequestCounts
    cancel_initiated_at: datetime | None = None
    archived_at: datetime | None = None


class Page(msgspec.Struct, frozen=True, kw_only=True):
    data: list[MessageBatch]
    has_more: bool = False


class ErrorDetails(msgspec.Struct, frozen=True, kw_only=True):
    type: str = "api_error"
    message: str = ""


class ErrorFields(msgspec.Struct, frozen=True, kw_only=True):
    error: ErrorDetails = ErrorDetails()
    request_id: str | None = None

    @property
    def status(self) -> int:
        """The HTTP status with which the same request would have been refused by itself."""
        return STATUS_OF_ERROR.get(self.error.type, 500)


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """`type` is succeeded, errored, canceled or expired."""

    type: str
    message: msgspec.Raw = msgspec.Raw()  # empty where there is none
    error: ErrorFields | None = None


class ResultLine(msgspec.Struct, frozen=True, kw_only=True):
    custom_id: str
    result: Result


def write_item(custom_id: str, params: msgspec.Raw | dict[str, object]) -> bytes:
    """One request of a batch; BEFORE, SEPARATOR and AFTER make them a body."""
    return encode({"custom_id": custom_id, "params": params})


def batches_page(after: str | None) -> str:
    """The path of a page of the batches, the latest first; `after` is the last batch of the page before."""
    query = {"limit": str(_PAGE)} | ({} if after is None else {"after_id": after})
    return f"{BATCHES}?{urlencode(query)}"


def batch_path(batch_id: str) -> str:
    return f"{BATCHES}/{quote(batch_id, safe='')}"


def cancel_path(batch_id: str) -> str:
    return f"{batch_path(batch_id)}/cancel"


def results_path(batch_id: str) -> str:
    """Where the results are. Not the `results_url` of the batch: the key goes to the configured address alone."""
    return f"{batch_path(batch_id)}/results"
