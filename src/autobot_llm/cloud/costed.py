"""Count what each answer costs and keep within the budgets. Knows requests, prices and the account."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from autobot_llm.cloud.budgets import Budgets
from autobot_llm.cloud.guarded_redis import GuardedRedis
from autobot_llm.cloud.hedged import NAME as HEDGING
from autobot_llm.cloud.ledger import FILE_NAME, Ledger
from autobot_llm.cloud.prices import Price
from autobot_llm.cloud.pricing import Cost, PriceTable, cost_of, load_prices
from autobot_llm.cloud.rate_limited import CHARACTERS_PER_TOKEN, estimated_prompt_tokens
from autobot_llm.cloud.shared_spending import FileSpending, RedisSpending, SharedSpending
from autobot_llm.cloud.spending_script import SCRIPT
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
        per_day, per_month = settings.cloud_budget_per_day, settings.cloud_budget_per_month
        self._redis: GuardedRedis | None = None
        shared: SharedSpending | None = None
        if per_day is not None or per_month is not None:
            shared = FileSpending(settings.cache_dir / FILE_NAME)
            if settings.redis_url is not None:
                without = "budgets are kept by what this host has spent"
                self._redis = GuardedRedis(settings.redis_url, SCRIPT, without=without)
                shared = RedisSpending(self._redis)
        self.budgets = Budgets(self.ledger, per_day, per_month, shared)
        self._accounts: dict[str, Account] = {}

    async def start(self) -> None:
        await self.ledger.start()
        await self.budgets.start()

    async def close(self) -> None:
        await self.ledger.close()
        await self.budgets.close()

    def wrap(self, chain: Streamer, provider: Provider) -> Streamer:
        return Costed(chain, self._account(provider))

    def wrap_embedder(self, embedder: Embedder, provider: Provider) -> Embedder:
        return CostedEmbedder(embedder, self._account(provider))

    def metrics(self) -> dict[str, float]:
        return {"dollars_today": self.ledger.spent_today(), "dollars_this_month": self.ledger.spent_this_month()}

    def metrics_of(self, provider: str) -> dict[str, float]:
        account = self._accounts.get(provider)
        if account is None:
            return {}
        figures = {"dollars_spent": account.spent, "dollars_saved": account.saved}
        return (
            figures
            if self._redis is None
            else figures
            | {
                "shared_budgets_up": float(self._redis.is_usable),
                "num_shared_budget_failures": self._redis.num_failures,
            }
        )

    def _account(self, provider: Provider) -> Account:
        if (account := self._accounts.get(provider.name)) is None:
            account = Account(provider.name, self.prices, self.ledger, self.budgets)
            self._accounts[provider.name] = account
        return account


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

    async def reserve(self, model: str | None, most: Usage) -> float:
        """Set aside what `most` costs; returns it. Raises BudgetExceededError."""
        if not self.budgets.are_set:
            return 0.0
        _, price = self.price_of(model)
        if price is None:
            self._warn_unpriced(model or "the default model")
        dollars = 0.0 if price is None else cost_of(price, most).spent
        await self.budgets.reserve(dollars)
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
            reserved = await account.reserve(
                request.model, _estimated(request, (request.max_tokens or 0) * request.num_choices)
            )
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
        spent, reason = cost.spent, f"{self._account.provider}/{model} at its price of {price.dated}"
        if any(line.name == HEDGING and line.applied for line in finish.optimizations):
            unused = Usage(prompt_tokens=finish.usage.prompt_tokens, completion_tokens=0)
            spent += self._account.enter(price, model, tenant, unused).spent
            reason += "; with the prompt of the call that was given up, which is an estimate"
        outcome = OptimizationOutcome(
            name=NAME, applied=True, reason=reason, dollars_spent=spent, dollars_saved=cost.saved or None
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
        reserved = await account.reserve(request.model, Usage(prompt_tokens=num_tokens, completion_tokens=0))
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
