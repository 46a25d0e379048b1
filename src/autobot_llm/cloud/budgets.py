"""Keep within what a day and a month may cost, by answers and by those under way, together with other workers.

Knows dollars and the account; knows nothing of requests or prices.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets

from autobot_llm.cloud.ledger import Ledger
from autobot_llm.cloud.shared_spending import SharedSpending
from autobot_llm.cloud.spending_script import HOLD_SECONDS, Position
from autobot_llm.errors import BudgetExceededError

GATHER_SECONDS = 0.3  # a little more than the account takes to write
MOST_ASKED = 128  # reservations of one question


class Budgets:
    """What may be spent in a day and in a month (US dollars; None: any sum).

    A request's estimate is set aside before it is sent and given back when its cost is known: what was spent and what
    is set aside never exceed a budget together, over all workers that use the same `shared`. While that cannot be used,
    the budgets are kept by what this host has spent, or by what all had when last heard of, where that is more;
    afterwards all of it is made up for. Belongs to one event loop between `start` and `close`.
    """

    def __init__(
        self, ledger: Ledger, per_day: float | None, per_month: float | None, shared: SharedSpending | None = None
    ) -> None:
        self._ledger = ledger
        self._per_day = per_day
        self._per_month = per_month
        self._reserved = 0.0
        self._shared = shared
        self._worker = secrets.token_hex(8)
        self._heard: dict[str, float] = {}  # dollars that all had spent when last heard of, by day and by month
        self._added_before = 0.0  # of what this process added, the part that is in `_heard`
        self._held_elsewhere = 0.0
        self._waiting: list[tuple[float, asyncio.Future[str]]] = []
        self._asking: asyncio.Task[None] | None = None
        self._telling: asyncio.Task[None] | None = None
        self._has_news = asyncio.Event()
        self._one_at_a_time = asyncio.Lock()  # a question that is overtaken would take the later one's sums back

    @property
    def are_set(self) -> bool:
        return self._per_day is not None or self._per_month is not None

    async def start(self) -> None:
        if self._shared is not None and self._telling is None:
            await self._shared.start()
            await self._ask([])
            self._telling = asyncio.create_task(self._keep_telling())

    async def close(self) -> None:
        """Tell the last figures, if that is quickly done. To be called when the ledger has been closed."""
        if self._shared is None:
            return
        for task in (self._telling, self._asking):
            if task is not None:
                task.cancel()
                await asyncio.wait((task,))
        self._telling = None
        await self._ask([])
        await self._shared.close()

    async def reserve(self, dollars: float) -> None:
        """Set `dollars` aside for a request, until `release`. Raises BudgetExceededError where that is too much."""
        self._check(dollars)
        self._reserved += dollars
        if self._shared is None or not self._shared.is_usable:
            return
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        waiter = (dollars, answer)
        self._waiting.append(waiter)
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask_for_all())
        try:
            said = await answer
        except asyncio.CancelledError:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            self.release(dollars)
            raise
        if said in ("day", "month"):
            self.release(dollars)
            raise self._refusal(dollars, said)

    def release(self, dollars: float) -> None:
        self._reserved -= dollars
        self._has_news.set()

    def _check(self, dollars: float) -> None:
        for period, budget in (("day", self._per_day), ("month", self._per_month)):
            if budget is not None:
                spent = self._spent(period)
                if spent >= budget or spent + self._reserved + dollars > budget:
                    raise self._refusal(dollars, period)

    def _spent(self, period: str) -> float:
        ledger, day = self._ledger, self._ledger.today()
        here = ledger.spent_today() if period == "day" else ledger.spent_this_month()
        heard = self._heard.get(day if period == "day" else day[:7])
        return here if heard is None else max(here, heard + ledger.added - self._added_before)

    def _refusal(self, dollars: float, period: str) -> BudgetExceededError:
        budget = self._per_day if period == "day" else self._per_month
        set_aside = self._reserved + self._held_elsewhere
        under_way = f" and {set_aside:.4f} are set aside for requests under way" if set_aside > 1e-9 else ""
        return BudgetExceededError(
            f"the budget of {budget:g} dollars per {period} (AUTOBOT_CLOUD_BUDGET_PER_{period.upper()}) does not "
            f"allow the request, which may cost {dollars:.4f}: {self._spent(period):.4f} are spent{under_way}",
            retry_after=self._ledger.seconds_left(of_month=period == "month"),
        )

    async def _ask_for_all(self) -> None:
        """Ask until nobody waits; what is not answered is allowed, as it passed the check here."""
        try:
            while self._waiting:
                asked, self._waiting = self._waiting[:MOST_ASKED], self._waiting[MOST_ASKED:]
                try:
                    await self._ask(asked)
                finally:
                    for _, answer in asked:
                        if not answer.done():
                            answer.set_result("yes")
        finally:
            self._asking = None

    async def _ask(self, asked: list[tuple[float, asyncio.Future[str]]]) -> None:
        """Tell what there is to tell, and ask for what `asked` want, which `_reserved` has in it already."""
        if self._shared is None:
            return
        async with self._one_at_a_time:
            asked = [waiter for waiter in asked if not waiter[1].done()]  # whose callers are still there
            wanted = [dollars for dollars, _ in asked]
            ledger, day = self._ledger, self._ledger.today()
            asked_for = sum(wanted) + sum(dollars for dollars, _ in self._waiting)
            position = Position(
                day=day,
                spent_day=ledger.written(day),
                spent_month=ledger.written(day[:7]),
                held=max(0.0, self._reserved - asked_for) + ledger.unwritten(),
            )
            if ledger.unwritten() > 0:  # once it is in the file, it is spent and no longer set aside: to be told, too
                self._has_news.set()
            added = ledger.added - ledger.unwritten()
            budgets = (self._per_day, self._per_month)
            standing = await self._shared.ask(self._worker, ledger.account, position, budgets, wanted)
        if standing is None:
            self._has_news.set()
            return
        self._heard = {day: standing.spent_day, day[:7]: standing.spent_month}
        self._added_before = added
        self._held_elsewhere = standing.held_elsewhere
        for (_, answer), said in zip(asked, standing.answers, strict=True):
            if not answer.done():
                answer.set_result(said)

    async def _keep_telling(self) -> None:
        """What was spent, soon after; and that this worker is alive, while it has anything set aside."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HOLD_SECONDS / 4):
                    await self._has_news.wait()
            await asyncio.sleep(GATHER_SECONDS)
            if self._asking is None:  # a question tells it, too
                self._has_news.clear()
                await self._ask([])
