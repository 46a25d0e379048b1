"""The cheap instruments put the same page out as prometheus-client's own."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from autobot_llm.observability.instruments import Distribution, Values

LABELS = st.tuples(st.text(max_size=5), st.sampled_from(["a", "b"]))
AMOUNTS = st.floats(0, 1e6)
BUCKETS = (0.5, 1, 2.5, 10)


def page(registry: CollectorRegistry) -> list[str]:
    """The page's lines, without the times of creation, which only prometheus-client's own counters tell."""
    lines = generate_latest(registry).decode().split("\n")
    return sorted(line for line in lines if not re.match(r"(# \w+ )?\w+_created\b", line))


@given(
    st.lists(st.tuples(LABELS, AMOUNTS), max_size=8),
    st.lists(st.tuples(LABELS, st.booleans()), max_size=8),
    st.lists(st.tuples(LABELS, st.one_of(AMOUNTS, st.sampled_from(BUCKETS))), max_size=12),
)
def test_the_page_is_that_of_prometheus_client(
    counted: list[tuple[tuple[str, str], float]],
    raised: list[tuple[tuple[str, str], bool]],
    observed: list[tuple[tuple[str, str], float]],
) -> None:
    names = ("one", "other")
    reference, ours = CollectorRegistry(), CollectorRegistry()
    counter = Counter("c", "Counts.", names, registry=reference)
    gauge = Gauge("g", "Goes up and down.", names, registry=reference)
    histogram = Histogram("h", "Falls into buckets.", names, buckets=BUCKETS, registry=reference)
    values = Values("c", "Counts.", names, is_counter=True)
    levels = Values("g", "Goes up and down.", names, is_counter=False)
    distribution = Distribution("h", "Falls into buckets.", names, BUCKETS)
    for one in (values, levels, distribution):
        ours.register(one)
    for labels, amount in counted:
        counter.labels(*labels).inc(amount)
        values.labels(*labels).inc(amount)
    for labels, is_up in raised:
        gauge.labels(*labels).inc() if is_up else gauge.labels(*labels).dec()
        levels.labels(*labels).inc() if is_up else levels.labels(*labels).dec()
    for labels, amount in observed:
        histogram.labels(*labels).observe(amount)
        distribution.labels(*labels).observe(amount)
    assert page(ours) == page(reference)
