"""What goes over the wire in the measurements: requests, a whole answer, the frames of a stream. Knows bytes only."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

MODEL = "gpt-4o-mini"
PATH = "/v1/chat/completions"
COUNT = "/count"  # where the upstream tells how many answers it has been asked for
# The pieces of a stream take turns: LiteLLM ends one that says the same a hundred times.
WORDS = (" word", " words")
QUOTED_WORD = b'" word'  # as either stands in a chunk, whichever gateway wrote it
ANSWER_TEXT = "The fox looked at the river for a long time before it answered. " * 3
FAIL = "please fail"  # a prompt with these words is answered with status 500
_SYSTEM = "You are a librarian who answers questions about foxes, rivers and old books, briefly and to the point. "
_QUESTION = "Tell me what the fox in the story said to the river, and why the river did not answer it. "

_COMMON = {"id": "chatcmpl-1", "created": 1_700_000_000, "model": MODEL}
_USAGE = {"prompt_tokens": 200, "completion_tokens": 45, "total_tokens": 245}


def prompt(number: int, remark: str = "") -> list[dict[str, str]]:
    """A conversation of about 900 bytes that no other number has."""
    question = f"Question {number}: {remark} {_QUESTION * 7}"
    return [{"role": "system", "content": _SYSTEM * 2}, {"role": "user", "content": question}]


def requests(
    host: str, headers: Mapping[str, str], *, num_chunks: int | None = None, pace_ms: int | None = None
) -> Callable[[int], bytes]:
    """A maker of whole HTTP requests, each with a prompt of its own. `num_chunks` asks for a stream of that length.

    Everything but the number of the prompt is encoded once, so that the load costs little.
    """
    body: dict[str, object] = {"model": MODEL, "messages": prompt(10**9, f"pace={pace_ms}ms" if pace_ms else "")}
    if num_chunks is not None:
        body |= {"stream": True, "max_tokens": num_chunks}
    return _numbered(host, headers, body)


def repeated_requests(host: str, headers: Mapping[str, str], num_prompts: int) -> Callable[[int], bytes]:
    """Deterministic requests with `num_prompts` prompts in turn, so that an answer may be given again."""
    make = _numbered(host, headers, {"model": MODEL, "messages": prompt(10**9), "temperature": 0})
    made = [make(number) for number in range(num_prompts)]
    return lambda number: made[number % num_prompts]


def failing_requests(host: str, headers: Mapping[str, str]) -> Callable[[int], bytes]:
    """Requests that the upstream answers with status 500."""
    return _numbered(host, headers, {"model": MODEL, "messages": prompt(10**9, FAIL)})


def _numbered(host: str, headers: Mapping[str, str], body: Mapping[str, object]) -> Callable[[int], bytes]:
    data = json.dumps(body, separators=(",", ":")).encode()
    lines = [f"POST {PATH} HTTP/1.1", f"host: {host}", "content-type: application/json", f"content-length: {len(data)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    head = ("\r\n".join(lines) + "\r\n\r\n").encode()
    before, after = (head + data).split(b"%d" % 10**9)
    return lambda number: b"%b%010d%b" % (before, number, after)


def whole_answer() -> bytes:
    """A complete HTTP answer of about 600 bytes."""
    message = {"role": "assistant", "content": ANSWER_TEXT, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    body = {**_COMMON, "object": "chat.completion", "choices": [choice], "usage": _USAGE}
    return _http("200 OK", json.dumps(body).encode())


def failure() -> bytes:
    error = {"message": "the engine has failed", "type": "server_error", "param": None, "code": None}
    return _http("500 Internal Server Error", json.dumps({"error": error}).encode())


def no_models() -> bytes:
    return _http("200 OK", b'{"object":"list","data":[]}')


def number(count: int) -> bytes:
    """The answer to `GET COUNT`."""
    return _http("200 OK", b"%d" % count)


def _http(status: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def stream_begin() -> bytes:
    """The head of a streamed answer and its first chunk, which has the role only."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
    return head + _chunk({"role": "assistant", "content": "", "refusal": None})


def stream_pieces() -> tuple[bytes, ...]:
    """The pieces of text, about 230 bytes each, as OpenAI sends them."""
    return tuple(_chunk({"content": word}) for word in WORDS)


def stream_end(include_usage: bool) -> bytes:
    """The finish reason, the usage if it was asked for, and the end of the stream."""
    end = _chunk({}, "stop")
    if include_usage:
        end += _framed({**_COMMON, "object": "chat.completion.chunk", "choices": [], "usage": _USAGE})
    done = b"data: [DONE]\n\n"
    return end + b"%x\r\n%b\r\n0\r\n\r\n" % (len(done), done)


def _chunk(delta: Mapping[str, object], finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    fingerprint = {"system_fingerprint": "fp_0123456789"}
    return _framed({**_COMMON, "object": "chat.completion.chunk", **fingerprint, "choices": [choice]})


def _framed(chunk: Mapping[str, object]) -> bytes:
    event = b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(event), event)
