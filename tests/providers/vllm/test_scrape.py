"""vLLM's metrics by the names of each release, several engines and replicas together, and over restarts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from replicas import METRICS

from autobot_llm.observability.names import PROVIDER_METRICS
from autobot_llm.providers.vllm.scrape import (
    SERIES,
    Accumulated,
    EngineFacts,
    combined,
    names_in,
    read_engine_facts,
    read_figures,
)
from autobot_llm.tuning.knobs.vllm import READ

FIGURES = {series.figure for series in SERIES}


@pytest.mark.parametrize("version", [*READ, "0.17", "0.40", None, "dev"])
def test_every_figure_has_a_name_in_every_release(version: str | None) -> None:
    names = names_in(version)
    assert {series.figure for series in names.values()} == FIGURES
    if version is not None and version != "dev":
        assert len(names) == len(FIGURES), "one name for each"


def test_the_names_changed_with_0_10() -> None:
    assert "vllm:gpu_cache_usage_perc" in names_in("0.9.0.1")
    assert "vllm:kv_cache_usage_perc" not in names_in("0.9.0.1")
    assert "vllm:kv_cache_usage_perc" in names_in("0.10.0")
    assert "vllm:gpu_cache_usage_perc" not in names_in("0.10.0")
    old = b'vllm:gpu_prefix_cache_queries_total{engine="0"} 8.0\nvllm:gpu_prefix_cache_hits_total{engine="0"} 2.0\n'
    assert combined([read_figures(old, "0.9.0.1")])["prefix_cache_hit_rate"] == 0.25
    assert read_figures(old, "0.33.0") == {}


def test_two_names_for_one_figure_are_not_added_up() -> None:
    page = b"vllm:gpu_cache_usage_perc 0.5\nvllm:kv_cache_usage_perc 0.5\n"
    for version in ("0.10.2", None):
        assert read_figures(page, version) == {"kv_cache_usage": 0.5}


def test_the_engines_of_a_server_are_summed_and_shares_averaged() -> None:
    page = METRICS + METRICS.replace('engine="0"', 'engine="1"').replace("0.25", "0.75")
    figures = read_figures(page.encode(), "0.33.0")
    assert figures["num_running"] == 6
    assert figures["num_waiting"] == 4, "the series by reason is another one"
    assert figures["kv_cache_usage"] == 0.5


def test_values_that_are_no_numbers_are_left_out() -> None:
    assert read_figures(b"vllm:num_requests_running NaN\nvllm:num_requests_waiting 1\n", None) == {"num_waiting": 1}


def test_the_facts_of_a_server_are_read() -> None:
    assert read_engine_facts(METRICS.encode()) == EngineFacts(True, "fp8", 1000, True)
    assert read_engine_facts(b"") == EngineFacts()
    assert read_engine_facts(b'vllm:cache_config_info{num_gpu_blocks="None"} 1.0\n') == EngineFacts()


@given(st.lists(st.integers(0, 100), min_size=1, max_size=20))
def test_a_counter_never_falls_and_counts_everything(readings: list[int]) -> None:
    accumulated = Accumulated()
    expected, last, seen = 0, 0, 0.0
    for reading in readings:
        expected += reading - last if reading >= last else reading
        last = reading
        accumulated.update({"num_generated_tokens": float(reading), "num_running": 1.0})
        assert accumulated.figures["num_generated_tokens"] == expected >= seen
        seen = accumulated.figures["num_generated_tokens"]
    accumulated.forget_gauges()
    assert accumulated.figures == {"num_generated_tokens": expected}


def test_rates_are_of_all_replicas_together_and_absent_where_nothing_was_counted() -> None:
    one = {"num_draft_tokens": 100.0, "num_accepted_tokens": 100.0}
    other = {"num_draft_tokens": 300.0, "num_accepted_tokens": 0.0}
    assert combined([one, other])["speculation_acceptance_rate"] == 0.25
    assert "speculation_acceptance_rate" not in combined([{"num_draft_tokens": 0.0}])
    assert combined([]) == {}


def test_the_figures_that_prometheus_shows_are_given() -> None:
    shown = {spec.figure for spec in PROVIDER_METRICS}
    given_figures = combined([read_figures(METRICS.encode(), "0.33.0")])
    assert {
        "num_running", "num_waiting", "num_preemptions", "num_generated_tokens", "kv_cache_usage",
        "prefix_cache_hit_rate", "speculation_acceptance_rate", "num_draft_tokens", "num_accepted_tokens",
    } <= shown & set(given_figures)  # fmt: skip
