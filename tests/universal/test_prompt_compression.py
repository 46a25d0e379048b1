"""Compression in the chain: off unless asked for, on the right parts only, and told in the report."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from autobot_llm import ChatMessage, LLMInterface, OptimizationOutcome, Settings
from autobot_llm.collect import collect
from autobot_llm.errors import InvalidRequestError, ProviderUnavailable
from autobot_llm.providers.base import ScoredToken, Streamer
from autobot_llm.providers.scripted import ScriptedProvider
from autobot_llm.types import Finish, LLMRequest, LLMResponse, Start, TextDelta
from autobot_llm.universal.prompt_compression import PromptCompression

SYSTEM = "You are a helpful assistant. Please note that you answer in English. In order to cite, write [1]."
SHORT = "Assistant. You answer in English. To cite, write [1]."
PASSAGES = [
    "The refund is paid within 5 days. It goes to the card that was used. Nobody else gets it.",
    "The garden has a bench. The bench is green. Birds sit on it in the morning.",
    "The river is long. It flows to the sea. Boats go up and down all day.",
]
QUESTION = "When is the refund paid?"


class CountingProvider(ScriptedProvider):
    """Counts a token for each word, and finds every word equally likely."""

    def __init__(self, name: str = "scripted") -> None:
        super().__init__(["Yes", "."], name=name)

    async def score(self, text: str, *, before: str = "", model: str | None = None) -> tuple[ScoredToken, ...]:
        tokens, end = [], 0
        for word in text.split():
            start = text.index(word, end)
            tokens.append(ScoredToken(end, start + len(word), -float(len(word)) if word not in before else -0.1))
            end = start + len(word)
        return tuple(tokens)

    async def text_counter(self, model: str | None = None) -> Any:
        return lambda text: len(text.split())


@pytest.fixture
async def provider() -> AsyncIterator[CountingProvider]:
    made = CountingProvider()
    await made.start()
    yield made


def chain(provider: ScriptedProvider, **fields: Any) -> Streamer:
    return PromptCompression(Settings(**fields)).wrap(provider, provider)


def asked(*messages: ChatMessage, compression: object = None, **fields: Any) -> LLMRequest:
    extra = {} if compression is None else {"compression": compression}
    return LLMRequest(messages=[ChatMessage("system", SYSTEM), *messages], extra_body=extra, **fields)


async def answer(chain: Streamer, request: LLMRequest) -> LLMResponse:
    return await collect(chain.stream(request))


def line_of(response: LLMResponse) -> OptimizationOutcome | None:
    return next((line for line in response.optimizations if line.name == "prompt_compression"), None)


async def test_by_default_nothing_is_touched_and_nothing_said(provider: CountingProvider) -> None:
    request = asked(ChatMessage("user", "Please note that I ask."))
    response = await answer(chain(provider), request)
    assert provider.requests == [request]
    assert line_of(response) is None


async def test_switched_on_it_shortens_system_messages_alone_and_says_so(provider: CountingProvider) -> None:
    user = ChatMessage("user", "Please note that I ask in order to know.")
    response = await answer(chain(provider, prompt_compression_enabled=True), asked(user))
    (sent,) = provider.requests
    assert sent.messages == [ChatMessage("system", SHORT), user]
    line = line_of(response)
    assert line is not None
    saved = len(SYSTEM.split()) - len(SHORT.split())
    assert (line.applied, line.lossy, line.tokens_saved) == (True, True, saved)
    assert line.reason == "rules: 18 -> 9 tokens, 50% (target 70%), by the model's tokenizer"


@pytest.mark.parametrize("compression", ["rules", {"mode": "rules"}, {"mode": "rules", "ratio": 0.9}, {"ratio": 0.9}])
async def test_a_request_may_ask_for_it_and_the_provider_never_sees_the_field(
    provider: CountingProvider, compression: object
) -> None:
    response = await answer(chain(provider), asked(compression=compression))
    assert provider.requests[0].messages == [ChatMessage("system", SHORT)]
    assert provider.requests[0].extra_body == {}
    assert response.content == "Yes."


async def test_a_request_that_asks_for_exactness_gets_every_word(provider: CountingProvider) -> None:
    response = await answer(chain(provider, prompt_compression_enabled=True), asked(compression={"mode": "off"}))
    assert provider.requests[0].messages == [ChatMessage("system", SYSTEM)]
    line = line_of(response)
    assert line == OptimizationOutcome(
        name="prompt_compression", applied=False, reason="the request asks for every word"
    )


async def test_the_default_mode_alone_is_what_the_settings_say(provider: CountingProvider) -> None:
    response = await answer(chain(provider), asked(compression="default"))
    assert provider.requests[0].messages == [ChatMessage("system", SYSTEM)]
    line = line_of(response)
    assert line is not None and not line.applied


async def test_a_raw_prompt_is_never_touched(provider: CountingProvider) -> None:
    request = LLMRequest(prompt="Please note that", extra_body={"compression": "perplexity"})
    response = await answer(chain(provider), request)
    assert provider.requests[0].prompt == "Please note that"
    line = line_of(response)
    assert line is not None and not line.applied


@pytest.mark.parametrize("compression", [{"mode": "hard"}, {"ratio": 0}, {"ratio": 1.5}, {"level": 3}, 7, "gzip"])
async def test_what_is_no_compression_is_refused_by_name(provider: CountingProvider, compression: object) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        await answer(chain(provider), asked(compression=compression))
    assert raised.value.param == "compression"
    assert provider.requests == []


async def test_the_context_of_a_question_is_chosen_and_the_question_kept(provider: CountingProvider) -> None:
    user = ChatMessage("user", "\n\n".join([*PASSAGES, QUESTION]))
    response = await answer(chain(provider), asked(user, compression={"mode": "context", "ratio": 0.4}))
    sent = provider.requests[0].messages
    assert sent is not None and isinstance(sent[-1].content, str)
    assert sent[-1].content.startswith(PASSAGES[0])
    assert sent[-1].content.endswith("\n\n" + QUESTION)
    assert "Birds" not in sent[-1].content
    line = line_of(response)
    assert line is not None and line.applied and line.reason.startswith("context: ")


async def test_a_question_alone_is_left_as_it_is(provider: CountingProvider) -> None:
    user = ChatMessage("user", QUESTION)
    await answer(chain(provider), asked(user, compression={"mode": "context", "ratio": 0.1}))
    assert provider.requests[0].messages == [ChatMessage("system", SHORT), user]


async def test_content_parts_are_shortened_one_by_one_and_images_stay(provider: CountingProvider) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    context = {"type": "text", "text": "\n\n".join(PASSAGES), "cache_control": {"type": "ephemeral"}}
    user = ChatMessage("user", [context, image, {"type": "text", "text": QUESTION}])
    await answer(chain(provider), asked(user, compression={"mode": "perplexity", "ratio": 0.5}))
    sent = provider.requests[0].messages
    assert sent is not None and isinstance(sent[-1].content, list)
    first, second, third = sent[-1].content
    assert len(first["text"].split()) <= 0.5 * len(context["text"].split()) + 1
    assert "refund" in first["text"] and "5" in first["text"]
    assert first["cache_control"] == context["cache_control"]
    assert (second, third["text"]) == (image, QUESTION)


async def test_earlier_turns_and_tool_results_are_never_touched(provider: CountingProvider) -> None:
    turns = [
        ChatMessage("user", "\n\n".join(PASSAGES)),
        ChatMessage("assistant", "Please note that it is so."),
        ChatMessage("tool", "Please note that 7.", tool_call_id="1"),
    ]
    await answer(chain(provider), asked(*turns, compression="perplexity"))
    assert provider.requests[0].messages is not None
    assert provider.requests[0].messages[1:] == turns


async def test_without_a_tokenizer_the_saving_is_said_to_be_estimated() -> None:
    provider = ScriptedProvider(["ok"])
    await provider.start()
    line = line_of(await answer(chain(provider), asked(compression="rules")))
    assert line is not None
    assert "estimated" in line.reason
    assert line.tokens_saved == len(SYSTEM) // 4 - len(SHORT) // 4


async def test_where_the_answering_model_has_a_price_the_saving_is_told_in_dollars() -> None:
    model, dollars_per_token = "claude-sonnet-4-5", 3e-6
    provider = ScriptedProvider(["ok"], name="anthropic", models=[model])
    await provider.start()
    line = line_of(await answer(chain(provider), asked(compression="rules", model=model)))
    assert line is not None and line.tokens_saved is not None
    assert line.dollars_saved == pytest.approx(dollars_per_token * line.tokens_saved)


async def test_events_pass_unchanged_and_errors_too(provider: CountingProvider) -> None:
    async with aclosing(chain(provider).stream(asked(compression="rules", stream=True))) as events:
        kinds = [type(event) async for event in events]
    assert kinds[:3] == [Start, TextDelta, TextDelta] and kinds[-1] is Finish
    failing = ScriptedProvider(["a", ProviderUnavailable("gone")])
    await failing.start()
    with pytest.raises(ProviderUnavailable, match="gone"):
        await answer(chain(failing), asked(compression="rules"))


async def test_leaving_early_closes_the_providers_stream(provider: CountingProvider) -> None:
    async with aclosing(chain(provider).stream(asked(compression="rules"))) as events:
        await anext(events)
        assert provider.num_open_streams == 1
    assert provider.num_open_streams == 0


async def test_equal_system_prompts_stay_equal_whatever_comes_after_them(provider: CountingProvider) -> None:
    link = chain(provider, prompt_compression_enabled=True)
    for text in ("One?", "Two, and\n\nmore?"):
        await answer(link, asked(ChatMessage("user", text)))
    first, second = (request.messages[0] for request in provider.requests if request.messages)
    assert first == second == ChatMessage("system", SHORT)


async def test_figures_count_what_was_saved(provider: CountingProvider) -> None:
    link = PromptCompression(Settings(prompt_compression_enabled=True))
    await answer(link.wrap(provider, provider), asked())
    await answer(link.wrap(provider, provider), LLMRequest(messages=[ChatMessage("system", "Be brief.")]))
    assert link.metrics_of("scripted") == {"num_compressed_requests": 1, "num_tokens_saved_by_compression": 9}
    assert link.metrics_of("another") == {"num_compressed_requests": 0, "num_tokens_saved_by_compression": 0}
    assert link.state()[0] and not PromptCompression(Settings()).state()[0]


async def test_for_a_provider_that_scores_nothing_the_embedded_model_judges(tmp_path: Path) -> None:
    provider = ScriptedProvider(["ok"])
    user = ChatMessage("user", "\n\n".join([*PASSAGES, QUESTION]))
    settings = Settings(cache_dir=tmp_path, compiled_step="off", max_model_len=32_768, default_model="a-large-one")
    async with LLMInterface(settings, providers={"scripted": provider}) as llm:
        response = await llm.chat_completion([user], extra_body={"compression": {"mode": "perplexity", "ratio": 0.5}})
    sent = provider.requests[0].messages
    assert sent is not None and isinstance(sent[-1].content, str)
    assert len(sent[-1].content) < 0.75 * len(str(user.content))
    assert "5" in sent[-1].content and sent[-1].content.endswith(QUESTION)
    line = line_of(response)
    assert line is not None and line.lossy and "estimated" in line.reason


async def test_the_native_model_reads_fewer_tokens_and_counts_them_itself(tmp_path: Path) -> None:
    from autobot_llm.providers.native import NativeProvider

    settings = Settings(cache_dir=tmp_path, compiled_step="off", cache_enabled=False)
    messages = [ChatMessage("system", SYSTEM), ChatMessage("user", "Tell me a story.")]
    async with LLMInterface(settings, providers={"native": NativeProvider(settings)}) as llm:
        plain = await llm.chat_completion(messages, max_tokens=2, temperature=0)
        short = await llm.chat_completion(messages, max_tokens=2, temperature=0, extra_body={"compression": "rules"})
    line = line_of(short)
    assert line is not None and line.tokens_saved is not None
    assert plain.usage.prompt_tokens - short.usage.prompt_tokens == line.tokens_saved > 5
