"""Consistent hashing with bounded loads: who moves when a replica goes, who is spared, and what shares a cache."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobot_llm.providers.vllm.balancing import (
    FREE_LOAD,
    LOAD_FACTOR,
    MAX_KEY_BYTES,
    Balancer,
    Ring,
    affinity_key,
)
from autobot_llm.types import ChatMessage, LLMRequest

NAMES = [f"http://10.0.0.{number}:8000" for number in range(1, 9)]
KEYS = [f"conversation {number}".encode() for number in range(2000)]
some_names = st.lists(st.sampled_from(NAMES), min_size=1, max_size=8, unique=True)


def home(names: list[str], key: bytes) -> str:
    return next(Ring(names).clockwise(key))


@pytest.mark.parametrize("gone", NAMES[:3])
def test_when_a_replica_goes_only_its_own_keys_move(gone: str) -> None:
    before, after = Ring(NAMES), Ring([name for name in NAMES if name != gone])
    moved = 0
    heirs: Counter[str] = Counter()
    for key in KEYS:
        old, new = next(before.clockwise(key)), next(after.clockwise(key))
        if old == gone:
            moved += 1
            heirs[new] += 1
            assert new == [*before.clockwise(key)][1], "the neighbour takes over"
        else:
            assert new == old
    assert 0 < moved < len(KEYS) / 4
    assert len(heirs) == len(NAMES) - 1, "what it had is spread over all others"


def test_the_shares_of_replicas_are_about_the_same() -> None:
    ring = Ring(NAMES)
    shares = Counter(next(ring.clockwise(key)) for key in KEYS)
    assert set(shares) == set(NAMES)
    assert max(shares.values()) < 1.6 * len(KEYS) / len(NAMES)
    assert min(shares.values()) > 0.5 * len(KEYS) / len(NAMES)


@given(some_names, st.binary(max_size=40))
def test_the_order_has_each_replica_once_and_does_not_depend_on_their_order(names: list[str], key: bytes) -> None:
    order = list(Ring(names).clockwise(key))
    assert sorted(order) == sorted(names)
    assert order == list(Ring(list(reversed(names))).clockwise(key))


def test_no_replica_at_all_is_an_empty_order() -> None:
    assert list(Ring([]).clockwise(b"x")) == []
    assert Balancer(NAMES).order(b"x", set()) == []


@given(st.lists(st.sampled_from(KEYS[:3]), min_size=1, max_size=150), some_names)
def test_no_replica_gets_more_than_its_bound_however_alike_the_requests(keys: list[bytes], names: list[str]) -> None:
    balancer = Balancer(names)
    with ExitStack() as stack:
        for key in keys:
            stack.enter_context(balancer.under_way(balancer.order(key, set(names))[0]))
        bound = max(FREE_LOAD, LOAD_FACTOR * len(keys) / len(names) + 1)
        assert max(balancer.loads.values()) <= bound
    assert set(balancer.loads.values()) == {0}


def test_few_requests_stay_at_home_however_idle_the_others_are() -> None:
    balancer = Balancer(NAMES)
    with ExitStack() as stack:
        for _ in range(FREE_LOAD):
            chosen = balancer.order(KEYS[0], set(NAMES))[0]
            assert chosen == balancer.home(KEYS[0], set(NAMES)) == home(NAMES, KEYS[0])
            stack.enter_context(balancer.under_way(chosen))


@given(st.sampled_from(KEYS), st.sets(st.sampled_from(NAMES), min_size=1))
def test_only_usable_replicas_are_chosen_and_the_others_keep_their_places(key: bytes, usable: set[str]) -> None:
    order = Balancer(NAMES).order(key, usable)
    assert set(order) == usable
    assert order == [name for name in Ring(NAMES).clockwise(key) if name in usable]


def test_a_load_is_counted_until_its_request_ends_in_whatever_way() -> None:
    balancer = Balancer(NAMES)
    with pytest.raises(ValueError, match="it failed"), balancer.under_way(NAMES[0]):
        assert balancer.loads[NAMES[0]] == 1
        raise ValueError("it failed")
    assert balancer.loads[NAMES[0]] == 0


# --- what has the same key


def conversation(*texts: str, tenant: str = "") -> LLMRequest:
    roles = ("system", "user", "assistant", "user", "assistant", "user")
    turns = [ChatMessage(role=role, content=text) for role, text in zip(roles, texts, strict=False)]  # type: ignore[arg-type]
    return LLMRequest(messages=turns, tenant=tenant)


def test_later_turns_of_a_conversation_have_the_key_of_its_first() -> None:
    first = affinity_key(conversation("Be kind.", "Hello"))
    assert affinity_key(conversation("Be kind.", "Hello", "Hi!", "How are you?")) == first
    assert affinity_key(conversation("Be kind.", "Goodbye")) != first
    assert affinity_key(conversation("Be rude.", "Hello")) != first


def test_tenants_do_not_meet() -> None:
    assert affinity_key(conversation("a", "b", tenant="one")) != affinity_key(conversation("a", "b", tenant="two"))


def test_what_follows_a_long_common_beginning_does_not_matter() -> None:
    document = "word " * MAX_KEY_BYTES
    assert affinity_key(conversation(document, "one question")) == affinity_key(conversation(document, "another"))
    assert len(affinity_key(conversation(document, "x", tenant="t"))) <= MAX_KEY_BYTES + 2
    assert affinity_key(LLMRequest(prompt=document + "a")) == affinity_key(LLMRequest(prompt=document + "b"))
    ids = list(range(MAX_KEY_BYTES))
    assert affinity_key(LLMRequest(prompt=[*ids, 1])) == affinity_key(LLMRequest(prompt=[*ids, 2]))
    assert affinity_key(LLMRequest(prompt=[1, 2])) != affinity_key(LLMRequest(prompt=[1, 3]))


def test_pictures_and_broken_surrogates_have_keys_too() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    one = LLMRequest(messages=[ChatMessage(role="user", content=[part])])
    assert affinity_key(one) == affinity_key(LLMRequest(messages=[ChatMessage(role="user", content=[dict(part)])]))
    assert affinity_key(LLMRequest(prompt="\ud800"))
    assert affinity_key(LLMRequest(messages=[ChatMessage(role="user", content="\ud800")]))
