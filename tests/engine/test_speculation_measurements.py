"""What drafts and steps were worth is remembered as it was measured."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobot_llm.engine.speculative.costly_costs import CostlyCosts
from autobot_llm.engine.speculative.measurements import (
    HISTORY,
    ON_CPU,
    ON_GPU,
    AcceptanceHistory,
    StepCosts,
)

PLAIN = 1.2e-3


def history(passed: int, tried: int, number: int = HISTORY) -> AcceptanceHistory:
    made = AcceptanceHistory(6)
    for _ in range(number):
        made.record(tried, passed)
    return made


def test_catching_up_with_few_tokens_says_nothing_of_many() -> None:
    """A step that catches up costs something however few they are."""
    costs = CostlyCosts()
    for _ in range(3):
        costs.record(1, 1, 0, 1e-3)
        costs.record(1, 1, 4, 2e-3)
        costs.record(1, 1, 800, 3e-3)
    assert costs.catch_up(4, 1e-3) == pytest.approx(1e-3)
    assert costs.catch_up(1000, 1e-3) == pytest.approx(2.5e-3)


def test_what_catching_up_with_few_tokens_costs_is_not_what_each_of_many_costs() -> None:
    """On a GPU it is a pass that they cost: nobody would ever catch up with a prompt, at that price."""
    costs = CostlyCosts(ON_GPU)
    for _ in range(3):
        costs.record(1, 1, 0, 0.1e-3)
        costs.record(1, 1, 12, 0.7e-3)
    assert costs.catch_up(12, 0.1e-3) == pytest.approx(0.6e-3)
    assert costs.catch_up(1200, 0.1e-3) < 1.5e-3
    assert costs.catch_up(3, 0.1e-3) < 0.2e-3
    for _ in range(3):
        costs.record(1, 1, 1200, 4.1e-3)
    assert costs.catch_up(1200, 0.1e-3) == pytest.approx(4e-3)


def test_one_bad_moment_does_not_end_what_would_not_be_measured_again() -> None:
    """A first pass of many sequences that meets a compiler, and a first prompt that is caught up with."""
    presumed = 0.5e-3
    costs = CostlyCosts(ON_GPU)
    assert costs.expected_pass(32, presumed) == presumed
    costs.record(32, 3, 2000, 60e-3)
    assert costs.expected_pass(32, presumed) == presumed, "twenty are what it is at most"
    costs.record(1, 3, 0, 0.3e-3)
    costs.record(32, 3, 2000, 60e-3)
    assert costs.catch_up(2000, 0.1e-3) < 1e-3
    for _ in range(3):
        costs.record(32, 3, 0, 2.4e-3)
        costs.record(32, 3, 2000, 6.4e-3)
    assert costs.expected_pass(32, presumed) == pytest.approx(0.8e-3)
    assert costs.catch_up(2000, 0.8e-3) == pytest.approx(4e-3)


def test_what_a_step_costs_for_having_drafts_at_all_is_not_saved_by_who_gets_ahead() -> None:
    """Seven sure drafts beside one that is rarely right: the eighth waits for all of what is fixed."""
    costs = StepCosts(ON_GPU)
    costs.record(8, 0, PLAIN)
    assert costs.fixed_part(8, 40) == pytest.approx(ON_GPU.drafted_step * PLAIN)
    for number in (8, 40):
        for _ in range(9):
            costs.record(8, number, 1.5 * PLAIN)
    assert 0.2 * PLAIN < costs.fixed_part(8, 40) < costs.added(8, 40)
    on_cpu = StepCosts(ON_CPU)
    on_cpu.record(8, 0, PLAIN)
    assert on_cpu.fixed_part(8, 40) == 0, "a token costs what it costs"


def test_a_new_text_is_taken_for_the_others_and_then_for_itself() -> None:
    others = history(5, 6)
    mine = AcceptanceHistory(6, others)
    assert mine.expected() == pytest.approx(others.expected(), rel=0.05)
    for _ in range(20):
        mine.record(1, 0)
    assert mine.expected()[1] < 1.2 < others.expected()[1]
    theirs = AcceptanceHistory(6, others)
    before = theirs.expected()[5]
    for _ in range(HISTORY):
        others.record(1, 0)
    assert theirs.expected()[5] < before / 2, "what the others do later counts, too"


@given(drafts=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), max_size=250))
def test_a_history_counts_its_last_hundred_drafts(drafts: list[tuple[int, int]]) -> None:
    made = AcceptanceHistory(6)
    for tried, passed in drafts:
        made.record(tried, passed)
    last = [(tried, min(tried, passed)) for tried, passed in drafts[-HISTORY:]]
    assert len(made) == len(last)
    for position, rate in enumerate(made.by_position):
        tried = sum(tried > position for tried, _ in last)
        assert rate == (sum(passed > position for _, passed in last) / tried if tried else None)
    assert made.expected()[:2] == [1.0, 1.0 + made.first_chance]
    gains = [after - before for before, after in itertools.pairwise(made.expected())]
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(gains))


def test_what_a_draft_token_adds_is_a_prompts_until_it_was_measured() -> None:
    costs = StepCosts()
    costs.record(4, 0, 4e-3)
    assert costs.added(4, 2) == pytest.approx(0.5e-3), "else a quarter of a sequence's share of a step"
    costs.learn_prompt_token(5e-4)
    assert costs.added(4, 2) == pytest.approx(1e-3)
    costs.record(4, 2, 9e-3)
    assert costs.added(4, 2) == pytest.approx(1e-3), "one bad moment does not decide"
    for _ in range(6):
        costs.record(4, 2, 4.4e-3)
    assert costs.added(4, 2) == pytest.approx(4e-4)


def test_a_tree_costs_all_of_its_tokens_and_a_line_its_own() -> None:
    costs = CostlyCosts()
    assert costs.tokens(1, 4) == 4
    costs.record_tokens(1, 5, 4)  # a line that was cut
    assert [costs.tokens(1, depth) for depth in (1, 3, 5)] == [1, 3, 5]
    costs.record_tokens(2, 4, 2 * 31)
    assert costs.tokens(2, 4) == costs.tokens(3, 2) == 31
    assert costs.tokens(1, 4) == 4
