"""Counters, gauges and histograms that cost little to record. Knows Prometheus' families; knows no metric by name.

prometheus-client's own are made for threads and processes: a lock and a lookup for each call, some 15 calls a request
and one for each piece of a stream. These belong to one event loop, and prometheus-client writes the page as before.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Value:
    """A number under one set of labels."""

    __slots__ = ("number",)

    def __init__(self) -> None:
        self.number = 0.0

    def inc(self, amount: float = 1.0) -> None:
        self.number += amount

    def dec(self) -> None:
        self.number -= 1.0


class Values(Collector):
    """A counter or a gauge: one number for each set of labels that was used."""

    def __init__(self, name: str, help: str, labels: Sequence[str], *, is_counter: bool) -> None:
        self._name, self._help, self._labels = name, help, labels
        self._family = CounterMetricFamily if is_counter else GaugeMetricFamily
        self._values: dict[tuple[str, ...], Value] = {}

    def labels(self, *labels: str) -> Value:
        value = self._values.get(labels)
        if value is None:
            value = self._values[labels] = Value()
        return value

    def collect(self) -> Iterator[Metric]:
        family = self._family(self._name, self._help, labels=self._labels)
        for labels, value in self._values.items():
            family.add_metric(labels, value.number)
        yield family


class Observations:
    """How often values fell into each bucket, under one set of labels."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * len(bounds)
        self.total = 0.0

    def observe(self, value: float, num_times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += num_times
        self.total += value * num_times


class Distribution(Collector):
    """A histogram; `buckets` are upper bounds, included, in rising order, without the infinite one."""

    def __init__(self, name: str, help: str, labels: Sequence[str], buckets: Sequence[float]) -> None:
        self._name, self._help, self._labels = name, help, labels
        self._bounds = (*buckets, math.inf)
        self._observations: dict[tuple[str, ...], Observations] = {}

    def labels(self, *labels: str) -> Observations:
        observations = self._observations.get(labels)
        if observations is None:
            observations = self._observations[labels] = Observations(self._bounds)
        return observations

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._help, labels=self._labels)
        names = [floatToGoString(bound) for bound in self._bounds]  # type: ignore[no-untyped-call]
        for labels, seen in self._observations.items():
            buckets = list(zip(names, map(float, accumulate(seen.counts)), strict=True))
            family.add_metric(labels, buckets=buckets, sum_value=seen.total)
        yield family
