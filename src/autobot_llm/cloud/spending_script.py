"""What all workers have spent and set aside, in a Redis: the script that keeps it. Knows Lua and numbers only.

Four keys with one hash tag: what each account (a host's file) has spent on the day and in the month, and what each
worker has set aside, with when it was last heard of. Every figure is the whole of what its owner knows, never a
difference: to say it again changes nothing, and after an outage the next word makes up for all that were not heard.
What a worker has set aside is forgotten when nothing was heard of it for HOLD_SECONDS by the Redis's clock.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

HOLD_SECONDS = 90
_TAG = "{autobot:spending}"

SCRIPT = """
local day, month, held, seen = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
for place, kind in ipairs({'hash', 'hash', 'hash', 'zset'}) do
  if redis.call('TYPE', KEYS[place]).ok ~= kind then redis.call('DEL', KEYS[place]) end
end
local worker, account, hold = ARGV[1], ARGV[2], tonumber(ARGV[3])
local now = tonumber(redis.call('TIME')[1])
local function number(text)
  local value = tonumber(text or '')
  if value and value == value and math.abs(value) < 1e15 then return value end
  return 0
end
local function keep(key, dollars, seconds)
  if tonumber(dollars) > number(redis.call('HGET', key, account)) then redis.call('HSET', key, account, dollars) end
  redis.call('EXPIRE', key, seconds)
end
local function sum(key)
  local total = 0
  for _, dollars in ipairs(redis.call('HVALS', key)) do total = total + number(dollars) end
  return total
end
keep(day, ARGV[4], 3 * 86400)
keep(month, ARGV[5], 40 * 86400)
local function forget(from, to)
  for _, gone in ipairs(redis.call('ZRANGEBYSCORE', seen, from, to)) do
    redis.call('HDEL', held, gone)
    redis.call('ZREM', seen, gone)
  end
end
forget('-inf', now - ARGV[6])
forget(now + ARGV[6], '+inf')
redis.call('HDEL', held, worker)
local others, spent_day, spent_month = sum(held), sum(day), sum(month)
local of_day, of_month = tonumber(ARGV[7]), tonumber(ARGV[8])
local answers = {}
for place = 9, #ARGV do
  local after = others + hold + tonumber(ARGV[place])
  local fits_day = not of_day or (spent_day < of_day and spent_day + after <= of_day)
  local fits_month = not of_month or (spent_month < of_month and spent_month + after <= of_month)
  answers[#answers + 1] = not fits_day and 'day' or not fits_month and 'month' or 'yes'
  if fits_day and fits_month then hold = hold + tonumber(ARGV[place]) end
end
redis.call('HSET', held, worker, string.format('%.9f', hold))
redis.call('ZADD', seen, now, worker)
redis.call('EXPIRE', held, 86400)
redis.call('EXPIRE', seen, 86400)
local function text(value) return string.format('%.9f', value) end
return {text(spent_day), text(spent_month), text(others), unpack(answers)}
"""


class Position(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker knows by itself: dollars that its account has spent, and what it holds besides."""

    day: str
    spent_day: float
    spent_month: float
    held: float


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """What all have spent, what the others hold, and of each sum asked for: "yes", or whose budget is used up."""

    spent_day: float
    spent_month: float
    held_elsewhere: float
    answers: tuple[str, ...]


def keys(day: str) -> list[str]:
    return [f"{_TAG}:{day}", f"{_TAG}:{day[:7]}", f"{_TAG}:held", f"{_TAG}:seen"]


def arguments(
    worker: str, account: str, position: Position, budgets: Sequence[float | None], wanted: Sequence[float]
) -> list[str | float]:
    figures = (position.held, position.spent_day, position.spent_month)
    return [
        worker, account, *(f"{figure:.9f}" for figure in figures), HOLD_SECONDS,
        *("" if budget is None else budget for budget in budgets), *(f"{dollars:.9f}" for dollars in wanted),
    ]  # fmt: skip


def read_standing(reply: Sequence[bytes]) -> Standing:
    day, month, held, *answers = reply
    return Standing(
        spent_day=float(day), spent_month=float(month), held_elsewhere=float(held),
        answers=tuple(answer.decode() for answer in answers),
    )  # fmt: skip
