"""An Ollama that behaves as documented, on a free port of this machine, and can be told to misbehave.

It checks every request it gets against the documented API (`check_body`), loads a model anew when its `num_ctx`
changes, as Ollama does, and remembers what it was asked. It answers with the words of the last message.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

LOAD_SECONDS = 2.0  # what a load is said to take; nobody waits
DEFAULT_NUM_CTX = 4096
TRAINED_CONTEXT = 32768

TEXT, NUMBER, WHOLE, FLAG, OBJECT, TEXTS = str, (int, float), int, bool, dict, list
_OPTIONS: dict[str, Any] = {
    "seed": WHOLE, "temperature": NUMBER, "top_k": WHOLE, "top_p": NUMBER, "min_p": NUMBER, "stop": (str, list),
    "num_ctx": WHOLE, "num_predict": WHOLE, "repeat_penalty": NUMBER, "repeat_last_n": WHOLE, "num_keep": WHOLE,
    "presence_penalty": NUMBER, "frequency_penalty": NUMBER, "typical_p": NUMBER, "mirostat": WHOLE,
}  # fmt: skip
_COMMON: dict[str, Any] = {
    "model": TEXT, "stream": FLAG, "format": (str, dict), "options": OBJECT, "think": (bool, str),
    "keep_alive": (str, int, float), "truncate": FLAG, "shift": FLAG, "logprobs": FLAG, "top_logprobs": WHOLE,
}  # fmt: skip
_BODIES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "/api/chat": (_COMMON | {"messages": list, "tools": list}, {"model", "messages"}),
    "/api/generate": (_COMMON | {"prompt": TEXT, "suffix": TEXT, "images": list, "raw": FLAG}, {"model"}),
    "/api/embed": (
        {"model": TEXT, "input": (str, list), "truncate": FLAG, "dimensions": WHOLE, "keep_alive": (str, int, float),
         "options": OBJECT},
        {"model", "input"},
    ),
    "/api/show": ({"model": TEXT}, {"model"}),
    "/api/pull": ({"model": TEXT, "stream": FLAG}, {"model"}),
}  # fmt: skip
_MESSAGE: dict[str, Any] = {
    "role": TEXT, "content": TEXT, "thinking": TEXT, "images": list, "tool_calls": list, "tool_name": TEXT,
    "tool_call_id": TEXT,
}  # fmt: skip


class NotOfTheApi(AssertionError):
    """A request that the documented API does not have."""


def check_body(path: str, body: dict[str, Any]) -> None:
    """Raise NotOfTheApi unless `body` is one that the documentation of `path` describes."""
    fields, required = _BODIES[path]
    _check_fields(path, body, fields)
    if missing := required - body.keys():
        raise NotOfTheApi(f"{path}: {missing} missing")
    _check_fields(f"{path} options", body.get("options", {}), _OPTIONS)
    if isinstance(body.get("format"), str) and body["format"] != "json":
        raise NotOfTheApi(f"{path}: format {body['format']!r}")
    if isinstance(body.get("think"), str) and body["think"] not in ("low", "medium", "high"):
        raise NotOfTheApi(f"{path}: think {body['think']!r}")
    if body.get("raw") and "suffix" in body:
        raise NotOfTheApi(f"{path}: raw and suffix")
    for message in body.get("messages", ()):
        _check_message(path, message)
    for tool in body.get("tools", ()):
        function = tool["function"]
        if tool["type"] != "function" or not isinstance(function["name"], str) or "strict" in function:
            raise NotOfTheApi(f"{path}: tool {tool}")


def _check_message(path: str, message: dict[str, Any]) -> None:
    _check_fields(f"{path} message", message, _MESSAGE)
    if message["role"] not in ("system", "user", "assistant", "tool") or "content" not in message:
        raise NotOfTheApi(f"{path}: message {message}")
    for call in message.get("tool_calls", ()):
        if not isinstance(call["function"]["arguments"], dict):
            raise NotOfTheApi(f"{path}: arguments {call}")
    if message["role"] == "tool" and "tool_name" not in message:
        raise NotOfTheApi(f"{path}: a result without its tool's name")


def _check_fields(where: str, given: dict[str, Any], known: dict[str, Any]) -> None:
    for name, value in given.items():
        if name not in known:
            raise NotOfTheApi(f"{where}: unknown field {name!r}")
        kind = known[name]
        is_flag = isinstance(value, bool)
        if not isinstance(value, kind) or (is_flag and kind is not FLAG and FLAG not in (kind if isinstance(kind, tuple) else ())):  # fmt: skip  # noqa: E501
            raise NotOfTheApi(f"{where}: {name}={value!r}")


@dataclass
class Model:
    """A model on the fake's disk."""

    quantization: str = "Q4_K_M"
    size: int = 4_400_000_000
    num_parameters: int = 7_248_023_552
    context_length: int = TRAINED_CONTEXT
    parameters: str = 'stop "[INST]"'
    capabilities: tuple[str, ...] = ("completion", "tools")


Lines = Callable[[dict[str, Any]], Iterable[Any]]  # a request's body -> lines, as objects or as raw bytes


@dataclass
class FakeOllama:
    """One server. `num_loads` counts loads by model; `script` replaces what it answers."""

    models: dict[str, Model] = field(default_factory=lambda: {"mistral:7b": Model()})
    version: str = "0.40.0"
    script: Lines | None = None
    expires_at: str = "2026-01-01T00:00:00Z"
    tells_cached: bool = True
    breaks_off: bool = False  # end the connection after the script, without the body's end
    hangs: bool = False  # say nothing after the script, until the client leaves
    authorization: str | None = None  # what a proxy in front of it demands
    refusal: tuple[int, str] | None = None  # a status and a sentence for every request for work
    url: str = ""
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    broken_rules: list[str] = field(default_factory=list)
    loaded: dict[str, int] = field(default_factory=dict)
    num_loads: dict[str, int] = field(default_factory=dict)
    num_connections: int = 0
    client_left: asyncio.Event = field(default_factory=asyncio.Event)

    def asked(self, path: str) -> list[dict[str, Any]]:
        return [body for asked_path, body in self.requests if asked_path == path]

    # HTTP, as little as is needed

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                method, path, _ = head.split(b"\r\n")[0].decode().split(" ")
                lengths = [
                    line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
                ]
                data = await reader.readexactly(int(lengths[0])) if lengths else b""
                wanted = f"authorization: {self.authorization}".encode() if self.authorization else b""
                if wanted not in head:
                    writer.write(b"HTTP/1.1 401 X\r\ncontent-length: 0\r\n\r\n")
                elif not await self._reply(method, path, data, reader, writer):
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            self.client_left.set()
        finally:
            writer.close()

    async def _reply(
        self, method: str, path: str, data: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        body = json.loads(data) if data else {}
        self.requests.append((path, body))
        if method == "POST":
            try:
                check_body(path, body)
            except NotOfTheApi as exc:
                self.broken_rules.append(str(exc))
        status, lines = self._answer(path, body)
        if body.get("stream", method == "POST" and path != "/api/show") is False or status != 200 or method == "GET" or path in ("/api/show", "/api/embed"):  # fmt: skip  # noqa: E501
            text = json.dumps(next(iter(lines))).encode()
            writer.write(b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (status, len(text)) + text)  # fmt: skip  # noqa: E501
            await writer.drain()
            return True
        return await self._stream(lines, reader, writer)

    async def _stream(self, lines: Iterable[Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n")
        for line in lines:
            data = line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode() + b"\n"
            for piece in (data[: len(data) // 2], data[len(data) // 2 :]):  # no boundary can be relied on
                if piece:
                    writer.write(b"%x\r\n" % len(piece) + piece + b"\r\n")
                    await writer.drain()
        if self.hangs:
            await reader.read()
            self.client_left.set()
            return False
        if self.breaks_off:
            writer.transport.abort()
            return False
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    # Ollama

    def _answer(self, path: str, body: dict[str, Any]) -> tuple[int, Iterable[Any]]:
        if path == "/api/version":
            return 200, [{"version": self.version}]
        if path == "/api/tags":
            return 200, [{"models": [self._tag(name) for name in self.models]}]
        if path == "/api/ps":
            return 200, [{"models": [self._process(name) for name in self.loaded]}]
        model = body["model"]
        if path == "/api/pull":
            return 200, self._pull(model)
        if model not in self.models:
            return 404, [{"error": f"model '{model}' not found"}]
        if path == "/api/show":
            return 200, [self._show(self.models[model])]
        if self.refusal is not None:
            return self.refusal[0], [{"error": self.refusal[1]}]
        load = self._load(model, body)
        if path == "/api/embed":
            texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
            vectors = [[float(len(text)), 1.0] for text in texts]
            return 200, [{"model": model, "embeddings": vectors, "prompt_eval_count": 3 * len(texts)}]
        if path == "/api/generate" and not body.get("prompt"):
            return 200, [
                {"model": model, "done": True, "done_reason": "unload" if body.get("keep_alive") == 0 else "load"}
            ]
        return 200, self.script(body) if self.script is not None else self.words(path, body, load)

    def _load(self, model: str, body: dict[str, Any]) -> float:
        """Have the model in memory as the request wants it, and give the seconds that took."""
        wanted = min(body.get("options", {}).get("num_ctx", self.loaded.get(model, DEFAULT_NUM_CTX)), TRAINED_CONTEXT)
        if body.get("keep_alive") == 0:
            self.loaded.pop(model, None)
            return 0.0
        if self.loaded.get(model) == wanted:
            return 0.02
        self.loaded[model] = wanted
        self.num_loads[model] = self.num_loads.get(model, 0) + 1
        return LOAD_SECONDS

    def words(self, path: str, body: dict[str, Any], load: float) -> list[Any]:
        text = body["messages"][-1]["content"] if path == "/api/chat" else body["prompt"]
        words = text.split(" ")
        pieces = [word + " " for word in words[:-1]] + words[-1:]
        lines = [self.line(path, piece) for piece in pieces]
        return [*lines, self.line(path, "") | self.ending(len(text) // 4 + 8, len(pieces), load=load)]

    def line(self, path: str, text: str, **more: Any) -> dict[str, Any]:
        content = (
            {"message": {"role": "assistant", "content": text, **more}} if path == "/api/chat" else {"response": text}
        )
        return {"model": "m", "created_at": "2026-11-25T19:00:00.123456789Z", **content, "done": False}

    def ending(
        self, num_prompt_tokens: int, num_tokens: int, *, load: float = 0.02, reason: str = "stop"
    ) -> dict[str, Any]:
        cached = {"prompt_eval_cached_count": num_prompt_tokens // 2} if self.tells_cached else {}
        return {
            "done": True, "done_reason": reason, "total_duration": round((load + 0.5) * 1e9),
            "load_duration": round(load * 1e9), "prompt_eval_count": num_prompt_tokens, **cached,
            "prompt_eval_duration": 125_000_000, "eval_count": num_tokens, "eval_duration": 250_000_000,
        }  # fmt: skip

    def _tag(self, name: str) -> dict[str, Any]:
        model = self.models[name]
        details = {
            "format": "gguf", "family": "llama", "families": ["llama"], "parameter_size": "7.2B",
            "quantization_level": model.quantization,
        }  # fmt: skip
        stamp = "2026-05-04T17:37:44.706015396-07:00"
        return {
            "name": name,
            "model": name,
            "modified_at": stamp,
            "size": model.size,
            "digest": "f974",
            "details": details,
        }

    def _process(self, name: str) -> dict[str, Any]:
        return self._tag(name) | {"size_vram": 5, "expires_at": self.expires_at, "context_length": self.loaded[name]}

    def _show(self, model: Model) -> dict[str, Any]:
        info = {
            "general.architecture": "llama",
            "general.parameter_count": model.num_parameters,
            "llama.context_length": model.context_length,
        }
        return {
            "modelfile": "FROM x", "parameters": model.parameters, "template": "{{ .Prompt }}",
            "details": {"family": "llama", "quantization_level": model.quantization}, "model_info": info,
            "capabilities": list(model.capabilities),
        }  # fmt: skip

    def _pull(self, model: str) -> Iterable[Any]:
        if "nowhere" in model:
            yield {"status": "pulling manifest"}
            yield {"error": "pull model manifest: file does not exist"}
            return
        yield {"status": "pulling manifest"}
        yield {"status": "pulling f974", "digest": "f974", "total": 100, "completed": 50}
        self.models[model] = Model()
        yield {"status": "success"}


def reserved() -> socket.socket:
    """A free port that nobody listens on yet: who connects is refused."""
    reserved = socket.socket()
    reserved.bind(("127.0.0.1", 0))
    return reserved


def url_of(listener: Any) -> str:
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextlib.asynccontextmanager
async def running_ollama(
    ollama: FakeOllama | None = None, *, listener: socket.socket | None = None, **more: Any
) -> AsyncIterator[FakeOllama]:
    """A fake on a free port, or a reserved one; afterwards, every request must have been one of the documented API."""
    ollama = ollama or FakeOllama(**more)
    tasks: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await ollama.connected(reader, writer)
        finally:
            tasks.discard(task)

    server = await asyncio.start_server(connected, sock=listener or reserved())
    ollama.url = url_of(server.sockets[0])
    try:
        yield ollama
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()
    assert ollama.broken_rules == []
