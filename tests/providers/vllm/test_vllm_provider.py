"""vLLM as a provider: its own fields by release, health, replicas, metrics and reports, against real servers."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import aclosing
from typing import Any

import pytest
from raw_server import Wire
from replicas import METRICS, FakeReplica, refuses, serving, until

from autobot_llm.collect import collect
from autobot_llm.errors import (
    ConfigurationError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    ProviderError,
    ProviderTimeout,
    ProviderUnavailable,
    UnsupportedError,
)
from autobot_llm.interface import LLMInterface
from autobot_llm.observability.metrics import Metrics
from autobot_llm.providers.base import Embedder, TellsOptimizations
from autobot_llm.providers.vllm import VllmProvider
from autobot_llm.report import OptimizationOutcome
from autobot_llm.settings import Settings
from autobot_llm.types import ChatMessage, EmbeddingRequest, LLMRequest, LLMResponse, SecondCall, TextDelta

QUESTION = [ChatMessage(role="user", content="Why is the sky blue?")]


def ask(text: str = "Why is the sky blue?", **fields: Any) -> LLMRequest:
    return LLMRequest(messages=[ChatMessage(role="user", content=text)], stream=True, **fields)


async def answer(provider: VllmProvider, request: LLMRequest) -> LLMResponse:
    async with aclosing(provider.stream(request)) as events:
        return await collect(events)


def line(response: LLMResponse, name: str) -> OptimizationOutcome:
    (found,) = [outcome for outcome in response.optimizations if outcome.name == name]
    return found


# --- one server


async def test_it_answers_with_what_the_server_says() -> None:
    async with serving(FakeReplica(cached_tokens=8)) as provider:
        response = await answer(provider, ask())
    assert (response.content, response.model, response.provider) == ("Hello world", "m", "vllm")
    assert (response.usage.prompt_tokens, response.usage.cached_tokens) == (9, 8)


@pytest.mark.parametrize(
    ("version", "given", "sent"),
    [
        ("0.33.0", {"guided_json": {"type": "object"}}, {"structured_outputs": {"json": {"type": "object"}}}),
        ("0.11.0", {"guided_choice": ["a", "b"]}, {"structured_outputs": {"choice": ["a", "b"]}}),
        ("0.10.2", {"structured_outputs": {"regex": "a+"}}, {"guided_regex": "a+"}),
        ("0.8.5", {"guided_grammar": "root ::= 'a'"}, {"guided_grammar": "root ::= 'a'"}),
        (None, {"structured_outputs": {"regex": "a+"}}, {"structured_outputs": {"regex": "a+"}}),
        ("0.33.0", {"bad_words": ["x"], "session_id": "s"}, {"bad_words": ["x"], "session_id": "s"}),
        ("0.99.0", {"invented_later": 1}, {"invented_later": 1}),
    ],
)
async def test_its_own_fields_are_said_in_the_words_of_the_release(
    version: str | None, given: dict[str, Any], sent: dict[str, Any]
) -> None:
    replica = FakeReplica(version=version)
    async with serving(replica) as provider:
        await answer(provider, ask(extra_body=given, top_k=5, min_p=0.1, ignore_eos=True, repetition_penalty=1.1,
                                   stop_token_ids=[7], priority=2, min_tokens=3))  # fmt: skip
    (body,) = replica.bodies
    standard = {"top_k": 5, "min_p": 0.1, "ignore_eos": True, "repetition_penalty": 1.1, "stop_token_ids": [7],
                "priority": 2, "min_tokens": 3}  # fmt: skip
    assert {name: body[name] for name in (*standard, *sent)} == standard | sent
    assert not (set(given) - set(sent)) & set(body)


@pytest.mark.parametrize(
    ("version", "extra", "param"),
    [
        ("0.33.0", {"best_of": 2}, "best_of"),
        ("0.26.0", {"session_id": "s"}, "session_id"),
        ("0.33.0", {"num_ctx": 4096}, "num_ctx"),
        ("0.10.2", {"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
    ],
)
async def test_a_field_that_the_release_would_ignore_is_refused_by_name(
    version: str, extra: dict[str, Any], param: str
) -> None:
    replica = FakeReplica(version=version)
    async with serving(replica) as provider:
        with pytest.raises(UnsupportedError, match=f"vLLM {version.removesuffix('.0')}") as refusal:
            await answer(provider, ask(extra_body=extra))
    assert refusal.value.param == param
    assert replica.bodies == []


async def test_each_tenant_has_a_salt_of_its_own_that_does_not_tell_the_tenant() -> None:
    replica = FakeReplica()
    async with serving(replica) as provider:
        for tenant, extra in (("a", {}), ("b", {}), ("a", {}), ("", {}), ("a", {"cache_salt": "b"})):
            await answer(provider, ask(tenant=tenant, extra_body=extra))
    one, other, again, nobody, mixed = (body.get("cache_salt") for body in replica.bodies)
    assert one == again
    assert len({one, other, mixed}) == 3
    assert nobody is None
    assert len(str(one)) == 64


async def test_a_release_without_salts_is_said_to_share_prefixes(caplog: pytest.LogCaptureFixture) -> None:
    replica = FakeReplica(version="0.8.5")
    async with serving(replica) as provider:
        await answer(provider, ask(tenant="a"))
    assert "cannot keep the cached prefixes of tenants apart" in caplog.text
    assert "cache_salt" not in replica.bodies[0]


async def test_its_models_are_those_of_all_servers_and_one_of_them_needs_no_name() -> None:
    async with serving(FakeReplica(models=["a", "b"]), FakeReplica(models=["b", "c"])) as provider:
        assert [model.id for model in await provider.models()] == ["a", "b", "c"]
        with pytest.raises(InvalidRequestError, match="vllm serves a, b, c; name one"):
            await answer(provider, ask())
    async with serving(FakeReplica(models=["a", "b"]), provider="vllm", default_model="b") as provider:
        assert (await answer(provider, ask())).model == "b"


async def test_a_model_loaded_later_is_found_and_an_unknown_one_refused() -> None:
    replica = FakeReplica()
    async with serving(replica) as provider:
        with pytest.raises(ModelNotFoundError, match="'adapter' is not served by vllm; served are m"):
            await answer(provider, ask(model="adapter"))
        replica.models.append("adapter")
        assert (await answer(provider, ask(model="adapter"))).model == "adapter"


async def test_embeddings_come_from_the_server() -> None:
    async with serving(FakeReplica()) as provider:
        assert isinstance(provider, Embedder)
        response = await provider.embed(EmbeddingRequest(inputs=["x"]))
    assert [list(vector) for vector in response.vectors] == [[1.0]]


async def test_the_servers_refusal_keeps_its_words_and_is_not_tried_elsewhere() -> None:
    replicas = [FakeReplica(fail=refuses(400, "priority scheduling is not enabled")) for _ in range(2)]
    async with serving(*replicas) as provider:
        with pytest.raises(InvalidRequestError, match="priority scheduling is not enabled"):
            await answer(provider, ask(priority=1))
    assert sum(len(replica.bodies) for replica in replicas) == 1


async def test_without_servers_named_the_start_says_what_to_do() -> None:
    with pytest.raises(ConfigurationError, match=r"set AUTOBOT_VLLM_ENDPOINTS, or start one with .* --launch"):
        await VllmProvider(Settings()).start()


async def test_a_prompt_goes_through_the_interface_to_the_server() -> None:
    replica = FakeReplica()
    async with serving(replica):
        settings = Settings(provider="vllm", vllm_endpoints=(f"{replica.url}/v1/",))
        async with LLMInterface(settings) as llm:
            response = await llm.chat_completion(QUESTION, model="vllm/m")
            row = next(row for row in llm.get_optimizations() if row.provider == "vllm")
    assert response.content == "Hello world"
    states = {one.name: (one.could_apply, one.runs) for one in row.optimizations}
    assert row.engine_version == "0.33.0"
    assert states["prefix_caching"] == states["speculative_decoding"] == states["kv_cache_optimization"] == (True, True)
    assert states["medusa_heads"] == (False, False)
    assert states["cuda_graphs"] == (True, False)


async def test_the_key_is_sent_and_never_shown() -> None:
    replica = FakeReplica()
    async with serving(replica, vllm_api_key="a-secret") as provider:
        await answer(provider, ask())
        assert replica.server is not None
        sent = {asked.headers.get("authorization") for asked in replica.server.asked if asked.method == "POST"}
        assert sent == {"Bearer a-secret"}
        replica.fail = refuses(401, "the key a-secret is wrong")
        with pytest.raises(ProviderError) as refusal:
            await answer(provider, ask())
        assert "a-secret" not in refusal.value.message + repr(provider.status())


# --- health


async def test_a_server_that_is_down_at_the_start_is_used_once_it_is_up() -> None:
    replica = FakeReplica(is_well=False)
    async with serving(replica, watch_seconds=0.01) as provider:
        assert provider.status().state == "failed"
        with pytest.raises(ProviderUnavailable, match="no vllm server can be reached"):
            await answer(provider, ask())
        replica.is_well = True
        await until(lambda: provider.status().state == "ready")
        assert (await answer(provider, ask())).content == "Hello world"


async def test_a_server_that_comes_back_as_another_version_is_known_as_that() -> None:
    replica = FakeReplica(version="0.32.0")
    async with serving(replica, watch_seconds=0.01) as provider:
        assert provider.engine_version() == "0.32.0"
        replica.is_well, replica.version = False, "0.33.0"
        await until(lambda: provider.status().state == "failed")
        replica.is_well = True
        await until(lambda: provider.engine_version() == "0.33.0")


async def test_an_address_where_nobody_listens_is_down_and_says_why() -> None:
    replica = FakeReplica()
    async with serving(replica):
        gone = replica.url
    provider = VllmProvider(Settings(vllm_endpoints=(gone,)))
    await provider.start()
    try:
        status = provider.status()
        assert (status.state, status.message) == ("failed", "no server can be reached")
        assert "cannot be reached" in str(status.details["server_1"])
        with pytest.raises(ProviderUnavailable):
            await provider.models()
    finally:
        await provider.close()
    assert provider.status().state == "stopped"


# --- replicas


async def test_the_turns_of_a_conversation_meet_on_one_replica() -> None:
    replicas = [FakeReplica() for _ in range(3)]
    async with serving(*replicas) as provider:
        for number in range(36):  # of 12, one run in forty left a replica without any
            turns = [ChatMessage(role="system", content="Be kind."), ChatMessage(role="user", content=f"Hi {number}")]
            where = set()
            for _ in range(2):
                before = [len(replica.bodies) for replica in replicas]
                await answer(provider, LLMRequest(messages=list(turns), stream=True))
                after = [len(replica.bodies) for replica in replicas]
                where.add(next(place for place in range(3) if before[place] != after[place]))
                turns += [ChatMessage(role="assistant", content="Hello."), ChatMessage(role="user", content="And?")]
            assert len(where) == 1
    assert all(replica.bodies for replica in replicas), "different conversations use all replicas"


@pytest.mark.parametrize(
    "failure", [refuses(503), refuses(500), refuses(429), "reset"], ids=["503", "500", "429", "reset"]
)
async def test_a_replica_that_fails_before_its_first_byte_is_replaced_by_another(failure: Any) -> None:
    async def reset(wire: Wire) -> None:
        wire.reset()

    replicas = [FakeReplica(), FakeReplica()]
    async with serving(*replicas) as provider:
        (await answer(provider, ask()), await answer(provider, ask()))
        home, other = sorted(replicas, key=lambda replica: -len(replica.bodies))
        assert len(other.bodies) == 0
        home.fail = reset if failure == "reset" else failure
        response = await answer(provider, ask())
        assert response.content == "Hello world"
        assert len(other.bodies) == 1
        affinity = line(response, "prefix_affinity")
        assert not affinity.applied
        assert "1 failed before it" in affinity.reason
        assert provider.metrics()["num_retries"] == 1


async def test_a_replica_that_is_not_well_gets_nothing_more_until_it_is() -> None:
    async def reset(wire: Wire) -> None:
        wire.reset()

    replicas = [FakeReplica(), FakeReplica()]
    async with serving(*replicas) as provider:
        await answer(provider, ask())
        home = next(replica for replica in replicas if replica.bodies)
        home.fail, home.is_well = reset, False
        await answer(provider, ask())
        await until(lambda: provider.metrics()["num_replicas_up"] == 1)  # its failure had it looked at
        num_asked = len(home.bodies)
        for _ in range(3):
            await answer(provider, ask())
        assert len(home.bodies) == num_asked
        assert provider.status().state == "ready"


async def test_a_replica_that_has_too_much_to_do_stays_in_use() -> None:
    replicas = [FakeReplica(), FakeReplica()]
    async with serving(*replicas) as provider:
        await answer(provider, ask())
        home = next(replica for replica in replicas if replica.bodies)
        home.fail = refuses(503, "the queue is full")
        assert home.server is not None
        num_looks = sum(asked.path == "/health" for asked in home.server.asked)
        await answer(provider, ask())
        await home.server.until(lambda server: sum(asked.path == "/health" for asked in server.asked) > num_looks)
        home.fail = None
        await answer(provider, ask())
        assert len(home.bodies) == 3
        assert provider.metrics()["num_replicas_up"] == 2


async def test_nothing_is_repeated_once_an_answer_has_begun() -> None:
    async def break_off(wire: Wire) -> None:
        chunk = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"Hel"},"finish_reason":null}]}\n\n'
        await wire.begin_stream()
        await wire.piece(chunk)
        wire.reset()

    replicas = [FakeReplica(fail=break_off), FakeReplica(fail=break_off)]
    pieces = []
    async with serving(*replicas) as provider:
        with pytest.raises(ProviderError, match="broke its answer off"):
            async with aclosing(provider.stream(ask())) as events:
                async for event in events:
                    pieces += [event.text] if isinstance(event, TextDelta) else []
    assert pieces == ["Hel"]
    assert sum(len(replica.bodies) for replica in replicas) == 1


@pytest.mark.parametrize(
    ("failure", "error", "num_tried"),
    [
        (refuses(429, retry_after="7"), OverloadedError, 2),
        (refuses(500, "CUDA error"), ProviderError, 2),
        (refuses(504), ProviderTimeout, 1),
        (refuses(401), ProviderError, 1),
    ],
)
async def test_the_last_replicas_error_is_the_answer_and_hopeless_ones_are_not_spread(
    failure: Any, error: type[Exception], num_tried: int
) -> None:
    replicas = [FakeReplica(fail=failure), FakeReplica(fail=failure)]
    async with serving(*replicas) as provider:
        with pytest.raises(error) as raised:
            await answer(provider, ask())
    assert sum(len(replica.bodies) for replica in replicas) == num_tried
    if error is OverloadedError:
        assert raised.value.retry_after == 7  # type: ignore[attr-defined]


async def test_a_call_that_is_made_a_second_time_goes_to_another_replica() -> None:
    replicas = [FakeReplica(), FakeReplica()]
    async with serving(*replicas) as provider:
        request = ask()
        await answer(provider, request)
        home, other = sorted(replicas, key=lambda replica: not replica.bodies)
        again = SecondCall(**{name: getattr(request, name) for name in request.__struct_fields__})
        await answer(provider, again)
        assert (len(home.bodies), len(other.bodies)) == (1, 1)
        assert home.bodies == other.bodies


async def test_an_overloaded_replica_gives_its_requests_to_the_next_and_says_so() -> None:
    gate = asyncio.Event()
    replicas = [FakeReplica(gate=gate) for _ in range(2)]
    async with serving(*replicas) as provider:
        tasks = [asyncio.create_task(answer(provider, ask())) for _ in range(12)]
        try:
            await until(lambda: sum(replica.num_waiting for replica in replicas) == 12)
            shares = sorted(len(replica.bodies) for replica in replicas)
            assert shares[0] >= 4
            assert shares[1] <= 8  # 1.25 times the mean of 6, rounded up
        finally:
            gate.set()
        responses = await asyncio.gather(*tasks)
    affinities = [line(response, "prefix_affinity") for response in responses]
    assert sum(affinity.applied for affinity in affinities) == shares[1]
    assert any("had too much to do" in affinity.reason for affinity in affinities)


async def test_a_reader_that_leaves_ends_the_work_at_the_server() -> None:
    gate = asyncio.Event()
    replica = FakeReplica(gate=gate)
    async with serving(replica) as provider:
        async with aclosing(provider.stream(ask())) as events:
            async for event in events:
                if isinstance(event, TextDelta):
                    break
        assert provider.metrics()["num_in_flight"] == 0
        assert replica.server is not None
        await replica.server.until(lambda server: server.num_open <= 2)
        gate.set()


# --- metrics and reports


async def test_the_servers_metrics_become_ours() -> None:
    async with serving(FakeReplica(), FakeReplica()) as provider:
        figures = provider.metrics()
        metrics = Metrics()
        metrics.watch_providers(lambda: {"vllm": provider.metrics()})
        page = metrics.page().decode()
    assert figures["num_running"] == 6
    assert figures["num_waiting"] == 4
    assert figures["kv_cache_usage"] == 0.25
    assert figures["prefix_cache_hit_rate"] == 0.6
    assert figures["speculation_acceptance_rate"] == 0.75
    assert (figures["num_blocks"], figures["num_free_blocks"]) == (2000, 1500)
    assert 'autobot_speculation_acceptance_rate{provider="vllm"} 0.75' in page
    assert 'autobot_speculation_tokens_proposed_total{provider="vllm"} 400.0' in page
    assert 'autobot_speculation_tokens_accepted_total{provider="vllm"} 300.0' in page
    assert 'autobot_prefix_cache_hit_rate{provider="vllm"} 0.6' in page
    assert 'autobot_llm_engine_kv_cache_usage{provider="vllm"} 0.25' in page
    assert 'autobot_llm_replicas_up{provider="vllm"} 2.0' in page


async def test_counters_go_on_when_a_server_begins_anew() -> None:
    replica = FakeReplica()
    async with serving(replica, watch_seconds=0.01) as provider:
        assert provider.metrics()["num_generated_tokens"] == 500
        replica.metrics = METRICS.replace(
            'vllm:generation_tokens_total{engine="0",model_name="m"} 500',
            'vllm:generation_tokens_total{engine="0",model_name="m"} 20',
        )
        await until(lambda: provider.metrics()["num_generated_tokens"] != 500)
        assert provider.metrics()["num_generated_tokens"] == 520


@pytest.mark.parametrize("version", ["dev", "0.0.0+unknown", ""])
async def test_a_version_that_is_none_is_unknown(version: str) -> None:
    async with serving(FakeReplica(version=version), FakeReplica(version="0.32.0")) as provider:
        assert provider.engine_version() in ("0.32.0", "0.0.0+unknown")
        assert (await answer(provider, ask(extra_body={"guided_regex": "a"}))).content == "Hello world"


@pytest.mark.parametrize("page", ["", "<html>", "vllm:num_requests_running{ nonsense", "\x00\xff" * 100])
async def test_a_page_of_metrics_that_is_none_harms_nobody(page: str) -> None:
    async with serving(FakeReplica(metrics=page)) as provider:
        assert "num_running" not in provider.metrics()
        assert provider.status().state == "ready"
        assert (await answer(provider, ask())).content == "Hello world"


async def test_the_report_says_what_the_cache_gave_and_who_answered() -> None:
    replicas = [FakeReplica(cached_tokens=8) for _ in range(2)]
    async with serving(*replicas) as provider:
        response = await answer(provider, ask())
        assert isinstance(provider, TellsOptimizations)
        running = {outcome.name: outcome.applied for outcome in provider.optimizations()}
    caching = line(response, "prefix_caching")
    assert (caching.applied, caching.tokens_saved) == (True, 8)
    affinity = line(response, "prefix_affinity")
    assert affinity.applied
    assert "one of 2" in affinity.reason
    assert "75% of 200 drafted tokens" in line(response, "speculative_decoding").reason
    assert running == {
        "continuous_batching": True, "prefix_caching": True, "speculative_decoding": True,
        "kv_cache_optimization": True,
    }  # fmt: skip


async def test_what_was_not_found_in_the_cache_or_not_told_is_not_claimed() -> None:
    plain = METRICS.replace('enable_prefix_caching="True"', 'enable_prefix_caching="False"').replace("fp8", "auto")
    plain = "\n".join(row for row in plain.splitlines() if "spec_decode" not in row)
    async with serving(FakeReplica(metrics=plain)) as provider:
        response = await answer(provider, ask())
        running = {outcome.name: outcome.applied for outcome in provider.optimizations()}
    assert "started without it" in line(response, "prefix_caching").reason
    assert {outcome.name for outcome in response.optimizations}.isdisjoint({"prefix_affinity", "speculative_decoding"})
    assert running == {
        "continuous_batching": True, "prefix_caching": False, "speculative_decoding": False,
        "kv_cache_optimization": False,
    }  # fmt: skip


async def test_closing_ends_what_is_under_way_and_leaves_no_task() -> None:
    gate = asyncio.Event()
    replica = FakeReplica(gate=gate)
    async with serving(replica) as provider:
        task = asyncio.create_task(answer(provider, ask()))
        await until(lambda: replica.num_waiting)
        await provider.close()
        with contextlib.suppress(ProviderError):
            await task
        assert task.done()
        with pytest.raises(ProviderUnavailable, match="not started"):
            await answer(provider, ask())
        gate.set()


async def test_after_many_requests_left_failed_and_answered_nothing_is_left_over() -> None:
    async def reset(wire: Wire) -> None:
        wire.reset()

    replicas = [FakeReplica(pieces=("a", "b", "c")), FakeReplica(), FakeReplica(fail=reset)]
    async with serving(*replicas) as provider:
        num_tasks = len(asyncio.all_tasks())

        async def one(number: int) -> None:
            async with aclosing(provider.stream(ask(f"question {number % 50}"))) as events:
                async for _ in events:
                    if number % 10 == 0:
                        return

        for begin in range(0, 600, 60):
            await asyncio.gather(*(one(number) for number in range(begin, begin + 60)))
        assert provider.metrics()["num_in_flight"] == 0
        for replica in replicas:
            assert replica.server is not None
            await replica.server.until(lambda server: server.num_open <= 61)  # kept ones, as many as were used at once
        await until(lambda: len(asyncio.all_tasks()) <= num_tasks + sum(len(r.server.tasks) for r in replicas))  # type: ignore[union-attr]
    assert all(replica.server is not None and replica.server.num_open == 0 for replica in replicas)
