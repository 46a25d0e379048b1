"""The tables in docs/dialects.md, and how each provider is asked: for the tests that try every cell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anthropic_reference import check_messages
from fake_ollama import check_body
from openai_upstream import VLLM_FIELDS, complaint

from autobot_llm.dialects.anthropic import requests as anthropic_requests
from autobot_llm.dialects.ollama import requests as ollama_requests
from autobot_llm.dialects.openai import requests as openai_requests
from autobot_llm.providers.vllm.fields import in_words_of
from autobot_llm.types import LLMRequest

PAGE = Path(__file__).parents[1] / "docs" / "dialects.md"

Cells = dict[tuple[str, str], str]


def table(heading: str) -> Cells:
    """The cells of the table below a heading, by row and column."""
    section = PAGE.read_text(encoding="utf-8").partition(f"### {heading}\n")[2].partition("\n#")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")
    ]
    columns, _, *body = rows
    return {(row[0], column): cell for row in body for column, cell in zip(columns[1:], row[1:], strict=True)}


def expected_param(cell: str) -> str | None:
    """The field that a cell says is refused; None where it says yes."""
    if cell == "yes":
        return None
    assert cell.startswith("400 `"), cell
    return cell.removeprefix("400 `").removesuffix("`")


def to_ollama(request: LLMRequest) -> dict[str, Any]:
    path, body = ollama_requests.write_request(request, model="m")
    check_body(path, body)
    return body


def to_openai(flavour: openai_requests.Flavour, request: LLMRequest) -> dict[str, Any]:
    write = openai_requests.write_chat if request.messages is not None else openai_requests.write_completion
    body: dict[str, Any] = json.loads(write(request, "m", flavour))
    assert ("stream_options" in body) is request.stream
    path = openai_requests.CHAT if request.messages is not None else openai_requests.COMPLETIONS
    extra = dict.fromkeys(request.extra_body, Any)  # the server's affair
    if flavour is openai_requests.COMPATIBLE:
        extra |= VLLM_FIELDS | {"messages": list[Any]} | dict.fromkeys(("tools", "response_format"), Any)
    assert complaint(path, body, extra) is None
    return body


def to_anthropic(request: LLMRequest) -> dict[str, Any]:
    body = anthropic_requests.write_request(request, "claude-opus-4-5").body
    check_messages(body)
    return body


PROVIDERS: dict[str, Callable[[LLMRequest], dict[str, Any]]] = {
    "ollama": to_ollama,
    "openai": lambda request: to_openai(openai_requests.OPENAI, request),
    "clouds": lambda request: to_openai(openai_requests.COMPATIBLE, request),
    "vllm": lambda request: to_openai(openai_requests.COMPATIBLE, in_words_of(request, "0.33.0")),
    "anthropic": to_anthropic,
}
