"""Say a request in the words of one release of vLLM. Knows which release has which field; knows no connection.

vLLM ignores a field that it does not know, so the ones of the caller's own (`extra_body`) are looked up first.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

from msgspec.structs import replace

from autobot_llm.errors import ConfigurationError, InvalidRequestError, UnsupportedError
from autobot_llm.tuning.knobs.versions import ALWAYS, Span, Spans, holds, is_before, reading_of
from autobot_llm.tuning.knobs.vllm import READ
from autobot_llm.types import LLMRequest


def _since(version: str) -> Spans:
    return (Span(since=version),)


_UNTIL_0_12: Spans = (Span(gone_by="0.12.0"),)
STRUCTURED = "structured_outputs"
# The fields of chat and completions that OpenAI does not have, read from the releases.
_BOTH: dict[str, Spans] = {
    **dict.fromkeys(
        (
            "add_special_tokens", "allowed_token_ids", "echo", "include_stop_str_in_output", "length_penalty",
            "prompt_logprobs", "return_tokens_as_token_ids", "skip_special_tokens", "spaces_between_special_tokens",
            "truncate_prompt_tokens", "use_beam_search",
        ),
        ALWAYS,
    ),
    "kv_transfer_params": _since("0.9.0.1"),
    "request_id": ALWAYS,
    "vllm_xargs": _since("0.10.0"),
    "return_token_ids": _since("0.10.2"),
    "repetition_detection": _since("0.18.1"),
    "thinking_token_budget": _since("0.22.1"),
    "truncation_side": _since("0.22.1"),
    "logprob_token_ids": _since("0.26.0"),
    "ec_transfer_params": _since("0.26.0"),
    "session_id": _since("0.30.0"),
    "stream_interval": _since("0.30.0"),
    "watermarking": _since("0.30.0"),
    "return_weight_versions": _since("0.33.0"),
    "best_of": _UNTIL_0_12,
    "logits_processors": (Span(gone_by="0.18.1"),),
    "guided_decoding_backend": _UNTIL_0_12,
}  # fmt: skip
CHAT_FIELDS: dict[str, Spans] = _BOTH | {
    **dict.fromkeys(
        (
            "add_generation_prompt", "chat_template", "chat_template_kwargs", "continue_final_message", "documents",
            "mm_processor_kwargs", "parallel_tool_calls",
        ),
        ALWAYS,
    ),
    "allowed_token_ids": _since("0.10.0"),
    "bad_words": _since("0.10.0"),
    "cache_salt": _since("0.9.0.1"),
    "reasoning_effort": _since("0.10.1.1"),
    "include_reasoning": _since("0.10.1.1"),
    "media_io_kwargs": _since("0.18.1"),
    "return_prompt_text": _since("0.22.1"),
    "structural_tag": _UNTIL_0_12,
}  # fmt: skip
COMPLETION_FIELDS: dict[str, Spans] = _BOTH | {
    "suffix": ALWAYS,
    "request_id": _since("0.10.1.1"),
    "cache_salt": _since("0.10.0"),
    "prompt_embeds": _since("0.9.0.1"),
    "bad_words": _since("0.26.0"),
}
# What binds an answer's form: the name of each in `structured_outputs`, and the older field of its own.
_GUIDED = {
    "json": "guided_json",
    "regex": "guided_regex",
    "choice": "guided_choice",
    "grammar": "guided_grammar",
    "whitespace_pattern": "guided_whitespace_pattern",
}
_STRUCTURED_OF = {old: new for new, old in _GUIDED.items()}
_HAS_STRUCTURED = _since("0.11.0")


@functools.lru_cache(maxsize=32)
def _release(version: str | None) -> tuple[str, bool]:
    """The read release that answers for the version, and whether the version is newer than all of them."""
    if version is None:
        return READ[-1], False
    try:
        return reading_of(version, READ, "vllm").release, is_before(READ[-1], version)
    except ConfigurationError:
        return READ[-1], False


def in_words_of(request: LLMRequest, version: str | None) -> LLMRequest:
    """The request as that release takes it; None stands for today's.

    The tenant becomes the salt of vLLM's prefix cache, so that one can neither hit nor time another's prefixes.
    Raises UnsupportedError for a field of `extra_body` that the release does not have.
    """
    if not request.extra_body and not request.tenant:
        return request
    release, is_newer = _release(version)
    known = CHAT_FIELDS if request.messages is not None else COMPLETION_FIELDS
    extra: dict[str, Any] = {}
    structured: dict[str, Any] = {}
    for name, value in request.extra_body.items():
        if name in _STRUCTURED_OF:
            structured[_STRUCTURED_OF[name]] = value
        elif name == STRUCTURED:
            structured |= _object(value)
        elif is_newer or holds(known.get(name, ()), release):
            extra[name] = value
        else:
            raise UnsupportedError(f"{name}: vLLM {version or release} has no such field", param=name)
    if structured:
        extra |= _structured(structured, release)
    if request.tenant and holds(known["cache_salt"], release):
        extra["cache_salt"] = salt_of(request.tenant, str(extra.get("cache_salt", "")))
    return replace(request, extra_body=extra)


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{STRUCTURED}: expected an object", param=STRUCTURED)
    return value


def _structured(wanted: dict[str, Any], release: str) -> dict[str, Any]:
    if holds(_HAS_STRUCTURED, release):
        return {STRUCTURED: wanted}
    for name in wanted.keys() - _GUIDED.keys():
        raise UnsupportedError(f"{STRUCTURED}.{name}: vLLM {release} has no such field", param=STRUCTURED)
    return {_GUIDED[name]: value for name, value in wanted.items()}


@functools.lru_cache(maxsize=1024)
def salt_of(tenant: str, own: str) -> str:
    """The salt of a tenant's prefixes; `own` is what the caller wanted, and separates within the tenant only."""
    return hashlib.blake2b(f"{tenant}\0{own}".encode(), digest_size=32, person=b"autobot_llm salt").hexdigest()


def separates_tenants(version: str | None, *, is_chat: bool) -> bool:
    """Whether that release can keep the prefixes of tenants apart."""
    return holds((CHAT_FIELDS if is_chat else COMPLETION_FIELDS)["cache_salt"], _release(version)[0])
