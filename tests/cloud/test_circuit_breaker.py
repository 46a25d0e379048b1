"""A provider that is out of order is left alone, and found again when it is back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from autobot_llm.cloud.circuit_breaker import BreakerPolicy, BreakerState, CircuitBreaker

POLICY = BreakerPolicy(window=20, least=10, share=0.8, cooldown=5.0, longest_cooldown=60.0)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def breaker_at(clock: Clock) -> CircuitBreaker:
    return CircuitBreaker(POLICY, clock=clock, draw=lambda: 0.0)


def call(breaker: CircuitBreaker, *, succeeded: bool | None) -> bool:
    """Make a call if it is admitted; whether it was."""
    ticket = breaker.admit()
    if ticket is None:
        return False
    breaker.record(ticket, succeeded=succeeded)
    return True


def opened(clock: Clock) -> CircuitBreaker:
    breaker = breaker_at(clock)
    for _ in range(POLICY.least):
        call(breaker, succeeded=False)
    assert str(breaker.state) == BreakerState.OPEN
    return breaker


def test_it_opens_when_most_of_the_latest_calls_failed_and_not_before_enough_are_known() -> None:
    breaker = breaker_at(Clock())
    for _ in range(POLICY.least - 1):
        assert call(breaker, succeeded=False)
    assert str(breaker.state) == BreakerState.CLOSED
    call(breaker, succeeded=False)
    assert str(breaker.state) == BreakerState.OPEN
    assert breaker.num_openings == 1


def test_every_third_call_failing_keeps_it_closed() -> None:
    breaker = breaker_at(Clock())
    for number in range(3000):
        assert call(breaker, succeeded=number % 3 != 0)


def test_an_open_one_admits_nothing_until_its_pause_is_over_then_one_probe() -> None:
    clock = Clock()
    breaker = opened(clock)
    assert breaker.admit() is None
    clock.now += 4.9
    assert breaker.admit() is None
    assert 0.09 < breaker.seconds_left() < 0.11
    clock.now += 0.2
    assert breaker.admit() is not None
    assert str(breaker.state) == BreakerState.HALF_OPEN
    assert breaker.admit() is None, "one probe at a time"


def test_a_good_probe_closes_it_and_a_bad_one_doubles_the_pause_up_to_its_limit() -> None:
    clock = Clock()
    breaker = opened(clock)
    pauses = []
    for _ in range(6):
        clock.now += breaker.seconds_left()
        assert call(breaker, succeeded=False)
        pauses.append(round(breaker.seconds_left()))
    assert pauses == [10, 20, 40, 60, 60, 60]
    clock.now += 60
    assert call(breaker, succeeded=True)
    assert str(breaker.state) == BreakerState.CLOSED
    assert call(breaker, succeeded=False)
    assert str(breaker.state) == BreakerState.CLOSED, "what was before the pause is forgotten"


def test_a_probe_that_tells_nothing_makes_place_for_another() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += 5
    assert call(breaker, succeeded=None)
    assert str(breaker.state) == BreakerState.HALF_OPEN
    assert call(breaker, succeeded=True)
    assert str(breaker.state) == BreakerState.CLOSED


def test_late_news_from_before_the_pause_decide_nothing() -> None:
    clock = Clock()
    breaker = breaker_at(clock)
    early = [breaker.admit() for _ in range(3)]
    for _ in range(POLICY.least):
        call(breaker, succeeded=False)
    for ticket in early:
        assert ticket is not None
        breaker.record(ticket, succeeded=True)
    assert str(breaker.state) == BreakerState.OPEN
    clock.now += 5
    probe = breaker.admit()
    assert probe is not None
    assert early[0] is not None
    breaker.record(early[0], succeeded=False)
    assert str(breaker.state) == BreakerState.HALF_OPEN
    breaker.record(probe, succeeded=True)
    assert str(breaker.state) == BreakerState.CLOSED


@given(st.lists(st.tuples(st.sampled_from([True, False, None]), st.floats(0, 30)), max_size=200))
def test_whatever_happens_a_provider_that_recovers_is_asked_again(history: list[tuple[bool | None, float]]) -> None:
    clock = Clock()
    breaker = breaker_at(clock)
    for outcome, pause in history:
        call(breaker, succeeded=outcome)
        clock.now += pause
    clock.now += breaker.seconds_left()
    assert call(breaker, succeeded=True)
    assert call(breaker, succeeded=True)
