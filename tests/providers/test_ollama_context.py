"""A model's context: large enough for the request, kept as long as it is, and never in anybody's way."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from autobot_llm.providers.ollama.context import SMALLEST, Pin, step

TOKENS = st.integers(1, 200_000)
LIMITS = st.none() | st.integers(512, 131_072)


@given(TOKENS)
def test_a_step_is_the_next_power_of_two(num_tokens: int) -> None:
    size = step(num_tokens)
    assert size >= max(num_tokens, SMALLEST)
    assert size & (size - 1) == 0
    assert size == SMALLEST or size < 2 * num_tokens


@given(st.lists(TOKENS, min_size=1, max_size=30), LIMITS)
def test_a_context_holds_the_request_or_all_that_the_model_allows_and_never_shrinks(
    requests: list[int], limit: int | None
) -> None:
    pin = Pin(limit=limit)
    loaded = num_loads = 0
    for num_tokens in requests:
        num_ctx = pin.choose(num_tokens, loaded=loaded)
        assert num_ctx >= loaded
        assert num_ctx >= min(num_tokens, limit or num_tokens)
        assert limit is None or num_ctx <= limit
        num_loads += num_ctx != loaded
        loaded = num_ctx
    assert num_loads <= 1 + (max(requests) // SMALLEST).bit_length()


@given(TOKENS, TOKENS)
def test_what_others_loaded_is_taken_as_it_is_where_it_is_large_enough(num_tokens: int, loaded: int) -> None:
    num_ctx = Pin(num_ctx=8192).choose(num_tokens, loaded=loaded)
    assert num_ctx == loaded if loaded >= num_tokens else num_ctx >= num_tokens


def test_while_answers_are_under_way_the_model_may_be_on_its_way_to_our_choice() -> None:
    pin = Pin(num_ctx=16_384, num_in_flight=1)
    assert pin.choose(100, loaded=4096) == 16_384
    assert pin.choose(100, loaded=32_768) == 32_768
    pin.num_in_flight = 0
    assert pin.choose(100, loaded=4096) == 4096


@given(st.text(max_size=3000), st.integers(1, 4000))
def test_an_estimate_covers_a_prompt_like_those_that_were_seen(text: str, num_prompt_tokens: int) -> None:
    pin = Pin()
    body = {"messages": [{"role": "user", "content": text}]}
    num_bytes = len(text.encode("utf-8", "replace"))
    pin.learn(body, num_prompt_tokens)
    if num_bytes >= 1000 and num_prompt_tokens <= num_bytes:
        assert pin.estimate(body, 0) >= num_prompt_tokens - 1
    assert pin.estimate(body, 100) == pin.estimate(body, 0) + 100
    assert pin.estimate({"prompt": text, "images": []}, 0) <= num_bytes + 8


def test_images_tools_and_calls_count_too() -> None:
    pin = Pin()
    plain = {"messages": [{"role": "user", "content": "hi"}]}
    seen = {"messages": [{"role": "user", "content": "hi", "images": ["x" * 100_000]}]}
    called = {"messages": [{"role": "assistant", "content": "hi", "tool_calls": [{"function": {"name": "x" * 300}}]}]}
    tools = {**plain, "tools": [{"type": "function", "function": {"name": "x" * 300}}]}
    base = pin.estimate(plain, None)
    assert pin.estimate(seen, None) == base + 1024
    assert pin.estimate(called, None) > base + 100
    assert pin.estimate(tools, None) > base + 100
