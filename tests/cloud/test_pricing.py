"""What an answer costs, what was saved, and where prices come from."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobot_llm.cloud.prices import PRICES, Price, Rates
from autobot_llm.cloud.pricing import PriceTable, cost_of, load_prices
from autobot_llm.errors import ConfigurationError
from autobot_llm.types import Usage

PRICE = Price(input=2.0, output=10.0, cached_input=0.5, cache_write=2.5, dated="2026-01-01")


def usage(prompt: int, completion: int, cached: int = 0, written: int = 0) -> Usage:
    return Usage(
        prompt_tokens=prompt, completion_tokens=completion, cached_tokens=cached, cache_write_tokens=written
    )  # fmt: skip


def test_each_kind_of_token_has_its_price() -> None:
    cost = cost_of(PRICE, usage(1_000_000, 100_000, cached=300_000, written=200_000))
    assert cost.spent == pytest.approx(0.5 * 2 + 0.3 * 0.5 + 0.2 * 2.5 + 0.1 * 10)
    assert cost.saved == pytest.approx(0.3 * 1.5 - 0.2 * 0.5)


def test_a_batch_costs_its_share_and_the_rest_is_saved() -> None:
    whole, batch = (cost_of(PRICE, usage(1000, 1000, cached=500), is_batch=is_batch) for is_batch in (False, True))
    assert batch.spent == pytest.approx(whole.spent / 2)
    assert batch.spent + batch.saved == pytest.approx(whole.spent + whole.saved)


def test_a_long_prompt_has_rates_of_its_own_for_the_whole_request() -> None:
    price = Price(
        input=1.0, output=2.0, dated="2026-01-01", long_prompt_from=100, long_prompt=Rates(input=5.0, output=10.0)
    )  # fmt: skip
    assert cost_of(price, usage(100, 10)).spent == pytest.approx((100 + 20) / 1e6)
    assert cost_of(price, usage(101, 10)).spent == pytest.approx((505 + 100) / 1e6)


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6))
def test_what_is_spent_and_saved_is_what_it_would_have_cost(prompt: int, cached: int, written: int, out: int) -> None:
    cached, written = min(cached, prompt), min(written, max(0, prompt - cached))
    for price in PRICES.values():
        cost = cost_of(price, usage(prompt, out, cached, written))
        without = cost_of(price, usage(prompt, out))
        assert cost.spent >= 0
        assert cost.spent + cost.saved == pytest.approx(without.spent, abs=1e-9)


def test_every_price_is_dated_and_a_cached_token_is_never_dearer() -> None:
    for name, price in PRICES.items():
        assert date.fromisoformat(price.dated) > date(2026, 1, 1), name
        assert price.cached_input is None or price.cached_input < price.input
        assert "/" in name


def test_a_snapshot_costs_what_its_model_costs_and_an_unknown_model_has_no_price() -> None:
    table = PriceTable({"openai/gpt-4o-2024-05-13": PRICE})
    assert table.of("openai", "gpt-4o-2024-08-06") == PRICES["openai/gpt-4o"]
    assert table.of("openai", "gpt-4o-2024-05-13") is PRICE
    assert table.of("anthropic", "claude-sonnet-4-5-20250929") == PRICES["anthropic/claude-sonnet-4-5"]
    assert table.of("openai", "gpt-4o-turbo") is None
    assert table.of("groq", "gpt-4o") is None


def test_a_file_adds_prices_and_replaces_ours(tmp_path: Path) -> None:
    file = tmp_path / "prices.json"
    file.write_text('{"groq/llama": {"input": 1, "output": 2, "dated": "2026-11-20"},'
                    ' "openai/gpt-4o": {"input": 9, "output": 9, "dated": "2026-11-20"}}')  # fmt: skip
    table = load_prices(file)
    assert (table.of("groq", "llama") or PRICE).output == 2
    assert (table.of("openai", "gpt-4o") or PRICE).input == 9
    assert table.of("openai", "gpt-5") == PRICES["openai/gpt-5"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "truncated"),
        ('{"a/b": {"input": "cheap", "output": 1, "dated": "2026-11-20"}}', "input"),
        ('{"a/b": {"input": 1, "outptu": 1, "dated": "2026-11-20"}}', "outptu"),
        (None, "No such file"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_what_is_wrong(tmp_path: Path, text: str | None, told: str) -> None:
    file = tmp_path / "prices.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigurationError, match=told) as raised:
        load_prices(file)
    assert "AUTOBOT_CLOUD_PRICES" in str(raised.value)
