"""A request in the engine's terms: token ids and sampling parameters, or a refusal. Knows both sides' types."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from dataclasses import replace
from functools import partial
from typing import TypeVar

from autobot_llm.dialects.plain import plain_messages, plain_tools
from autobot_llm.engine.engine import Engine
from autobot_llm.engine.grammar.matcher import Grammar
from autobot_llm.engine.sequence import SamplingParams
from autobot_llm.engine.tool_calls.untrained import in_words
from autobot_llm.errors import ContextLengthError, InvalidRequestError
from autobot_llm.providers.native.answer_shape import Tools
from autobot_llm.types import ChatMessage, LLMRequest

# Text this long is encoded on a thread, so that the event loop goes on answering others meanwhile.
LONG_TEXT = 20_000


async def encode_prompt(engine: Engine, request: LLMRequest, tools: Tools | None = None) -> list[int]:
    """The request's token ids; messages go through the chat template, with the tools. Raises InvalidRequestError."""
    tokenizer = engine.tokenizer
    if isinstance(request.prompt, list):
        prompt_ids = request.prompt
        wrong = next((i for i in prompt_ids if not 0 <= i < engine.config.vocab_size), None)
        if wrong is not None:
            raise InvalidRequestError(
                f"token id {wrong} is outside of the vocabulary (0 to {engine.config.vocab_size - 1})", param="prompt"
            )
    else:
        if request.prompt is not None:
            text, add_special_tokens, param = request.prompt, True, "prompt"
        else:
            assert request.messages is not None, "validation asked for messages or a prompt"
            text = _conversation(engine, request, request.messages, tools)
            add_special_tokens, param = False, "messages"
        refuse_hopeless(engine, text, param)
        encode = partial(tokenizer.encode, text, add_special_tokens=add_special_tokens)
        prompt_ids = await asyncio.to_thread(encode) if len(text) > LONG_TEXT else encode()
    if not prompt_ids:
        raise InvalidRequestError("the prompt has no tokens", param="prompt")
    return prompt_ids


def _conversation(engine: Engine, request: LLMRequest, messages: list[ChatMessage], tools: Tools | None) -> str:
    tokenizer = engine.tokenizer
    messages = plain_messages(messages)
    shown = plain_tools(request.tools) or [] if tools is not None else []
    if tools.is_known if tools is not None else "tools" in tokenizer.tool_template:
        return tokenizer.render_chat(messages, shown or None)
    return tokenizer.render_chat(in_words(messages, shown))


def refuse_hopeless(engine: Engine, text: str, param: str) -> None:
    """Refuse text that is far too long before it costs seconds of encoding."""
    limit = 4 * engine.scheduler.max_model_len * engine.tokenizer.longest_token
    if len(text) > limit:
        raise ContextLengthError(
            f"a prompt of {len(text):,} characters cannot fit the model's context of "
            f"{engine.scheduler.max_model_len:,} tokens",
            param=param,
        )


def sampling_params(
    engine: Engine, request: LLMRequest, num_prompt_tokens: int, grammar: Grammar | None = None
) -> tuple[SamplingParams, ...]:
    """One value per choice: the request's fields, for what they leave open the model's advice, then neutral values."""
    context = engine.scheduler.max_model_len
    param = "prompt" if request.messages is None else "messages"
    if num_prompt_tokens >= context:
        raise ContextLengthError(
            f"the prompt has {num_prompt_tokens:,} tokens; the model's context is {context:,}, prompt and answer "
            "together",
            param=param,
        )
    room = context - num_prompt_tokens
    if request.max_tokens is not None and request.max_tokens > room:
        raise ContextLengthError(
            f"max_tokens={request.max_tokens:,} and a prompt of {num_prompt_tokens:,} tokens do not fit the model's "
            f"context of {context:,}; at most {room:,} tokens can be generated",
            param="max_tokens",
        )
    for token_id in (*request.logit_bias, *request.stop_token_ids):
        if not 0 <= token_id < engine.config.vocab_size:
            param = "logit_bias" if token_id in request.logit_bias else "stop_token_ids"
            raise InvalidRequestError(
                f"{param}: token id {token_id} is outside of the vocabulary (0 to {engine.config.vocab_size - 1})",
                param=param,
            )
    advice = engine.config.generation
    stop_token_ids = frozenset(request.stop_token_ids)
    if not request.ignore_eos:
        stop_token_ids |= engine.config.eos_token_ids
    common = SamplingParams(
        max_tokens=request.max_tokens or room,
        min_tokens=request.min_tokens,
        temperature=_first(request.temperature, advice.temperature, 1.0),
        top_k=max(0, _first(request.top_k, advice.top_k, 0)),
        top_p=_first(request.top_p, advice.top_p, 1.0),
        min_p=_first(request.min_p, advice.min_p, 0.0),
        repetition_penalty=_first(request.repetition_penalty, advice.repetition_penalty, 1.0),
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=request.logit_bias,
        num_logprobs=request.logprobs,
        stop_token_ids=stop_token_ids,
        grammar=grammar,
    )
    seed = secrets.randbits(63) if request.seed is None else request.seed
    return tuple(replace(common, seed=choice_seed(seed, index)) for index in range(request.n))


def choice_seed(seed: int, index: int) -> int:
    """Choice 0 has the request's own seed, so that asking for more choices does not change the first."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


_Number = TypeVar("_Number", int, float)


def _first(asked: _Number | None, advised: _Number | None, neutral: _Number) -> _Number:
    if asked is not None:
        return asked
    return neutral if advised is None else advised
