"""Read vLLM's /metrics: the few figures that are ours too, by the names of each release. Knows no HTTP."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from autobot_llm.errors import ConfigurationError, ProviderError
from autobot_llm.tuning.knobs.versions import ALWAYS, Span, Spans, holds, release_of


class Series(msgspec.Struct, frozen=True):
    """One figure of ours, and what a release of vLLM calls it. `combine` joins the engines of one server."""

    figure: str
    metric: str
    spans: Spans = ALWAYS
    combine: Literal["sum", "mean"] = "sum"


_SINCE_0_10: Spans = (Span(since="0.10.0"),)
_UNTIL_0_12: Spans = (Span(gone_by="0.12.0"),)
# Read from the releases. Where a release has two names for a figure, the first one here counts.
SERIES = (
    Series("num_running", "vllm:num_requests_running"),
    Series("num_waiting", "vllm:num_requests_waiting"),
    Series("num_preemptions", "vllm:num_preemptions_total"),
    Series("num_generated_tokens", "vllm:generation_tokens_total"),
    Series("kv_cache_usage", "vllm:kv_cache_usage_perc", _SINCE_0_10, "mean"),
    Series("kv_cache_usage", "vllm:gpu_cache_usage_perc", _UNTIL_0_12, "mean"),
    Series("num_prefix_query_tokens", "vllm:prefix_cache_queries_total", _SINCE_0_10),
    Series("num_prefix_query_tokens", "vllm:gpu_prefix_cache_queries_total", _UNTIL_0_12),
    Series("num_prefix_hit_tokens", "vllm:prefix_cache_hits_total", _SINCE_0_10),
    Series("num_prefix_hit_tokens", "vllm:gpu_prefix_cache_hits_total", _UNTIL_0_12),
    Series("num_draft_tokens", "vllm:spec_decode_num_draft_tokens_total"),
    Series("num_accepted_tokens", "vllm:spec_decode_num_accepted_tokens_total"),
)
COUNTERS = frozenset(
    {
        "num_preemptions",
        "num_generated_tokens",
        "num_prefix_query_tokens",
        "num_prefix_hit_tokens",
        "num_draft_tokens",
        "num_accepted_tokens",
    }
)

_CACHE_INFO = "vllm:cache_config_info"
_DRAFTS = "vllm:spec_decode_num_draft_tokens_total"


def names_in(version: str | None) -> dict[str, Series]:
    """What that release calls our figures, by metric; every name where the version is not known."""
    try:
        known = version is not None and bool(release_of(version))
    except ConfigurationError:
        known = False
    found: dict[str, Series] = {}
    taken: set[str] = set()
    for series in SERIES:
        if known and (series.figure in taken or not holds(series.spans, version or "")):
            continue
        found[series.metric] = series
        taken.add(series.figure)
    return found


def read_figures(page: bytes, version: str | None) -> dict[str, float]:
    """Our figures from a page in Prometheus' text format, summed over the engines of the server.

    Lines about anything else are dropped before they are parsed: a page of vLLM's has thousands. Raises ProviderError
    for a page that is no such text.
    """
    names = names_in(version)
    values: dict[str, list[float]] = {}
    try:
        for family in text_string_to_metric_families(_lines_about(names, page)):
            for sample in family.samples:
                if sample.name in names and math.isfinite(sample.value):
                    values.setdefault(sample.name, []).append(sample.value)
    except ValueError as exc:
        raise ProviderError(f"vllm: its metrics are no Prometheus text: {exc}") from exc
    figures: dict[str, float] = {}
    for metric, series in names.items():
        if metric in values and series.figure not in figures:
            total = sum(values[metric])
            figures[series.figure] = total / len(values[metric]) if series.combine == "mean" else total
    return figures


class EngineFacts(msgspec.Struct, frozen=True):
    """What a server's metrics tell of how it was started; None where they do not."""

    prefix_caching: bool | None = None
    kv_cache_dtype: str | None = None
    num_blocks: int | None = None
    drafts: bool = False


def read_engine_facts(page: bytes) -> EngineFacts:
    """The facts on a page of metrics; empty for one that is no Prometheus text."""
    info: Mapping[str, str] = {}
    drafts = False
    try:
        for family in text_string_to_metric_families(_lines_about((_CACHE_INFO, _DRAFTS), page)):
            for sample in family.samples:
                drafts = drafts or sample.name == _DRAFTS
                info = sample.labels if sample.name == _CACHE_INFO else info
    except ValueError:
        return EngineFacts()
    caching, num_blocks = info.get("enable_prefix_caching"), info.get("num_gpu_blocks", "")
    return EngineFacts(
        prefix_caching=None if caching is None else caching == "True",
        kv_cache_dtype=info.get("cache_dtype"),
        num_blocks=int(num_blocks) if num_blocks.isdecimal() else None,
        drafts=drafts,
    )


def _lines_about(names: Iterable[str], page: bytes) -> str:
    beginnings = tuple(name.encode() for name in names)
    wanted = [line for line in page.splitlines() if line.startswith(beginnings)]
    return b"\n".join(wanted).decode("utf-8", "replace") + "\n"


class Accumulated:
    """The figures of one replica over its restarts: a counter that falls has begun anew, and goes on where it was."""

    def __init__(self) -> None:
        self._latest: dict[str, float] = {}
        self._before: dict[str, float] = {}

    def update(self, figures: Mapping[str, float]) -> None:
        for name in COUNTERS & figures.keys():
            if figures[name] < self._latest.get(name, 0.0):
                self._before[name] = self._before.get(name, 0.0) + self._latest[name]
        self._latest = dict(figures)

    def forget_gauges(self) -> None:
        """The replica cannot be asked: nothing runs or waits there as far as anybody knows."""
        self._latest = {name: value for name, value in self._latest.items() if name in COUNTERS}

    @property
    def figures(self) -> dict[str, float]:
        return {name: value + self._before.get(name, 0.0) for name, value in self._latest.items()}


def combined(replicas: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The figures of several replicas as one provider's, with the rates that they give."""
    together: dict[str, list[float]] = {}
    for figures in replicas:
        for name, value in figures.items():
            together.setdefault(name, []).append(value)
    means = {series.figure for series in SERIES if series.combine == "mean"}
    joined = {name: sum(values) / len(values) if name in means else sum(values) for name, values in together.items()}
    for rate, part, whole in (
        ("prefix_cache_hit_rate", "num_prefix_hit_tokens", "num_prefix_query_tokens"),
        ("speculation_acceptance_rate", "num_accepted_tokens", "num_draft_tokens"),
    ):
        if joined.get(whole):
            joined[rate] = joined.get(part, 0.0) / joined[whole]
    return joined
