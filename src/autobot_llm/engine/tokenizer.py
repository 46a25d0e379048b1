"""Text to token ids and back, and a conversation to token ids. Knows a model folder's tokenizer files; knows nothing of
sampling or streaming.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import tokenizers

from autobot_llm.engine.chat_template import ChatTemplate, Message
from autobot_llm.errors import InvalidRequestError, ModelLoadError

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

PiecewiseDecoder = Literal["byte_level", "byte_fallback", "plain"]
STREAMABLE_DECODERS = ("ByteLevel", "ByteFallback", "Metaspace", "Fuse", "Replace", "Strip", "WordPiece", "BPEDecoder")


class Tokenizer:
    """A Hugging Face tokenizer.json with the chat template beside it. Immutable, hence thread-safe.

    Special tokens written out in a text ("<|end|>") become those very tokens, as in transformers: whoever puts
    untrusted text into a prompt must know that it can close a turn.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, *, special_tokens: dict[str, str], chat_template: ChatTemplate
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._special_tokens = special_tokens
        self._chat_template = chat_template
        self.decoder_kind = _decoder_kind(backend)
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        """Number of tokens; a model's vocabulary may be padded to more."""
        self.longest_token = max((len(piece) for piece in backend.get_vocab()), default=0)
        """Characters in the longest token: a text has at least its length over this many tokens."""
        self.special_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json and, where they are, tokenizer_config.json, special_tokens_map.json and templates.

        Raises ModelLoadError, naming the file, for a missing or malformed one.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.exists():
            raise ModelLoadError(f"{path}: no such file; only tokenizers in the tokenizers library's format are read")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as exc:  # the library raises plain Exception
            raise ModelLoadError(f"{path}: not a tokenizer: {exc}") from exc
        settings = _read_json(folder / "tokenizer_config.json")
        special_tokens = _special_tokens(_read_json(folder / "special_tokens_map.json") | settings)
        try:
            return cls(
                backend,
                special_tokens=special_tokens,
                chat_template=ChatTemplate.from_folder(folder, settings, special_tokens),
            )
        except _UnknownDecoderError as exc:
            raise ModelLoadError(f"{path}: {exc}") from exc

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest entry of the vocabulary: no token stands for more text."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)))

    @cached_property
    def vocabulary(self) -> dict[int, str]:
        """Every token as the vocabulary writes it, by its id."""
        return {token_id: token for token, token_id in self._backend.get_vocab(with_added_tokens=True).items()}

    @property
    def has_chat_template(self) -> bool:
        """Whether the model says how a conversation is written; a base model does not."""
        return self._chat_template.is_given

    @property
    def tool_template(self) -> str:
        """The text of the chat template that a request with tools is written with."""
        return self._chat_template.tool_source

    def token_id(self, token: str) -> int | None:
        """The token that the vocabulary writes so; None where there is none."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    @property
    def bos_token_id(self) -> int | None:
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._special_id("eos_token")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. `add_special_tokens` puts around it what tokenizer.json's post-processor says, often a
        beginning-of-sequence token (`add_bos_token` beside a tokenizer.json has no effect, as in transformers 5)."""
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (UnicodeEncodeError, TypeError) as exc:  # a lone surrogate is a str, and no text
            raise InvalidRequestError(f"the text cannot be encoded as UTF-8: {exc}", param="prompt") from exc
        return ids

    def encode_with_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text, nothing put around it, and for each the characters [start, end) that it stands for."""
        try:
            encoded = self._backend.encode(text, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError) as exc:
            raise InvalidRequestError(f"the text cannot be encoded as UTF-8: {exc}", param="prompt") from exc
        return encoded.ids, encoded.offsets

    def encode_chat(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer begins (see ChatTemplate.render)."""
        return self.encode(self.render_chat(messages, tools), add_special_tokens=False)

    def render_chat(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> str:
        return self._chat_template.render(messages, tools)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD, ids that are no token nothing."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def piece(self, token_id: int) -> str | None:
        """A token as the vocabulary writes it; None for an id that is no token."""
        piece: str | None = self._backend.id_to_token(token_id)
        return piece

    def token_text(self, token_id: int) -> str:
        """What one token adds to a text that goes before it, for showing log probabilities.

        Part of a character shows as U+FFFD; special tokens show as they are written.
        """
        return self.decode_after_text([token_id], skip_special_tokens=False)

    def decode_after_text(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """What ids add to a text that goes before them: unlike `decode`, a leading space stays."""
        anchor = self._anchor
        whole = self.decode([*anchor.ids, *ids], skip_special_tokens=skip_special_tokens)
        return whole[len(anchor.text) :]

    @cached_property
    def _anchor(self) -> _Anchor:
        """A token that decodes to visible text, to stand for whatever went before."""
        for token_id in range(self.vocab_size):
            if token_id not in self.special_ids:
                text = self.decode([token_id])
                if text.isalnum() and text.isascii():
                    return _Anchor((token_id,), text)
        return _Anchor((), "")

    def _special_id(self, name: str) -> int | None:
        token = self._special_tokens.get(name)
        token_id: int | None = None if token is None else self._backend.token_to_id(token)
        return token_id


class _Anchor:
    __slots__ = ("ids", "text")

    def __init__(self, ids: tuple[int, ...], text: str) -> None:
        self.ids = ids
        self.text = text


class _UnknownDecoderError(Exception):
    pass


def _decoder_kind(backend: tokenizers.Tokenizer) -> PiecewiseDecoder:
    """How text can be put together token by token. `plain`: each token is whole characters."""
    decoder = json.loads(backend.to_str()).get("decoder")
    steps: list[dict[str, Any]] = []
    if decoder is not None:
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    types = [step["type"] for step in steps]
    for step in steps:
        if step["type"] not in STREAMABLE_DECODERS or step.get("stop", 0):
            raise _UnknownDecoderError(
                f"decoder {step['type']!r} cannot be streamed; expected one of {', '.join(STREAMABLE_DECODERS)}, "
                "and Strip only at the start"
            )
    if "ByteLevel" in types:
        if set(types) - {"ByteLevel", "Fuse"}:
            raise _UnknownDecoderError(f"decoder ByteLevel together with {', '.join(types)} is not supported")
        return "byte_level"
    return "byte_fallback" if "ByteFallback" in types else "plain"


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise ModelLoadError(f"{path}: {exc}") from exc
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path}: expected an object")
    return value


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """Special tokens by name; each is written as text or as {"content": text, ...}."""
    found = {}
    for name in SPECIAL_TOKEN_NAMES:
        value = settings.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            found[name] = content
    return found
