"""Keep within rate limits together with other workers and hosts, through a Redis. Knows queues and the script's
verdicts; knows nothing of HTTP.

The queue, its bound and its fairness are each worker's own; the buckets are everybody's. Of the calls that wait here
the first one has its place reserved in the Redis, so places go in the order in which they were asked for, over all
workers, and nobody polls.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import msgspec

from autobot_llm.cloud.guarded_redis import GuardedRedis
from autobot_llm.cloud.limit_script import News, Verdict, arguments, read_verdict
from autobot_llm.cloud.rate_limits import LONGEST_PAUSE, OwnLimits, RateLimiter, TokenBucket, Waiter, clock
from autobot_llm.dialects.rate_limits import RateLimit, RateLimits

MOST_ASKED = 64  # calls of one question
NEWS_SECONDS = 0.1  # that news without a question is gathered
UNLIMITED_SECONDS = 1.0  # that nothing is asked where no limit is known to anybody
LOOK_UP_SECONDS = 1.0  # between looks at what others have to tell, while calls wait here
LEAST_WAIT = 0.02  # what is less is the question's own time


class SharedRateLimiter(RateLimiter):
    """The limits of one model at one provider, which everybody shares who uses `key` in the same Redis.

    While that cannot be used, each worker keeps within its share: the limits, divided by the workers that were seen in
    the last minute. What is taken meanwhile is told to the Redis afterwards. `worker` names this worker.
    """

    def __init__(
        self, name: str, *, max_queued: int, own: OwnLimits | None = None, redis: GuardedRedis, key: str, worker: str
    ) -> None:
        super().__init__(name, max_queued=max_queued, own=own)
        self._redis = redis
        self._keys = (f"autobot:limit:{{{key}}}", f"autobot:limit:{{{key}}}:workers")
        self._worker = worker
        self._whole = (self._requests, self._tokens)  # everybody's buckets, as they were last told here
        self._has_share = False  # `_requests` and `_tokens` are this worker's part alone
        self._num_workers = 1
        self._unlimited_until = 0.0
        self._news = News()
        self._asked: list[Waiter] = []  # taken out of the queue: asked for, or with a place reserved
        self._has_left = asyncio.Event()
        self._asking: asyncio.Task[None] | None = None
        self._news_timer: asyncio.TimerHandle | None = None

    @property
    def num_queued(self) -> int:
        return len(self._queue) + len(self._asked)

    def observe(self, told: RateLimits) -> None:
        self._unlimited_until = 0.0
        told = self._fitted(told)
        if self._is_alone():
            self._learn(self._whole, told)
            share = 1 / self._num_workers
            self._learn(
                self._buckets(), RateLimits(requests=_part(told.requests, share), tokens=_part(told.tokens, share))
            )
        else:
            self._learn(self._buckets(), told)
            self._tell(News(told_requests=told.requests, told_tokens=told.tokens))
        self._serve()

    def pause(self, seconds: float) -> None:
        self._unlimited_until = 0.0
        self._tell(News(pause=seconds))
        super().pause(seconds)

    def correct(self, num_tokens: float) -> None:
        self._tell(News(back_tokens=num_tokens))
        super().correct(num_tokens)

    async def close(self) -> None:
        """Tell what is left to tell, if that is quickly done."""
        if self._news_timer is not None:
            self._news_timer.cancel()
            self._news_timer = None
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait((self._asking,))
        if not self._news.is_nothing:
            await self._ask(())

    # Alone

    def _is_alone(self) -> bool:
        """Whether the Redis cannot be used; this worker then goes on with its share of what there was."""
        if self._redis.is_usable:
            return False
        if not self._has_share:
            self._has_share, now = True, clock()
            self._requests, self._tokens = (_share(bucket, self._num_workers, now) for bucket in self._whole)
        return True

    def _take(self, num_tokens: float, now: float) -> None:
        super()._take(num_tokens, now)  # only here without the script, which takes by itself
        self._tell(News(back_requests=-1, back_tokens=-num_tokens))

    def _give_back(self, num_tokens: float) -> None:
        super()._give_back(num_tokens)
        self._tell(News(back_requests=1, back_tokens=num_tokens))

    # Together

    def _grants_at_once(self, num_tokens: float, now: float) -> bool:
        if self._is_alone():
            return super()._grants_at_once(num_tokens, now)
        return now < self._unlimited_until and not self.num_queued

    def _refuse_if_hopeless(self, num_tokens: float, now: float, longest: float | None) -> None:
        if self._is_alone() or self._wait(0.0, now) > 0:  # else the script decides, and waits follow from it
            super()._refuse_if_hopeless(num_tokens, now, longest)

    def _forget(self, waiter: Waiter) -> None:
        if waiter in self._asked:
            self._has_left.set()  # its place goes back once it is known to have one
        else:
            super()._forget(waiter)

    def _counted(self, waited: float) -> float:
        return super()._counted(waited) if waited >= LEAST_WAIT else 0.0

    def _tell(self, news: News) -> None:
        self._news = self._news.followed_by(news)

    def _serve(self) -> None:
        if self._is_alone():
            super()._serve()
            loop = asyncio.get_running_loop()
            if self._timer is not None and self._timer.when() > loop.time() + LOOK_UP_SECONDS:
                self._timer.cancel()
                self._timer = loop.call_later(LOOK_UP_SECONDS, self._serve)  # the Redis may be back by then
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._asking is not None:
            return
        if self._queue:
            self._begin_asking()
        elif self._news_timer is None and not self._news.is_nothing:
            self._news_timer = asyncio.get_running_loop().call_later(NEWS_SECONDS, self._begin_asking)

    def _begin_asking(self) -> None:
        if self._news_timer is not None:
            self._news_timer.cancel()
            self._news_timer = None
        if self._asking is None:
            self._asking = asyncio.get_running_loop().create_task(self._ask_for_all())
            self._asking.add_done_callback(self._asked_for_all)

    def _asked_for_all(self, task: asyncio.Task[None]) -> None:
        self._asking = None
        if task.cancelled():
            return
        task.result()
        self._serve()  # who came meanwhile, and everybody where the Redis went away

    async def _ask_for_all(self) -> None:
        """Ask until nobody waits any more, for many calls at a time."""
        while True:
            self._asked = [self._queue.pop() for _ in range(min(len(self._queue), MOST_ASKED))]
            try:
                verdict = await self._ask([waiter.num_tokens for waiter in self._asked])
            except BaseException:
                self._put_back(0)
                raise
            if verdict is None:
                self._put_back(0)
                return
            if self._grant(verdict):
                await self._until_its_turn(self._asked[0], clock() + verdict.wait)
            if not self._queue:
                return

    async def _ask(self, num_tokens: Sequence[float]) -> Verdict | None:
        """What the script says of calls with so many tokens; None where it says nothing."""
        news, self._news = self._payable(self._news), News()
        now = clock()
        seeds = [(one.capacity, one.rate, one.level(now)) if one.is_known else None for one in self._whole]
        args = arguments(self._worker, seeds, news, num_tokens)
        verdict = await self._redis.run(self._keys, args, read_verdict)
        if verdict is None:
            # It may have been heard. To say twice what was taken only costs time; what was given back would be spent.
            again = News(back_requests=min(0.0, news.back_requests), back_tokens=min(0.0, news.back_tokens),
                         pause=news.pause)  # fmt: skip
            self._news = again.followed_by(self._news)
            return None
        now = clock()
        for bucket, state in zip(self._whole, (verdict.requests, verdict.tokens), strict=True):
            if state is not None:
                bucket.become(*state, now)
        (self._requests, self._tokens), self._has_share = self._whole, False
        self._num_workers = verdict.num_workers
        self._paused_until = max(self._paused_until, now + verdict.pause) if verdict.pause else self._paused_until
        if verdict.requests is None and verdict.tokens is None and not verdict.pause:
            self._unlimited_until = now + UNLIMITED_SECONDS
        return verdict

    def _payable(self, news: News) -> News:
        """`news` without what has come back since: the Redis's buckets have been filling up while nobody asked."""
        if not self._has_share:
            return news
        now = clock()
        owed = [one.capacity - one.level(now) if one.is_known else 0.0 for one in self._buckets()]
        return msgspec.structs.replace(
            news, back_requests=max(news.back_requests, -owed[0]), back_tokens=max(news.back_tokens, -owed[1])
        )

    def _grant(self, verdict: Verdict) -> bool:
        """Let those go who may; whether the first of the others has its place reserved and waits for it."""
        now = clock()
        for waiter in self._asked[: verdict.num_granted]:
            if waiter.granted.done():  # its caller has left
                self._give_back(waiter.num_tokens)
            else:
                waiter.granted.set_result(None)
        if len(self._asked) == verdict.num_granted:
            self._asked = []
            return False
        first = self._asked[verdict.num_granted]
        self._put_back(verdict.num_granted + 1)
        is_long_pause = verdict.pause > LONGEST_PAUSE
        if first.granted.done():
            self._give_back(first.num_tokens)
        elif is_long_pause or (first.deadline is not None and now + verdict.wait > first.deadline):
            self._give_back(first.num_tokens)
            first.granted.set_exception(self._too_long(verdict.wait, is_long_pause))
        else:
            self._asked = [first]
            return True
        return False

    def _put_back(self, first: int) -> None:
        """Those whom the script did not come to wait again, in their order, as far as so many may."""
        asked, self._asked = self._asked, []
        waiting = [waiter for waiter in asked[first:] if not waiter.granted.done()]
        # Those who waited for nothing but the script's word have been let in already.
        num_surplus = max(0, len(waiting) + len(self._queue) + 1 - max(1, self._max_queued)) if first else 0
        for waiter in waiting[len(waiting) - num_surplus :]:
            waiter.granted.set_exception(self._queue_full(waiter.num_tokens))
        for waiter in reversed(waiting[: len(waiting) - num_surplus]):
            self._queue.put_back(waiter)

    async def _until_its_turn(self, first: Waiter, at: float) -> None:
        """Wait for the reserved place of `first`, and hear meanwhile whether the provider wants a pause."""
        try:
            while not first.granted.done():
                left = max(at, self._paused_until) - clock()
                if left <= 0:
                    first.granted.set_result(None)
                    return
                self._has_left.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(left, LOOK_UP_SECONDS)):
                        await self._has_left.wait()
                if left > LOOK_UP_SECONDS:
                    await self._ask(())
            self._give_back(first.num_tokens)
        except BaseException:
            self._queue.put_back(first)
            raise
        finally:
            self._asked = []


def _share(bucket: TokenBucket, num_workers: int, now: float) -> TokenBucket:
    """One worker's part of `bucket`; where that is less than one call, one call each so many times as long."""
    part = TokenBucket()
    if bucket.is_known:
        capacity = max(1.0, bucket.capacity / num_workers)
        part.become(capacity, bucket.rate / num_workers, min(capacity, bucket.level(now) / num_workers), now)
    return part


def _part(told: RateLimit | None, share: float) -> RateLimit | None:
    if told is None:
        return None
    limit = None if told.limit is None else max(1, int(told.limit * share))
    return RateLimit(limit=limit, remaining=int(told.remaining * share), reset_seconds=told.reset_seconds)
