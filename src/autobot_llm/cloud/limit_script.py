"""The limits of one model in a Redis: the script that keeps them, what it is told and what it says. Knows Lua and
numbers; knows nothing of queues.

A hash holds the buckets of requests and of tokens (capacity, rate per second, level, and when that was true), and until
when the provider asked for a pause; a sorted set beside it, with the same hash tag, holds who asked in the last minute.
One script does everything in one round trip and so atomically, and the clock is the Redis's own. Both keys expire when
nothing is left to remember.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from autobot_llm.dialects.rate_limits import RateLimit

_NUM_FIXED = 17  # arguments before the calls' tokens

# What is no number counts as absent, and a key of another type is replaced: the limits are learned anew.
SCRIPT = """
local limits, workers = KEYS[1], KEYS[2]
if redis.call('TYPE', limits).ok ~= 'hash' then redis.call('DEL', limits) end
if redis.call('TYPE', workers).ok ~= 'zset' then redis.call('DEL', workers) end
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1e6
local function number(text)
  local value = tonumber(text or '')
  if value and value == value and math.abs(value) < 1e15 then return value end
end
local function arg(place) return number(ARGV[place]) end
local kept = redis.call('HMGET', limits, 'at', 'pause', 'rc', 'rr', 'rl', 'tc', 'tr', 'tl')
local at = math.min(number(kept[1]) or now, now)
local pause = math.min(number(kept[2]) or 0, now + 86400)

local function bucket(first, seed, told, back)
  local c, r, l = number(kept[first]), number(kept[first + 1]), number(kept[first + 2])
  if c and r and l and c > 0 and r > 0 then
    l = math.min(c, l + (now - at) * r)
  else
    c, r, l = arg(seed), arg(seed + 1), arg(seed + 2)
  end
  if l then l = math.min(c, l + (arg(back) or 0)) end
  local limit, remaining, reset = arg(told), arg(told + 1), arg(told + 2)
  if remaining then
    local capacity = math.max(limit or remaining, 1)
    local missing = capacity - remaining
    if reset and reset > 0 and missing > 0 then r = missing / reset
    elseif capacity ~= c or not r then r = capacity / 60 end
    c, l = capacity, math.min(l or remaining, remaining)
  end
  return {c = c, r = r, l = l}
end
local function seconds(b, amount)
  if not b.l then return 0 end
  local missing = math.min(amount, b.c) - b.l
  return missing > 1e-9 * b.c and missing / b.r or 0
end
local function take(b, amount) if b.l then b.l = b.l - math.min(amount, b.c) end end

local requests = bucket(3, 2, 8, 14)
local tokens = bucket(6, 5, 11, 15)
pause = math.max(pause, now + (arg(16) or 0))
local granted, wait = 0, 0
for place = 18, #ARGV do
  local amount = arg(place) or 0
  wait = math.max(pause - now, seconds(requests, 1), seconds(tokens, amount))
  take(requests, 1)
  take(tokens, amount)
  if wait > 0 then break end
  granted = granted + 1
end

local function text(value) return value and string.format('%.6f', value) or '' end
redis.call('HSET', limits, 'at', text(now), 'pause', text(pause), 'rc', text(requests.c), 'rr', text(requests.r),
  'rl', text(requests.l), 'tc', text(tokens.c), 'tr', text(tokens.r), 'tl', text(tokens.l))
redis.call('ZADD', workers, now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', workers, '-inf', now - 60)
redis.call('ZREMRANGEBYSCORE', workers, now + 60, '+inf')
local full = 0
for _, b in ipairs({requests, tokens}) do if b.l then full = math.max(full, (b.c - b.l) / b.r) end end
local left = math.ceil(math.min(math.max(600, full, pause - now), 86400) * 1000)
redis.call('PEXPIRE', limits, left)
redis.call('PEXPIRE', workers, 60000)
return {granted, text(wait), text(pause - now), redis.call('ZCARD', workers), text(requests.c), text(requests.r),
  text(requests.l), text(tokens.c), text(tokens.r), text(tokens.l)}
"""

BucketState = tuple[float, float, float]  # capacity, rate per second, level


class News(msgspec.Struct, kw_only=True):
    """What a worker has to tell besides the calls that it would like to make.

    `back_*` is what was taken and not used (negative: used and not taken); `told_*` what the provider said last;
    `pause` how many seconds it wants to be left alone.
    """

    told_requests: RateLimit | None = None
    told_tokens: RateLimit | None = None
    back_requests: float = 0.0
    back_tokens: float = 0.0
    pause: float = 0.0

    @property
    def is_nothing(self) -> bool:
        return self == News()

    def followed_by(self, later: News) -> News:
        return News(
            told_requests=later.told_requests or self.told_requests,
            told_tokens=later.told_tokens or self.told_tokens,
            back_requests=self.back_requests + later.back_requests,
            back_tokens=self.back_tokens + later.back_tokens,
            pause=max(self.pause, later.pause),
        )


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What the script says: so many calls may go at once, and the next one, whose place is taken, in `wait` seconds.

    `pause`: for so many seconds the provider wants to be left alone. The buckets are as they are now, for all.
    """

    num_granted: int
    wait: float
    pause: float
    num_workers: int
    requests: BucketState | None
    tokens: BucketState | None


def arguments(
    worker: str, seeds: Sequence[BucketState | None], news: News, num_tokens: Sequence[float]
) -> list[str | float]:
    """The script's arguments. `seeds`, the buckets of requests and of tokens as the worker knows them, count where the
    Redis knows nothing.
    """
    args: list[str | float] = [worker]
    for seed in seeds:
        args += ["", "", ""] if seed is None else list(seed)
    for told in (news.told_requests, news.told_tokens):
        args += ["", "", ""] if told is None else [_known(told.limit), told.remaining, _known(told.reset_seconds)]
    args += [news.back_requests, news.back_tokens, news.pause, ""]
    assert len(args) == _NUM_FIXED
    return [*args, *num_tokens]


def read_verdict(reply: Sequence[bytes | int]) -> Verdict:
    """Raises ValueError for a reply of another form."""
    granted, wait, pause, workers, *states = reply
    return Verdict(
        num_granted=int(granted),
        wait=_number(wait),
        pause=max(0.0, _number(pause)),
        num_workers=max(1, int(workers)),
        requests=_state(states[:3]),
        tokens=_state(states[3:]),
    )


def _state(texts: Sequence[bytes | int]) -> BucketState | None:
    if len(texts) != 3:
        raise ValueError("expected three numbers of a bucket")
    return (_number(texts[0]), _number(texts[1]), _number(texts[2])) if all(texts) else None


def _number(text: bytes | int) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"expected a number, got {text!r}")
    return value


def _known(value: float | None) -> str | float:
    return "" if value is None else value
