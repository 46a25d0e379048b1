"""What Anthropic's public reference says of a request to `/v1/messages`: a checker to be pointed at what we send.

Written from https://platform.claude.com/docs/en/api/messages/create, /api/versioning, /api/migration-2026-10-21 and
/build-with-claude/prompt-caching. Stricter than the service where it is silent: an unknown key is a violation.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import Any

SAMPLING = {"temperature", "top_p", "top_k"}
FIELDS = {
    "cache_control",
    "max_tokens",
    "messages",
    "metadata",
    "model",
    "output_config",
    "service_tier",
    "speed",
    "stop_sequences",
    "stream",
    "system",
    "thinking",
    "tool_choice",
    "tools",
}
COUNT_FIELDS = {"cache_control", "messages", "model", "output_config", "system", "thinking", "tool_choice", "tools"}
TOOL_FIELDS = {"type", "name", "description", "input_schema", "strict", "cache_control", "eager_input_streaming"}
BLOCK_FIELDS = {
    "text": {"type", "text", "cache_control"},
    "image": {"type", "source", "cache_control"},
    "document": {"type", "source", "title", "context", "citations", "cache_control"},
    "tool_use": {"type", "id", "name", "input", "cache_control"},
    "tool_result": {"type", "tool_use_id", "content", "is_error", "cache_control"},
    "thinking": {"type", "thinking", "signature"},
    "redacted_thinking": {"type", "data"},
}
BLOCKS_OF_ROLE = {
    "user": {"text", "image", "document", "tool_result"},
    "assistant": {"text", "tool_use", "thinking", "redacted_thinking"},
    "system": {"text"},
}
BETA_OF_FIELD = {"speed": "fast-mode-2026-02-01"}
MAX_MARKS = 4


class Violation(AssertionError):
    """The request is not as documented."""


def require(condition: object, what: str) -> None:
    if not condition:
        raise Violation(what)


def check_headers(headers: Mapping[str, str], body: Mapping[str, Any], api_key: str | None) -> None:
    require(headers.get("x-api-key") == api_key, "x-api-key is missing or wrong")
    require(headers.get("content-type") == "application/json", "content-type is not application/json")
    version = headers.get("anthropic-version")
    require(version in ("2023-06-01", "2026-10-21"), f"anthropic-version {version!r} does not exist")
    if version == "2026-10-21":
        require(not SAMPLING & body.keys(), f"{SAMPLING & body.keys()}: Extra inputs are not permitted")
    betas = set(filter(None, headers.get("anthropic-beta", "").split(",")))
    require(betas == {BETA_OF_FIELD[field] for field in BETA_OF_FIELD.keys() & body.keys()}, f"betas {betas}")


def check_count(body: Any) -> None:
    """`POST /v1/messages/count_tokens`."""
    require(isinstance(body, dict), "the body is not an object")
    require(body.keys() <= COUNT_FIELDS, f"{body.keys() - COUNT_FIELDS}: Extra inputs are not permitted")
    _check_prompt(body)


def check_messages(body: Any) -> None:
    """`POST /v1/messages`."""
    require(isinstance(body, dict), "the body is not an object")
    require(body.keys() <= FIELDS | SAMPLING, f"{body.keys() - FIELDS - SAMPLING}: Extra inputs are not permitted")
    require(isinstance(body.get("max_tokens"), int) and body["max_tokens"] >= 1, "max_tokens: at least 1")
    require(isinstance(body.get("stream", False), bool), "stream: a boolean")
    for name in ("temperature", "top_p"):
        require(0 <= body.get(name, 0) <= 1, f"{name}: from 0 to 1")
    require(body.get("top_k", 0) >= 0, "top_k: at least 0")
    stops = body.get("stop_sequences", [])
    require(all(isinstance(stop, str) and stop.strip() for stop in stops), "stop_sequences: texts, not blank")
    metadata = body.get("metadata", {})
    require(metadata.keys() <= {"user_id"}, "metadata: only user_id")
    _check_prompt(body)


def _check_prompt(body: dict[str, Any]) -> None:
    require(isinstance(body.get("model"), str) and body["model"], "model: a name")
    for i, tool in enumerate(body.get("tools", ())):
        _check_tool(f"tools[{i}]", tool)
    if "tool_choice" in body:
        _check_tool_choice(body["tool_choice"], {tool["name"] for tool in body["tools"]})
    if isinstance(body.get("system"), list):
        for i, block in enumerate(body["system"]):
            _check_block(f"system[{i}]", block, {"text"})
    _check_turns(body["messages"])
    config = body.get("output_config", {})
    require(config.keys() <= {"effort", "format"}, "output_config: effort and format")
    require(config.get("effort", "low") in ("low", "medium", "high", "xhigh", "max"), "output_config.effort")
    if "format" in config:
        require(config["format"].keys() == {"type", "schema"}, "output_config.format: type and schema")
        require(config["format"]["type"] == "json_schema", "output_config.format.type: json_schema")
        require(isinstance(config["format"]["schema"], dict), "output_config.format.schema: an object")
    require(_num_marks(body) <= MAX_MARKS, f"a maximum of {MAX_MARKS} blocks with cache_control may be provided")


def _check_tool(place: str, tool: dict[str, Any]) -> None:
    if tool.get("type", "custom") != "custom":
        return
    require(tool.keys() <= TOOL_FIELDS, place)
    require(re.fullmatch(r"[a-zA-Z0-9_-]{1,128}", tool.get("name", "")), f"{place}.name")
    require(isinstance(tool.get("input_schema"), dict), f"{place}.input_schema: required")
    require(tool["input_schema"].get("type") == "object", f"{place}.input_schema.type: object")
    _check_mark(place, tool)


def _check_tool_choice(choice: dict[str, Any], names: set[str]) -> None:
    kind = choice.get("type")
    require(kind in ("auto", "any", "tool", "none"), f"tool_choice.type {kind!r}")
    allowed = {"type"} | ({"disable_parallel_tool_use"} if kind != "none" else set())
    require(choice.keys() <= allowed | ({"name"} if kind == "tool" else set()), "tool_choice: unknown field")
    require(kind != "tool" or choice.get("name") in names, "tool_choice.name: not among the tools")


def _check_turns(turns: Any) -> None:
    require(isinstance(turns, list) and turns, "messages: at least one message is required")
    pending: set[str] = set()
    for i, turn in enumerate(turns):
        place = f"messages.{i}"
        require(turn.keys() == {"role", "content"}, f"{place}: role and content")
        role, content = turn["role"], turn["content"]
        require(role in BLOCKS_OF_ROLE, f"{place}.role {role!r}")
        require(
            role != "system" or (i > 0 and turns[i - 1]["role"] == "user"), f"{place}: system after a user turn only"
        )
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        require(blocks, f"{place}: content must be non-empty")
        for j, block in enumerate(blocks):
            _check_block(f"{place}.content.{j}", block, BLOCKS_OF_ROLE[role])
        kinds = [block["type"] for block in blocks]
        results = {block["tool_use_id"] for block in blocks if block["type"] == "tool_result"}
        require(results == pending, f"{place}: each tool_use must have its tool_result in the next message")
        num_results = kinds.count("tool_result")
        require(kinds[:num_results] == ["tool_result"] * num_results, f"{place}: tool_result blocks come first")
        pending = {block["id"] for block in blocks if block["type"] == "tool_use"}


def _check_block(place: str, block: dict[str, Any], allowed: set[str]) -> None:
    kind = block.get("type")
    require(kind in allowed, f"{place}.type {kind!r}, expected {sorted(allowed)}")
    require(block.keys() <= BLOCK_FIELDS[kind], f"{place}: {block.keys() - BLOCK_FIELDS[kind]} not permitted")
    _check_mark(place, block)
    match kind:
        case "text":
            require(isinstance(block["text"], str) and block["text"], f"{place}: text content blocks must be non-empty")
        case "image":
            _check_image(f"{place}.source", block["source"])
        case "tool_use":
            require(re.fullmatch(r"[a-zA-Z0-9_-]+", block["id"]), f"{place}.id")
            require(isinstance(block["name"], str) and isinstance(block["input"], dict), place)
        case "tool_result":
            require(re.fullmatch(r"[a-zA-Z0-9_-]+", block["tool_use_id"]), f"{place}.tool_use_id")
            content = block.get("content", "")
            for j, inner in enumerate([] if isinstance(content, str) else content):
                _check_block(f"{place}.content.{j}", inner, {"text", "image", "document"})
        case "thinking":
            require(isinstance(block["thinking"], str) and block["signature"], f"{place}.signature: required")


def _check_image(place: str, source: dict[str, Any]) -> None:
    if source.get("type") == "url":
        require(source.keys() == {"type", "url"} and source["url"].startswith("https://"), place)
        return
    require(source.keys() == {"type", "media_type", "data"} and source["type"] == "base64", place)
    require(source["media_type"] in ("image/jpeg", "image/png", "image/gif", "image/webp"), f"{place}.media_type")
    base64.b64decode(source["data"], validate=True)


def _check_mark(place: str, block: dict[str, Any]) -> None:
    mark = block.get("cache_control")
    if mark is not None:
        require(mark.get("type") == "ephemeral" and mark.get("ttl", "5m") in ("5m", "1h"), f"{place}.cache_control")


def _num_marks(value: Any) -> int:
    if isinstance(value, list):
        return sum(map(_num_marks, value))
    if isinstance(value, dict):
        return ("cache_control" in value) + sum(map(_num_marks, value.values()))
    return 0
