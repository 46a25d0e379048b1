"""Count what each answer costs and keep within the budgets. Knows requests, prices and the account."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from autobot_llm.cloud.ledger import FILE_NAME, Ledger
from autobot_llm.cloud.prices import Price
from autobot_llm.cloud.pricing import Cost, PriceTable, cost_of, load_prices
from autobot_llm.cloud.rate_limited import CHARACTERS_PER_TOKEN, estimated_prompt_tokens
from autobot_llm.errors import BudgetExceededError
from autobot_llm.providers.base import Embedder, Link, Provider, Streamer
from autobot_llm.report import OptimizationOutcome
from autobot_llm.settings import Settings
from autobot_llm.types import (
    EmbeddingRequest,
    EmbeddingResponse,
    Event,
    Finish,
    LLMRequest,
    ReasoningDelta,
    Start,
    TextDelta,
    ToolCallDelta,
    Usage,
)

logger = logging.getLogger("autobot_llm.cloud")

NAME = "cost"
_MOST_WARNINGS = 100


class CostLink(Link):
    """Puts `Costed` in front of every provider that is paid; all share one account and its budgets."""

    def __init__(self, settings: Settings) -> None:
        self.prices = load_prices(settings.cloud_prices)
        self.ledger = Ledger(settings.cache_dir / FILE_NAME)
        self.budgets = Budgets(self.ledger, settings.cloud_budget_per_day, settings.cloud_budget_per_month)
        self._accounts: dict[str, Account] = {}

    async def start(self) -> None:
        await self.ledger.start()

    async def close(self) -> None:
        await self.ledger.close()

    def wrap(self, chain: Streamer, provider: Provider) -> Streamer:
        return Costed(chain, self._account(provider))

    def wrap_embedder(self, embedder: Embedder, provider: Provider) -> Embedder:
        return CostedEmbedder(embedder, self._account(provider))

    def metrics(self) -> dict[str, float]:
        return {"dollars_today": self.ledger.spent_today(), "dollars_this_month": self.ledger.spent_this_month()}

    def metrics_of(self, provider: str) -> dict[str, float]:
        account = self._accounts.get(provider)
        return {} if account is None else {"dollars_spent": account.spent, "dollars_saved": account.saved}

    def _account(self, provider: Provider) -> Account:
        if (account := self._accounts.get(provider.name)) is None:
            account = Account(provider.name, self.prices, self.ledger, self.budgets)
            self._accounts[provider.name] = account
        return account


class Budgets:
    """What may be spent in a day and in a month (US dollars; None: any sum), by answers and those under way."""

    def __init__(self, ledger: Ledger, per_day: float | None, per_month: float | None) -> None:
        self._ledger = ledger
        self._per_day = per_day
        self._per_month = per_month
        self._reserved = 0.0

    @property
    def are_set(self) -> bool:
        return self._per_day is not None or self._per_month is not None

    def reserve(self, dollars: float) -> None:
        """Set `dollars` aside for a request, until `release`. Raises BudgetExceededError where that is too much."""
        ledger = self._ledger
        if self._per_day is not None:
            self._check(dollars, ledger.spent_today(), self._per_day, "day", ledger.seconds_left(of_month=False))
        if self._per_month is not None:
            left = ledger.seconds_left(of_month=True)
            self._check(dollars, ledger.spent_this_month(), self._per_month, "month", left)
        self._reserved += dollars

    def release(self, dollars: float) -> None:
        self._reserved -= dollars

    def _check(self, dollars: float, spent: float, budget: float, period: str, seconds_left: float) -> None:
        if spent + self._reserved + dollars > budget or spent >= budget:
            under_way = (
                f" and {self._reserved:.4f} are set aside for requests under way" if self._reserved > 1e-9 else ""
            )
            raise BudgetExceededError(
                f"the budget of {budget:g} dollars per {period} (AUTOBOT_CLOUD_BUDGET_PER_{period.upper()}) does not "
                f"allow the request, which may cost {dollars:.4f}: {spent:.4f} are spent{under_way}",
                retry_after=seconds_left,
            )


class Account:
    """One provider's part of what is spent; `spent` and `saved` are dollars since the start."""

    def __init__(self, provider: str, prices: PriceTable, ledger: Ledger, budgets: Budgets) -> None:
        self.provider = provider
        self.budgets = budgets
        self.spent = 0.0
        self.saved = 0.0
        self._prices = prices
        self._ledger = ledger
        self._unpriced: set[str] = set()

    def price_of(self, *models: str | None) -> tuple[str, Price | None]:
        """The first of `models` that has a price, and the price; else the first one's name and None."""
        for model in models:
            if model is not None and (price := self._prices.of(self.provider, model)) is not None:
                return model, price
        return next((model for model in models if model is not None), ""), None

    def reserve(self, model: str | None, most: Usage) -> float:
        """Set aside what `most` costs; returns it. Raises BudgetExceededError."""
        if not self.budgets.are_set:
            return 0.0
        _, price = self.price_of(model)
        if price is None:
            self._warn_unpriced(model or "the default model")
        dollars = 0.0 if price is None else cost_of(price, most).spent
        self.budgets.reserve(dollars)
        return dollars

    def enter(self, price: Price, model: str, tenant: str, usage: Usage) -> Cost:
        cost = cost_of(price, usage)
        self.spent += cost.spent
        self.saved += cost.saved
        self._ledger.add(self.provider, model, tenant, usage, spent=cost.spent, saved=cost.saved)
        return cost

    def _warn_unpriced(self, model: str) -> None:
        if model not in self._unpriced and len(self._unpriced) < _MOST_WARNINGS:
            self._unpriced.add(model)
            logger.warning(
                "the price of %s/%s is not known, so what it costs does not count against the budget: "
                "AUTOBOT_CLOUD_PRICES can tell it", self.provider, model,
            )  # fmt: skip


class Costed:
    """`inner`, whose answers are entered in `account`.

    Before it is sent, a request counts by an estimate: its length, and the most that it lets be generated. An answer
    that breaks off or is given up counts by what had come of it, because no provider tells its cost.
    """

    def __init__(self, inner: Streamer, account: Account) -> None:
        self._inner = inner
        self._account = account

    async def stream(self, request: LLMRequest) -> AsyncGenerator[Event, None]:
        """The answer. Raises BudgetExceededError before anything is sent."""
        account = self._account
        reserved = 0.0
        if account.budgets.are_set:
            reserved = account.reserve(request.model, _estimated(request, (request.max_tokens or 0) * request.n))
        model = ""
        price: Price | None = None
        num_characters = 0
        is_open = False  # between the answer's first event and its last
        try:
            async with aclosing(self._inner.stream(request)) as events:
                async for event in events:
                    match event:
                        case TextDelta() | ReasoningDelta():
                            num_characters += len(event.text)
                        case ToolCallDelta():
                            num_characters += len(event.arguments)
                        case Start():
                            model, price = account.price_of(event.model, request.model)
                            is_open = price is not None
                        case Finish() if price is not None:
                            is_open = False
                            event = self._entered(event, price, model, request.tenant)
                    yield event
        finally:
            account.budgets.release(reserved)
            if is_open and price is not None:
                usage = _estimated(request, round(num_characters / CHARACTERS_PER_TOKEN))
                account.enter(price, model, request.tenant, usage)

    def _entered(self, finish: Finish, price: Price, model: str, tenant: str) -> Finish:
        cost = self._account.enter(price, model, tenant, finish.usage)
        outcome = OptimizationOutcome(
            name=NAME,
            applied=True,
            reason=f"{self._account.provider}/{model} at its price of {price.dated}",
            dollars_spent=cost.spent,
            dollars_saved=cost.saved or None,
        )
        return msgspec.structs.replace(finish, optimizations=(*finish.optimizations, outcome))


class CostedEmbedder:
    """`inner`, whose embeddings are entered in `account`."""

    def __init__(self, inner: Embedder, account: Account) -> None:
        self._inner = inner
        self._account = account

    async def embed(self, request: EmbeddingRequest) -> EmbeddingResponse:
        """As `Embedder.embed`. Raises BudgetExceededError before anything is sent."""
        account = self._account
        num_tokens = round(sum(map(len, request.inputs)) / CHARACTERS_PER_TOKEN)
        reserved = account.reserve(request.model, Usage(prompt_tokens=num_tokens, completion_tokens=0))
        try:
            response = await self._inner.embed(request)
        finally:
            account.budgets.release(reserved)
        model, price = account.price_of(request.model, response.model)
        if price is not None:
            account.enter(price, model, request.tenant, response.usage)
        return response


def _estimated(request: LLMRequest, num_completion_tokens: int) -> Usage:
    num_prompt_tokens = round(estimated_prompt_tokens(request))
    return Usage(prompt_tokens=num_prompt_tokens, completion_tokens=num_completion_tokens)
