"""Read texts and conversations as prompts for a model. Knows files and the chat template; knows no tensor.

A JSON-lines file holds `messages` or `prompt`, and may name a `category`. Any other file is text, packed by xz or gzip
or plain, whose documents end with the model's end-of-text token, written out. Where a document holds conversations in
the model's own chat format, each of its answers becomes one prompt: all that goes before it. Of other documents a part
of random length is one.
"""

from __future__ import annotations

import gzip
import json
import lzma
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autobot_llm.engine.tokenizer import Tokenizer
from autobot_llm.errors import ConfigurationError

FEWEST_TOKENS, MOST_TOKENS = 16, 256  # of a prompt that is cut out of a plain document
_MARK = "\x00"


@dataclass(frozen=True, slots=True)
class Prompt:
    ids: tuple[int, ...]
    category: str


@dataclass(frozen=True, slots=True)
class _Turn:
    role: str
    content: str
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


def read_prompts(
    paths: Sequence[Path], tokenizer: Tokenizer, *, num_prompts: int | None, max_tokens: int, seed: int
) -> list[Prompt]:
    """Up to `num_prompts` prompts of at most `max_tokens`, the files in equal parts; longer ones are left out.

    The category is the one that is named, else the file's name. Raises ConfigurationError for a file that cannot be
    read or holds no prompt.
    """
    found: list[Prompt] = []
    for number, path in enumerate(paths):
        share = None if num_prompts is None else (num_prompts - len(found)) // (len(paths) - number)
        chooser = random.Random(f"{seed} {number}")
        made = list(_limited(_prompts_of(path, tokenizer, chooser, max_tokens), share))
        if not made:
            raise ConfigurationError(f"{path}: no prompt of at most {max_tokens} tokens in it")
        found += made
    return found


def _limited(prompts: Iterator[Prompt], most: int | None) -> Iterator[Prompt]:
    for number, prompt in enumerate(prompts):
        if most is not None and number >= most:
            return
        yield prompt


def _prompts_of(path: Path, tokenizer: Tokenizer, chooser: random.Random, max_tokens: int) -> Iterator[Prompt]:
    text = _read(path)
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                prompt = _of_line(f"{path}: line {number}", line, tokenizer, path.stem)
                if 0 < len(prompt.ids) <= max_tokens:
                    yield prompt
        return
    category = path.name.split(".")[0]
    ending = _end_of_text(tokenizer)
    documents = [document for document in (text.split(ending) if ending else [text]) if document.strip()]
    chooser.shuffle(documents)
    header = _answer_header(tokenizer)
    for document in documents:
        parts = document.split(header) if header else [document]
        if len(parts) == 1:
            yield from _cut_out(document, tokenizer, chooser, max_tokens, category)
            continue
        before = ""
        for part in parts[:-1]:
            before += part + header
            ids = tokenizer.encode(before.lstrip(), add_special_tokens=False)
            if len(ids) > max_tokens:
                break
            yield Prompt(tuple(ids), category)


def _cut_out(
    document: str, tokenizer: Tokenizer, chooser: random.Random, max_tokens: int, category: str
) -> Iterator[Prompt]:
    """Parts of a plain document, each begun where a paragraph ends, at most half of it in the next one too."""
    most = min(MOST_TOKENS, max_tokens)
    paragraphs = document.split("\n\n")
    start = 0
    while start < len(paragraphs):
        text, following = "", start
        while following < len(paragraphs) and len(text) < 4 * MOST_TOKENS:
            text += paragraphs[following] + "\n\n"
            following += 1
        ids = tokenizer.encode(text[: 8 * MOST_TOKENS], add_special_tokens=False)
        length = chooser.randint(min(FEWEST_TOKENS, most), most)
        if len(ids) >= length:
            yield Prompt(tuple(ids[:length]), category)
        start += max(1, (following - start) // 2)


def _of_line(where: str, line: str, tokenizer: Tokenizer, category: str) -> Prompt:
    try:
        value = json.loads(line)
        name = str(value.get("category", category))
        if "messages" in value:
            turns = [_Turn(str(turn["role"]), str(turn["content"])) for turn in value["messages"]]
            return Prompt(tuple(tokenizer.encode_chat(turns)), name)
        return Prompt(tuple(tokenizer.encode(str(value["prompt"]))), name)
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ConfigurationError(f"{where}: expected an object with messages or prompt: {exc!r}") from exc


def _end_of_text(tokenizer: Tokenizer) -> str:
    """How the end of a document is written: the beginning-of-sequence token where it has that name, else the end's."""
    pieces = [tokenizer.piece(i) for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    named = [piece for piece in pieces if piece is not None and "end" in piece]
    return next(iter(named or [piece for piece in pieces if piece]), "")


def _answer_header(tokenizer: Tokenizer) -> str:
    """What stands between a user's text and the answer in the model's chat format; empty for a base model."""
    if not tokenizer.has_chat_template:
        return ""
    return tokenizer.render_chat([_Turn("user", _MARK)]).partition(_MARK)[2]


def _read(path: Path) -> str:
    openers: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}
    try:
        with openers.get(path.suffix, open)(path, "rb") as file:
            text: str = file.read().decode("utf-8")
            return text
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"{path}: cannot be read as text: {exc}") from exc
