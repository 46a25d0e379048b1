"""Turn a conversation into the text a model was trained on. Knows jinja templates; knows nothing of tokens.

A template comes with the model's weights and is code of a kind, so it runs in jinja's immutable sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from autobot_llm.errors import InvalidRequestError, ModelLoadError, UnsupportedError

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"


class Message(Protocol):
    """One turn of a conversation, as OpenAI's API writes it: `content` is text, content parts, or None."""

    @property
    def role(self) -> str: ...

    @property
    def content(self) -> str | list[dict[str, Any]] | None: ...

    @property
    def name(self) -> str | None: ...

    @property
    def tool_calls(self) -> list[dict[str, Any]] | None: ...

    @property
    def tool_call_id(self) -> str | None: ...

    @property
    def reasoning_content(self) -> str | None: ...


class ChatTemplate:
    """A model's templates: `default`, and where there is one `tool_use`, taken when a request brings tools.

    The environment is the one that Hugging Face templates are written for: `raise_exception`, `strftime_now`,
    `tojson`, loop controls, trimmed blocks, and the special tokens by name. Thread-safe: rendering keeps no state.
    """

    def __init__(self, sources: Mapping[str, tuple[str, str]], special_tokens: Mapping[str, str]) -> None:
        """`sources`: name -> (where it was read, for messages; the template's text)."""
        environment = _environment()
        self._special_tokens = dict(special_tokens)
        self._templates: dict[str, jinja2.Template] = {}
        for name, (origin, source) in sources.items():
            try:
                self._templates[name] = environment.from_string(source)
            except jinja2.TemplateSyntaxError as exc:
                raise ModelLoadError(f"{origin}: the chat template is malformed, line {exc.lineno}: {exc}") from exc
        self.tool_source = (sources.get("tool_use") or sources.get("default") or ("", ""))[1]
        """The text of the template that a request with tools is written with; empty where there is none."""
        self._knows_developer = any("developer" in source for _, source in sources.values())

    @classmethod
    def from_folder(
        cls, folder: Path, tokenizer_config: Mapping[str, Any], special_tokens: Mapping[str, str]
    ) -> ChatTemplate:
        """chat_template.jinja, else `chat_template` of tokenizer_config.json: a text, or a list of named ones."""
        sources = _named_sources(folder / "tokenizer_config.json", tokenizer_config.get("chat_template"))
        files = {"default": folder / TEMPLATE_FILE} | {
            path.stem: path for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))
        }
        for name, path in files.items():
            if path.exists():
                try:
                    sources[name] = (str(path), path.read_text(encoding="utf-8"))
                except (OSError, UnicodeDecodeError) as exc:
                    raise ModelLoadError(f"{path}: {exc}") from exc
        return cls(sources, special_tokens)

    @property
    def is_given(self) -> bool:
        """Whether conversations can be rendered at all."""
        return "default" in self._templates

    def render(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> str:
        """The prompt's text, up to where the assistant's answer begins.

        Raises InvalidRequestError with the template's own message where it refuses the conversation (roles that do not
        alternate, say), UnsupportedError for content that is not text.
        """
        if not messages:
            raise InvalidRequestError("messages is empty; expected at least one message", param="messages")
        template = (self._templates.get("tool_use") if tools else None) or self._templates.get("default")
        if template is None:
            raise InvalidRequestError(
                "this model has no chat template; send text to /v1/completions (`prompt`) instead of messages",
                param="messages",
            )
        try:
            return template.render(
                messages=[self._plain(i, message) for i, message in enumerate(messages)],
                tools=tools,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except (UnsupportedError, InvalidRequestError):
            raise
        except Exception as exc:  # the template is foreign code: whatever it raises concerns this conversation
            raise InvalidRequestError(
                f"the model's chat template refused the messages: {exc}", param="messages"
            ) from exc

    def _plain(self, position: int, message: Message) -> dict[str, Any]:
        """One message as templates expect it: no key whose value is None, text content, call arguments as mappings."""
        role = message.role
        if role == "developer" and not self._knows_developer:
            role = "system"  # OpenAI's newer name for it, which older templates do not know
        plain: dict[str, Any] = {"role": role}
        content = plain_text(message.content, f"messages[{position}]")
        if content is not None:
            plain["content"] = content
        for key in ("name", "tool_call_id", "reasoning_content"):
            value = getattr(message, key)
            if value is not None:
                plain[key] = value
        if message.tool_calls is not None:
            plain["tool_calls"] = [_with_parsed_arguments(call) for call in message.tool_calls]
        return plain


def plain_text(content: str | list[dict[str, Any]] | None, place: str) -> str | None:
    """A message's content as text; None stays None. Raises UnsupportedError, naming `place`, for other parts."""
    if content is None or isinstance(content, str):
        return content
    texts = []
    for part in content:
        kind = part.get("type")
        if kind != "text":
            raise UnsupportedError(
                f"{place}.content has a part of type {kind!r}; this model reads only 'text' parts",
                param="messages",
            )
        text = part.get("text")
        if not isinstance(text, str):
            raise InvalidRequestError(
                f"{place}.content has a text part whose text is {text!r}; expected a string",
                param="messages",
            )
        texts.append(text)
    return "".join(texts)


def _with_parsed_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI sends a call's arguments as JSON text; templates write them out as JSON themselves."""
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return dict(call)  # the model's own malformed call is shown to it as it was
    return {**call, "function": {**function, "arguments": arguments}}


def _named_sources(path: Path, value: object) -> dict[str, tuple[str, str]]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": (str(path), value)}
    if isinstance(value, list) and all(
        isinstance(item, dict) and isinstance(item.get("name"), str) and isinstance(item.get("template"), str)
        for item in value
    ):
        return {item["name"]: (str(path), item["template"]) for item in value}
    raise ModelLoadError(f"{path}: chat_template: expected a text, or a list of {{name, template}}")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant said, for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja's own filter escapes for HTML; a prompt must not be."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
