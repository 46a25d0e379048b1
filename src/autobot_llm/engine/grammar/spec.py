"""What an answer must look like, as data: a JSON schema, a regular expression, a list of choices, or a grammar of ours.
Knows limits; knows nothing of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from autobot_llm.errors import InvalidRequestError

# A schema of this size compiles in about 150 ms; a megabyte of required properties takes two seconds.
MAX_SCHEMA_CHARACTERS = 256 * 1024
MAX_SCHEMA_DEPTH = 64
MAX_REGEX_CHARACTERS = 32 * 1024
MAX_CHOICES = 4096

# Where JSON allows any white space, one space or one line end with its indentation: a model that likes blanks would
# else go on with them until max_tokens.
WHITESPACE = r"[ ]|\n[ ]{0,24}"

Kind = Literal["json_schema", "regex", "lark"]


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """One grammar. `source` is the schema's JSON, the expression, or a grammar in llguidance's dialect of Lark."""

    kind: Kind
    source: str

    @classmethod
    def json_object(cls) -> GrammarSpec:
        """Any JSON object."""
        return cls("json_schema", schema_source({"type": "object"}, "response_format"))

    @classmethod
    def json_schema(cls, schema: object, field: str) -> GrammarSpec:
        """What `schema` describes. Raises InvalidRequestError, naming `field`, for one that is no object or too big."""
        return cls("json_schema", schema_source(schema, field))

    @classmethod
    def regex(cls, expression: object, field: str) -> GrammarSpec:
        """Text that the whole of `expression` matches."""
        if not isinstance(expression, str) or not expression:
            raise InvalidRequestError(f"{field}: expected a regular expression that is not empty", param=field)
        if len(expression) > MAX_REGEX_CHARACTERS:
            raise InvalidRequestError(
                f"{field}: {len(expression):,} characters; expected at most {MAX_REGEX_CHARACTERS:,}", param=field
            )
        return cls("regex", expression)

    @classmethod
    def choice(cls, choices: object, field: str) -> GrammarSpec:
        """One of some texts."""
        if not isinstance(choices, Sequence) or isinstance(choices, str) or not choices:
            raise InvalidRequestError(f"{field}: expected a list of texts", param=field)
        if not all(isinstance(text, str) and text for text in choices):
            raise InvalidRequestError(f"{field}: expected texts that are not empty", param=field)
        if len(choices) > MAX_CHOICES or sum(map(len, choices)) > MAX_SCHEMA_CHARACTERS:
            raise InvalidRequestError(
                f"{field}: expected at most {MAX_CHOICES:,} texts of {MAX_SCHEMA_CHARACTERS:,} characters in all",
                param=field,
            )
        return cls("lark", "start: " + " | ".join(literal(text) for text in dict.fromkeys(choices)))

    @classmethod
    def lark(cls, source: str, field: str) -> GrammarSpec:
        """A grammar of our own making. Raises InvalidRequestError where what the request put into it is too big."""
        _check_size(source, field)
        return cls("lark", source)


def schema_source(schema: object, field: str) -> str:
    """A schema as JSON text, its keys in their order, with our white space. Raises InvalidRequestError."""
    if not isinstance(schema, Mapping):
        raise InvalidRequestError(f"{field}: expected a JSON schema, which is an object", param=field)
    try:
        source = json.dumps({**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"{field}: not a JSON schema: {error}", param=field) from error
    except RecursionError:
        raise _too_deep(field) from None
    _check_size(source, field)
    if _nests_deeper(schema, MAX_SCHEMA_DEPTH):
        raise _too_deep(field)
    return source


def _check_size(source: str, field: str) -> None:
    if len(source) > MAX_SCHEMA_CHARACTERS:
        raise InvalidRequestError(
            f"{field}: {len(source):,} characters; expected at most {MAX_SCHEMA_CHARACTERS:,}", param=field
        )


def _too_deep(field: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field}: nested more than {MAX_SCHEMA_DEPTH} levels deep", param=field)


def literal(text: str) -> str:
    """A text as the grammar writes it."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _nests_deeper(value: object, num_levels: int) -> bool:
    level: list[object] = [value]
    for _ in range(num_levels + 1):
        level = [
            child
            for item in level
            if isinstance(item, Mapping | list | tuple)
            for child in (item.values() if isinstance(item, Mapping) else item)
        ]
        if not level:
            return False
    return True
