"""The metrics page is valid, declares what it shows, and counts what happened."""

from __future__ import annotations

import asyncio

from prometheus_client.parser import text_string_to_metric_families
from server_harness import QUESTION, request_bytes, running_server, until

from autobot_llm.errors import OverloadedError
from autobot_llm.observability.metrics import Metrics
from autobot_llm.observability.names import PROVIDER_METRICS, REQUEST_METRICS
from autobot_llm.types import ChoiceEnd, Finish, TextDelta, Timings, Usage

CHAT = "/v1/chat/completions"


def samples(page: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(page.decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


SCRIPT = [
    "one ",
    "two ",
    TextDelta("three", 0),
    ChoiceEnd(finish_reason="stop"),
    Finish(
        usage=Usage(prompt_tokens=10, completion_tokens=3, cached_tokens=4),
        timings=Timings(queued=0.02, queue_position=5),
    ),
]


async def test_a_scrape_counts_what_happened() -> None:
    async with running_server(SCRIPT, delay=0.002) as server:
        for stream in (False, True):
            await server.post(CHAT, {"messages": QUESTION, "stream": stream})
        await server.post(CHAT, {"messages": QUESTION, "model": "made-up", "temperature": -1})
        reply = await server.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = samples(reply.body)
    assert found[key("autobot_llm_requests_total", endpoint=CHAT, model="tiny", status="200")] == 2
    assert found[key("autobot_llm_requests_total", endpoint=CHAT, model="unknown", status="400")] == 1
    assert found[key("autobot_llm_request_latency_seconds_count", endpoint=CHAT, model="tiny")] == 2
    assert found[key("autobot_llm_time_to_first_token_seconds_count", model="tiny")] == 2
    assert found[key("autobot_llm_inter_token_latency_seconds_count", model="tiny")] == 4
    assert 0.007 < found[key("autobot_llm_inter_token_latency_seconds_sum", model="tiny")] < 1
    assert found[key("autobot_llm_tokens_total", model="tiny", kind="prompt")] == 20
    assert found[key("autobot_llm_tokens_total", model="tiny", kind="completion")] == 6
    assert found[key("autobot_llm_tokens_total", model="tiny", kind="cached")] == 8
    assert found[key("autobot_llm_queue_wait_seconds_sum", model="tiny")] == 0.04
    assert found[key("autobot_llm_queue_position_bucket", model="tiny", le="4.0")] == 0
    assert found[key("autobot_llm_queue_position_bucket", model="tiny", le="8.0")] == 2
    assert found[key("autobot_llm_in_flight", endpoint=CHAT)] == 0
    assert b"made-up" not in reply.body, "a name that a client makes up is no label"


async def test_running_requests_and_the_providers_own_figures_are_read_at_the_scrape() -> None:
    async with running_server(["late"], delay=60) as server:
        _, writer = await server.connect()
        writer.write(request_bytes("POST", CHAT, b'{"messages": [{"role": "user", "content": "hi"}]}'))
        await until(lambda: server.provider.num_open_streams == 1)
        busy = samples((await server.get("/metrics")).body)
        writer.close()
        await until(lambda: server.provider.num_open_streams == 0)
        await asyncio.sleep(0.01)
        quiet = samples((await server.get("/metrics")).body)
    for found, number in ((busy, 1), (quiet, 0)):
        assert found[key("autobot_llm_engine_running", provider="native")] == number
        assert found[key("autobot_llm_in_flight", endpoint=CHAT)] == number


async def test_errors_are_counted_by_their_code() -> None:
    async with running_server([OverloadedError("full", retry_after=1)]) as server:
        await server.post(CHAT, {"messages": QUESTION})
        await server.get("/nowhere")
        found = samples((await server.get("/metrics")).body)
    assert found[key("autobot_llm_errors_total", code="overloaded")] == 1
    assert found[key("autobot_llm_errors_total", code="not_found")] == 1
    assert found[key("autobot_llm_requests_total", endpoint="unknown", model="unknown", status="404")] == 1


async def test_every_declared_metric_is_exposed_under_its_name_and_kind() -> None:
    metrics = Metrics()
    metrics.watch_providers(lambda: {"native": {spec.figure: 1.5 for spec in PROVIDER_METRICS}})
    record = metrics.begin("/x")

    async def events():
        for line in SCRIPT:
            yield TextDelta(line) if isinstance(line, str) else line

    async for _ in record.observe(events()):
        pass
    record.end(500, "engine_error")
    families = {family.name: family for family in text_string_to_metric_families(metrics.page().decode())}
    for spec in (*REQUEST_METRICS, *PROVIDER_METRICS):
        assert families[spec.name].type == spec.kind, spec.name
        labels = set(spec.labels) | ({"le"} if spec.kind == "histogram" else set())
        assert {label for sample in families[spec.name].samples for label in sample.labels} == labels


def test_two_services_in_one_process_do_not_share_counts() -> None:
    first, second = Metrics(), Metrics()
    first.begin("/x").end(200, None)
    assert b'endpoint="/x"' in first.page()
    assert b'endpoint="/x"' not in second.page()
