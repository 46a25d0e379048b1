"""What an answer costs, by its tokens and the model's price. Knows the price table; knows nothing of who pays."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from autobot_llm.cloud.prices import PRICES, Price, Rates
from autobot_llm.errors import ConfigurationError
from autobot_llm.types import Usage

_MILLION = 1_000_000
_SNAPSHOT = re.compile(r"(-\d{4}-\d{2}-\d{2}|-\d{8}|-latest)$")


class Cost(msgspec.Struct, frozen=True):
    """US dollars: spent, and saved by the provider's cache (less what writing it cost) and by its price for batches."""

    spent: float
    saved: float


class PriceTable:
    """Prices by "provider/model". A dated snapshot of a model costs what the model costs, unless it has a price."""

    def __init__(self, more: Mapping[str, Price] | None = None) -> None:
        self._prices = {**PRICES, **(more or {})}

    def of(self, provider: str, model: str) -> Price | None:
        """The price of a model, None where it is not known."""
        name = f"{provider}/{model}"
        return self._prices.get(name) or self._prices.get(_SNAPSHOT.sub("", name))


def load_prices(path: Path | None) -> PriceTable:
    """Our table with the prices of a JSON file, an object {"provider/model": {"input": 1.5, "output": 6, "dated":
    "2026-11-20", ...}} with the fields of `Price`. Raises ConfigurationError, which says what is wrong in it.
    """
    if path is None:
        return PriceTable()
    try:
        return PriceTable(msgspec.json.decode(path.read_bytes(), type=dict[str, Price]))
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"AUTOBOT_CLOUD_PRICES='{path}': {exc}") from exc


def cost_of(price: Price, usage: Usage, *, is_batch: bool = False) -> Cost:
    """What `usage` costs at `price`."""
    rates: Rates = price
    if price.long_prompt is not None and usage.prompt_tokens > (price.long_prompt_from or 0):
        rates = price.long_prompt
    cached_rate = rates.input if rates.cached_input is None else rates.cached_input
    write_rate = rates.input if rates.cache_write is None else rates.cache_write
    num_plain = max(0, usage.prompt_tokens - usage.cached_tokens - usage.cache_write_tokens)
    full = (
        num_plain * rates.input
        + usage.cached_tokens * cached_rate
        + usage.cache_write_tokens * write_rate
        + usage.completion_tokens * rates.output
    ) / _MILLION
    by_cache = usage.cached_tokens * (rates.input - cached_rate) - usage.cache_write_tokens * (write_rate - rates.input)
    share = price.batch if is_batch else 1.0
    return Cost(spent=full * share, saved=by_cache / _MILLION + full * (1 - share))
