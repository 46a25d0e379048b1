"""Types and errors: what callers of old and new rely on."""

from __future__ import annotations

import msgspec
import pytest

from autobot_llm import errors
from autobot_llm.errors import ContextLengthError, LLMError, OverloadedError
from autobot_llm.types import ChatMessage, Choice, LLMRequest, LLMResponse, Usage


def response() -> LLMResponse:
    return LLMResponse(
        content="hello",
        model="m",
        provider="p",
        usage=Usage(prompt_tokens=3, completion_tokens=2),
        finish_reason="stop",
        choices=(Choice(index=0, content="hello", finish_reason="stop"),),
        request_id="r",
    )


def test_a_response_reads_as_a_mapping_for_older_callers() -> None:
    answer = response()
    assert answer["content"] == answer.get("content") == answer.content == "hello"
    assert answer.get("nothing", 7) == 7
    with pytest.raises(KeyError, match="nothing"):
        answer["nothing"]
    with pytest.raises(KeyError):
        answer["__class__"]


def test_requests_and_responses_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        response().content = "other"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        LLMRequest(prompt="x").prompt = "y"  # type: ignore[misc]


def test_usage_adds_up() -> None:
    assert response().usage.total_tokens == 5


def test_a_request_survives_json() -> None:
    request = LLMRequest(
        messages=[ChatMessage("user", "hi"), ChatMessage("assistant", None, tool_calls=[{"id": "1"}])],
        logit_bias={5: -1.0},
        stop=["x"],
        metadata={"a": [1]},
    )
    assert msgspec.json.decode(msgspec.json.encode(request), type=LLMRequest) == request


def test_two_requests_share_no_mutable_default() -> None:
    LLMRequest(prompt="a").metadata["x"] = 1
    assert LLMRequest(prompt="b").metadata == {}


def every_error() -> list[type[LLMError]]:
    found = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, LLMError)]
    return sorted(found, key=lambda one: one.__name__)


def test_every_error_is_in_the_tree_that_the_docstring_draws() -> None:
    for error in every_error():
        assert error.__name__ in (errors.__doc__ or "")


def test_the_statuses_drawn_in_the_tree_are_those_of_the_classes() -> None:
    drawn = {
        words[1]: int(words[2])
        for line in (errors.__doc__ or "").splitlines()
        if len(words := line.replace("│", " ").replace("├──", "- ").replace("└──", "- ").split()) > 2
        and words[0] == "-"
        and words[2].isdigit()
    }
    assert len(drawn) >= 12
    assert drawn == {name: getattr(errors, name).status for name in drawn}


def test_every_error_names_itself_to_machines() -> None:
    for error in every_error():
        assert 400 <= error.status < 600
        assert error.type.endswith("_error")
    assert ContextLengthError("too long", param="messages").code == "context_length_exceeded"
    overloaded = OverloadedError("later", retry_after=1.5)
    assert (overloaded.status, overloaded.retry_after, str(overloaded)) == (429, 1.5, "later")
