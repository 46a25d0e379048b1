"""Count what the service does, for Prometheus. Knows events and clocks; knows nothing of HTTP or of engines.

names.py declares every name once, as data. `RequestRecord.observe` wraps the event stream of one request and is the
only place that records figures from events; a provider's own figures are read when the page is scraped.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing
from typing import TypeVar

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from autobot_llm.observability import names
from autobot_llm.observability.instruments import Distribution, Observations, Values
from autobot_llm.observability.names import PROVIDER_METRICS, MetricSpec
from autobot_llm.types import ChoiceEnd, Event, Finish, Start, Usage

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

InstrumentT = TypeVar("InstrumentT", Values, Distribution)

ProviderFigures = Callable[[], Mapping[str, Mapping[str, float]]]


class Metrics:
    """The metrics of one service, in a registry of their own. Used from one event loop."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        self.requests = self._counter(names.REQUESTS)
        self.errors = self._counter(names.ERRORS)
        self.tokens = self._counter(names.TOKENS)
        self.in_flight = self._gauge(names.IN_FLIGHT)
        self.latency = self._histogram(names.LATENCY)
        self.first_token = self._histogram(names.FIRST_TOKEN)
        self.inter_token = self._histogram(names.INTER_TOKEN)
        self.queue_wait = self._histogram(names.QUEUE_WAIT)
        self.queue_position = self._histogram(names.QUEUE_POSITION)

    def _counter(self, spec: MetricSpec) -> Values:
        return self._registered(Values(spec.name, spec.help, spec.labels, is_counter=True))

    def _gauge(self, spec: MetricSpec) -> Values:
        return self._registered(Values(spec.name, spec.help, spec.labels, is_counter=False))

    def _histogram(self, spec: MetricSpec) -> Distribution:
        return self._registered(Distribution(spec.name, spec.help, spec.labels, spec.buckets))

    def _registered(self, instrument: InstrumentT) -> InstrumentT:
        self.registry.register(instrument)
        return instrument

    def watch_providers(self, figures: ProviderFigures) -> None:
        """Read `figures()`, provider name -> figure -> value, at every scrape."""
        self.registry.register(_ProviderCollector(figures))

    def begin(self, endpoint: str) -> RequestRecord:
        """Open the record of one request; its `end` must be called."""
        return RequestRecord(self, endpoint)

    def page(self) -> bytes:
        """The whole registry in Prometheus' text format; its content type is `CONTENT_TYPE`."""
        return generate_latest(self.registry)


class RequestRecord:
    """What is measured of one request, from its arrival to `end`."""

    __slots__ = ("_endpoint", "_metrics", "_model", "_started")

    def __init__(self, metrics: Metrics, endpoint: str) -> None:
        self._metrics = metrics
        self._endpoint = endpoint
        # The name a client asked for is no label: anyone could fill the registry with names that do not exist.
        self._model = "unknown"
        self._started = time.perf_counter()
        metrics.in_flight.labels(endpoint).inc()

    async def observe(self, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
        """Pass the events through, recording the pace of their pieces and the totals at their `Finish`."""
        last_at: dict[int, float] = {}  # choice index -> when its latest piece came
        inter_token: Observations | None = None
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Start):
                    self._model = event.model
                elif isinstance(event, Finish):
                    self._finish(event)
                elif not isinstance(event, ChoiceEnd):
                    now, index = time.perf_counter(), event.index
                    if inter_token is None:
                        inter_token = self._metrics.inter_token.labels(self._model)
                        self._metrics.first_token.labels(self._model).observe(now - self._started)
                    elif index in last_at:
                        inter_token.observe(now - last_at[index])
                    last_at[index] = now
                yield event

    def replay(self, model: str, usage: Usage, num_pieces: int, num_repeats: int) -> None:
        """What `observe` records, for an answer whose pieces are all there: `num_repeats` followed one of their own."""
        self.count(model, usage)
        if num_pieces:
            self._metrics.inter_token.labels(model).observe(0.0, num_repeats)
            self._metrics.first_token.labels(model).observe(time.perf_counter() - self._started)

    def count(self, model: str, usage: Usage) -> None:
        """Record whose answer it is and its tokens, where there is no stream of events to observe."""
        self._model = model
        tokens = self._metrics.tokens
        tokens.labels(model, "prompt").inc(usage.prompt_tokens)
        tokens.labels(model, "completion").inc(usage.completion_tokens)
        tokens.labels(model, "cached").inc(usage.cached_tokens)

    def _finish(self, finish: Finish) -> None:
        metrics, model, timings = self._metrics, self._model, finish.timings
        self.count(model, finish.usage)
        if timings.queued is not None:
            metrics.queue_wait.labels(model).observe(timings.queued)
        if timings.queue_position is not None:
            metrics.queue_position.labels(model).observe(timings.queue_position)

    def end(self, status: int, error_code: str | None) -> None:
        """Close the record with the HTTP status, 499 where the client left, and the error's code if there was one."""
        metrics = self._metrics
        metrics.in_flight.labels(self._endpoint).dec()
        metrics.requests.labels(self._endpoint, self._model, str(status)).inc()
        metrics.latency.labels(self._endpoint, self._model).observe(time.perf_counter() - self._started)
        if error_code is not None:
            metrics.errors.labels(error_code).inc()


class _ProviderCollector(Collector):
    """Turns the providers' own figures into samples when Prometheus asks; a figure that none gives is left out."""

    def __init__(self, figures: ProviderFigures) -> None:
        self._figures = figures

    def describe(self) -> Iterator[Metric]:
        return (_family(spec) for spec in PROVIDER_METRICS)

    def collect(self) -> Iterator[Metric]:
        by_provider = self._figures()
        for spec in PROVIDER_METRICS:
            family = _family(spec)
            for provider, figures in by_provider.items():
                if spec.figure in figures:
                    family.add_metric([provider], figures[spec.figure])
            if family.samples:
                yield family


def _family(spec: MetricSpec) -> CounterMetricFamily | GaugeMetricFamily:
    family = CounterMetricFamily if spec.kind == "counter" else GaugeMetricFamily
    return family(spec.name, spec.help, labels=spec.labels)
