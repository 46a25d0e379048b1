"""OpenAI's batch jobs on the wire: files, batches and the lines of both. Knows shapes; knows no connection.

Format: https://developers.openai.com/api/reference/resources/batches and .../files. A batch is a file of requests that
was uploaded before; its answers come as files, of which one has the successes and one the failures, in any order.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, Generic, TypeVar
from urllib.parse import quote, urlencode

import msgspec

from autobot_llm.dialects.bodies import encode
from autobot_llm.dialects.openai.answers import UsageFields
from autobot_llm.types import Usage

FILES = "/files"
BATCHES = "/batches"
CHAT_URL = "/v1/chat/completions"
EMBEDDINGS_URL = "/v1/embeddings"
MAX_REQUESTS = 50_000
MAX_BYTES = 200_000_000
WINDOW = "24h"
PURPOSE = "batch"
_PAGE = 100

KindT = TypeVar("KindT")


class FileObject(msgspec.Struct, frozen=True, kw_only=True):
    """An uploaded file. Azure takes a while until its `status` is "processed"; others have it at once."""

    id: str
    filename: str = ""
    bytes: int | None = None
    created_at: float = 0
    status: str | None = None
    status_details: str | None = None


class RequestCounts(msgspec.Struct, frozen=True, kw_only=True):
    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchError(msgspec.Struct, frozen=True, kw_only=True):
    code: str | None = None
    message: str | None = None
    line: int | None = None


class BatchErrors(msgspec.Struct, frozen=True, kw_only=True):
    data: list[BatchError] | None = None


class BatchObject(msgspec.Struct, frozen=True, kw_only=True):
    """A batch. `errors` say why all of it failed; a request's own failure is in the error file."""

    id: str
    status: str
    input_file_id: str = ""
    created_at: float = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    request_counts: RequestCounts | None = None
    errors: BatchErrors | None = None
    metadata: dict[str, str] | None = None


class Page(msgspec.Struct, Generic[KindT], frozen=True, kw_only=True):
    data: list[KindT]
    has_more: bool = False


class LineResponse(msgspec.Struct, frozen=True, kw_only=True):
    status_code: int
    body: msgspec.Raw = msgspec.Raw(b"null")
    request_id: str | None = None


class LineError(msgspec.Struct, frozen=True, kw_only=True):
    message: str | None = None
    code: str | None = None


class ResultLine(msgspec.Struct, frozen=True, kw_only=True):
    """One line of an output or error file."""

    custom_id: str
    id: str | None = None
    response: LineResponse | None = None
    error: LineError | None = None


class _Answer(msgspec.Struct):
    model: str | None = None
    usage: UsageFields | None = None


class _Refusal(msgspec.Struct):
    message: str | None = None
    code: str | int | None = None
    type: str | None = None


class _Refused(msgspec.Struct):
    error: _Refusal | None = None


def write_line(custom_id: str, url: str, body: bytes) -> bytes:
    """One request of the input file, without a line end."""
    return encode({"custom_id": custom_id, "method": "POST", "url": url, "body": msgspec.Raw(body)})


def upload_frame(filename: str) -> tuple[bytes, bytes, str]:
    """What goes before and after the file's bytes in the upload, and its content type (RFC 7578)."""
    boundary = f"autobot-{secrets.token_hex(16)}"
    before = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n{PURPOSE}\r\n'
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{filename}"\r\n'
        "Content-Type: application/jsonl\r\n\r\n"
    )
    return (
        before.encode("ascii"),
        f"\r\n--{boundary}--\r\n".encode("ascii"),
        f"multipart/form-data; boundary={boundary}",
    )


def write_batch(file_id: str, url: str, metadata: Mapping[str, str]) -> bytes:
    """The body of `POST /batches`."""
    return encode({"input_file_id": file_id, "endpoint": url, "completion_window": WINDOW, "metadata": metadata})


def files_page(after: str | None) -> str:
    """The path of a page of the uploaded files, the latest first; `after` is the last file of the page before."""
    return f"{FILES}?{urlencode({'purpose': PURPOSE, 'order': 'desc', 'limit': _PAGE} | _after(after))}"


def batches_page(after: str | None) -> str:
    """The path of a page of the batches, the latest first."""
    return f"{BATCHES}?{urlencode({'limit': _PAGE} | _after(after))}"


def _after(last: str | None) -> dict[str, Any]:
    return {} if last is None else {"after": last}


def file_path(file_id: str) -> str:
    return f"{FILES}/{quote(file_id, safe='')}"


def content_path(file_id: str) -> str:
    return f"{file_path(file_id)}/content"


def batch_path(batch_id: str) -> str:
    return f"{BATCHES}/{quote(batch_id, safe='')}"


def cancel_path(batch_id: str) -> str:
    return f"{batch_path(batch_id)}/cancel"


def failure_of(batch: BatchObject) -> str:
    """Why the whole batch failed, in the provider's words; empty where it did not say."""
    errors = (batch.errors.data if batch.errors is not None else None) or []
    return "; ".join(
        f"{error.message or error.code}" + (f" (line {error.line} of its file)" if error.line is not None else "")
        for error in errors[:3]
    )


def usage_of(body: msgspec.Raw) -> tuple[str | None, Usage | None]:
    """The model that answered and what it used, where the body tells."""
    try:
        answer = msgspec.json.decode(body, type=_Answer)
    except msgspec.MsgspecError:
        return None, None
    return answer.model, None if answer.usage is None else answer.usage.read()


def error_of(line: ResultLine) -> LineError | None:
    """Why the request failed: the line's own error, or that within the response; None where it did not fail."""
    if line.error is not None:
        return line.error
    if line.response is None:
        return LineError(message="the provider sent neither a response nor an error", code="malformed_answer")
    if line.response.status_code < 300:
        return None
    try:
        said = msgspec.json.decode(line.response.body, type=_Refused).error or _Refusal()
    except msgspec.MsgspecError:
        said = _Refusal()
    code = str(said.code or said.type or f"status_{line.response.status_code}")
    return LineError(message=said.message or f"status {line.response.status_code}", code=code)
