"""Two requests have one key exactly when they must have one answer."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from autobot_llm.providers.scripted import ScriptedProvider
from autobot_llm.settings import Settings
from autobot_llm.settings.registry import SETTINGS
from autobot_llm.types import CacheControl, ChatMessage, LLMRequest
from autobot_llm.universal import request_key
from autobot_llm.universal.request_key import AnswerKeys, may_be_shared

KEYS = AnswerKeys(Settings(), ScriptedProvider(name="native"))

texts = st.text(st.characters(codec="utf-8"), max_size=12)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**31), 2**31) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
objects = st.dictionaries(texts, json_values, max_size=2)
contents = texts | st.lists(objects, min_size=1, max_size=2)
messages = st.lists(
    st.builds(ChatMessage, st.sampled_from(["system", "user", "assistant"]), contents, st.none() | texts),
    min_size=1,
    max_size=3,
)
numbers = st.floats(-2, 2, allow_nan=False)

# Every field that reaches a model, and values for it. A field that is new in LLMRequest must be added here.
ANSWERING: dict[str, st.SearchStrategy[Any]] = {
    "messages": messages,
    "prompt": st.none() | texts | st.lists(st.integers(0, 9), max_size=3),
    "model": st.none() | texts,
    "provider": st.none() | texts,
    "llm_type": texts,
    "temperature": st.none() | st.floats(0, 2) | st.integers(0, 2),
    "top_p": st.none() | numbers,
    "top_k": st.none() | st.integers(-1, 9),
    "min_p": st.none() | numbers,
    "max_tokens": st.none() | st.integers(1, 9),
    "min_tokens": st.integers(0, 9),
    "stop": st.lists(texts, max_size=2),
    "stop_token_ids": st.lists(st.integers(0, 9), max_size=2),
    "ignore_eos": st.booleans(),
    "seed": st.none() | st.integers(-(2**63), 2**64 - 1),
    "presence_penalty": numbers,
    "frequency_penalty": numbers,
    "repetition_penalty": st.none() | numbers,
    "logit_bias": st.dictionaries(st.integers(0, 9), numbers, max_size=2),
    "n": st.integers(1, 3),
    "logprobs": st.none() | st.integers(0, 5),
    "tools": st.none() | st.lists(objects, max_size=2),
    "tool_choice": st.none() | texts | objects,
    "response_format": st.none() | objects,
    "tenant": texts,
    "extra_body": objects,
}
OTHERS = {
    "stream": True,
    "timeout": 3.0,
    "priority": 4,
    "metadata": {"a": 1},
    "request_id": "r",
    "service_options": {"user": "u"},
    "cache": CacheControl(ttl=3.0),
}
requests = st.fixed_dictionaries({}, optional=ANSWERING).map(lambda fields: LLMRequest(**fields))


def test_every_field_of_a_request_is_placed() -> None:
    assert set(ANSWERING) | set(OTHERS) == set(LLMRequest.__struct_fields__)


@given(requests, st.data())
def test_requests_that_differ_in_any_one_field_share_no_key(request: LLMRequest, data: st.DataObject) -> None:
    field = data.draw(st.sampled_from(sorted(ANSWERING)))
    value = data.draw(ANSWERING[field])
    assume(value != getattr(request, field))
    assert KEYS.key(request) != KEYS.key(msgspec.structs.replace(request, **{field: value}))


@given(requests)
def test_equal_requests_share_their_key_whatever_carries_them(request: LLMRequest) -> None:
    again = msgspec.convert(msgspec.to_builtins(request), LLMRequest)
    assert again == request
    assert KEYS.key(again) == KEYS.key(request)
    assert KEYS.key(msgspec.structs.replace(request, **OTHERS)) == KEYS.key(request)


@given(requests, requests)
def test_two_requests_share_a_key_only_if_they_are_equal(one: LLMRequest, other: LLMRequest) -> None:
    if one != other:
        assert KEYS.key(one) != KEYS.key(other)


@given(requests, texts, texts)
def test_tenants_never_share(request: LLMRequest, one: str, other: str) -> None:
    assume(one != other)
    of_one, of_other = (msgspec.structs.replace(request, tenant=tenant) for tenant in (one, other))
    assert KEYS.key(of_one) != KEYS.key(of_other)


def test_a_bias_is_the_same_in_any_order_but_a_schemas_fields_are_not() -> None:
    def key(**fields: Any) -> bytes | None:
        return KEYS.key(LLMRequest(prompt="x", **fields))

    assert key(logit_bias={1: 1, 2: -0.0}) == key(logit_bias={2: 0.0, 1: 1.0})
    schema = {"type": "object", "properties": {"a": {}, "b": {}}}
    turned = {"type": "object", "properties": {"b": {}, "a": {}}}
    assert key(response_format=schema) != key(response_format=turned)


@pytest.mark.parametrize("text", ["\ud800", "a\udfff"])
def test_a_request_that_has_no_bytes_has_no_key(text: str) -> None:
    assert KEYS.key(LLMRequest(prompt=text)) is None
    assert KEYS.key(LLMRequest(prompt="x", extra_body={"x": object()})) is None


class Revised(ScriptedProvider):
    def __init__(self, revision: str) -> None:
        super().__init__(name="native")
        self.told = revision

    def revision(self, model: str | None) -> str:
        return f"{model} {self.told}"


def test_providers_settings_and_revisions_never_share() -> None:
    request = LLMRequest(prompt="x")
    keys = [
        AnswerKeys(Settings(), ScriptedProvider(name="native")),
        AnswerKeys(Settings(), ScriptedProvider(name="openai")),
        AnswerKeys(Settings(default_model="/m"), ScriptedProvider(name="native")),
        AnswerKeys(Settings(quantization_type="int8"), ScriptedProvider(name="native")),
        AnswerKeys(Settings(prompt_compression_ratio=0.5), ScriptedProvider(name="native")),
        AnswerKeys(Settings(openai_endpoint="http://127.0.0.1:1"), ScriptedProvider(name="native")),
        AnswerKeys(Settings(), Revised("1")),
        AnswerKeys(Settings(), Revised("2")),
    ]
    assert len({one.key(request) for one in keys}) == len(keys)


def test_settings_that_change_no_answer_leave_its_key_alone() -> None:
    known = {setting.field for setting in SETTINGS}
    assert known >= request_key._NOT_IN_THE_SCOPE
    same = Settings(port=1, cpu_threads=3, cache_l2_ttl=9.0, openai_api_key="k", redis_url="redis://127.0.0.1")
    assert AnswerKeys(same, ScriptedProvider(name="native")).key(LLMRequest(prompt="x")) == KEYS.key(
        LLMRequest(prompt="x")
    )


@pytest.mark.parametrize(
    ("fields", "shared"),
    [
        ({"temperature": 0}, True),
        ({"temperature": 0.0}, True),
        ({"seed": 0}, True),
        ({"seed": 7, "temperature": 1.0}, True),
        ({}, False),
        ({"temperature": 0.7}, False),
        ({"temperature": 0.7, "cache": CacheControl()}, True),
        ({"temperature": 0, "cache": CacheControl(mode="bypass")}, False),
        ({"temperature": 0, "service_options": {"store": True}}, False),
        ({"temperature": 0, "service_options": {"store": False, "user": "u"}}, True),
        ({"temperature": 0, "extra_body": {"web_search_options": {"a": 1}}}, False),
        ({"temperature": 0, "tools": [{"type": "function"}]}, True),
        ({"temperature": 0, "tools": [{"type": "web_search"}]}, False),
    ],
)
def test_only_what_is_the_same_every_time_is_shared_unasked(fields: dict[str, Any], shared: bool) -> None:
    assert may_be_shared(LLMRequest(prompt="x", **fields)) is shared
