"""The controller drafts where measured chances and seconds say that it pays, and only there."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobot_llm.engine.batching.plan import ScheduledSequence, StepPlan
from autobot_llm.engine.batching.step_cost import StepCost
from autobot_llm.engine.request import RequestStats
from autobot_llm.engine.sequence import SamplingParams, Sequence
from autobot_llm.engine.speculative.controller import MARGIN, PROBE_EVERY, REFRESH, RETRY, Controller
from autobot_llm.engine.speculative.credit import FIRST_STEPS, LOSS_SHARE, MOST_STEPS, TEXT_STEPS
from autobot_llm.engine.speculative.experience import Experience
from autobot_llm.engine.speculative.measurements import (
    ENOUGH,
    HISTORY,
    MADE_TO_GUESS,
    ON_CPU,
    ON_GPU,
    AcceptanceHistory,
    Priors,
)
from autobot_llm.engine.speculative.ngram import NgramProposer
from autobot_llm.engine.speculative.policy import CostlyOffer, DraftResult
from autobot_llm.engine.speculative.speculator import Speculator

PLAIN, EXTRA = 1.2e-3, 0.3e-3
ROOM = 256


def history(passed: int, tried: int, number: int = HISTORY) -> AcceptanceHistory:
    made = AcceptanceHistory(6)
    for _ in range(number):
        made.record(tried, passed)
    return made


def measured(
    num_sequences: int = 1, extra: float = EXTRA, floor: float | None = None, priors: Priors = ON_CPU
) -> Controller:
    """A controller that knows what steps cost, and whose drafts have gained all that counts."""
    controller = Controller(5, floor, priors)
    for _ in range(9):
        controller.record_step(num_sequences, 0, PLAIN)
    for _ in range(9):
        for number in (1, 2, 4, 8, 16):
            controller.record_step(num_sequences, number, PLAIN + number * extra)
    controller.record_step(num_sequences, 0, PLAIN)
    controller.credit.book(MOST_STEPS)
    return controller


def test_nothing_is_drafted_before_a_plain_step_was_measured() -> None:
    assert Controller(5).decide([history(5, 5)], None, ROOM) is None


def test_a_sure_draft_is_used_whole_and_a_hopeless_one_not_at_all() -> None:
    decision = measured().decide([history(6, 6)], None, ROOM)
    assert decision is not None and decision.num_free == [5]
    assert measured().decide([history(0, 1)], None, ROOM) is None
    assert measured().decide([None], None, ROOM) is None


def test_a_draft_goes_as_far_as_its_positions_are_worth_their_time() -> None:
    made = AcceptanceHistory(6)
    for i in range(HISTORY):
        made.record(*((3, 2) if i % 10 else (1, 0)))  # the first two tokens nearly always, the third never
    decision = measured().decide([made], None, ROOM)
    assert decision is not None and decision.num_free == [2]


def test_where_a_token_costs_as_much_as_a_step_a_likely_one_is_not_worth_it() -> None:
    likely = history(1, 2)
    assert measured(extra=PLAIN).decide([likely], None, ROOM) is None
    assert measured(extra=PLAIN / 10).decide([likely], None, ROOM) is not None


def seconds_of(lengths: tuple[int, ...], histories: list[AcceptanceHistory | None], own: float, extra: float) -> float:
    """Until every sequence has come as far as a plain step brings it: the controller's docstring, written out."""
    tokens = [1.0 if made is None else made.expected()[k] for made, k in zip(histories, lengths, strict=True)]
    shared = PLAIN - own * len(lengths)
    return shared / min(tokens) + sum((own + extra * k) / t for k, t in zip(lengths, tokens, strict=True))


@given(
    rates=st.lists(st.one_of(st.none(), st.integers(0, 6)), min_size=1, max_size=3),
    extra=st.floats(1e-5, 2e-3),
    share=st.floats(0, 1),
)
def test_no_choice_of_lengths_is_much_quicker_and_none_is_slower_than_a_plain_step(
    rates: list[int | None], extra: float, share: float
) -> None:
    """Against every combination of lengths, by the same measured figures."""
    size = len(rates)
    own = PLAIN if size == 1 else share * PLAIN / size
    controller = measured(size, extra)
    if size > 1:
        controller.costs.record(size - 1, 0, PLAIN - own)
    histories = [None if rate is None else history(rate, min(6, rate + 1)) for rate in rates]
    decision = controller.decide(histories, None, ROOM)
    possible = itertools.product(*((range(6) if made is not None else (0,)) for made in histories))
    most = MOST_STEPS * PLAIN / extra / max(1, size - histories.count(None))  # what a sequence can afford
    best = min(seconds_of(lengths, histories, own, extra) for lengths in possible if max(lengths) <= most)
    chosen = seconds_of(tuple(decision.num_free) if decision else (0,) * size, histories, own, extra)
    assert chosen <= PLAIN * 1.0001
    assert chosen <= best * MARGIN * (1.0001 if size == 1 else 1.15)


def test_a_draft_for_one_of_many_must_be_worth_its_own_time() -> None:
    """Else its owner would be served at the expense of the others; where everybody gets ahead the shared part pays."""
    sure = history(6, 6)
    controller = measured(4, EXTRA / 2)
    controller.costs.record(3, 0, PLAIN - EXTRA / 4)  # a sequence adds half of what a draft token does
    assert controller.decide([sure, None, None, None], None, ROOM) is None
    everybody = controller.decide([sure] * 4, None, ROOM)
    assert everybody is not None and min(everybody.num_free) > 0


def test_a_plain_step_is_measured_again_after_many_with_drafts() -> None:
    controller = measured()
    made = history(6, 6)
    for _ in range(REFRESH):
        assert controller.decide([made], None, ROOM) is not None
        controller.record_step(1, 5, PLAIN + 5 * EXTRA)
    assert controller.decide([made], None, ROOM) is None
    controller.record_step(1, 0, PLAIN)
    assert controller.decide([made], None, ROOM) is not None


def test_the_floor_binds_once_there_are_enough_measurements() -> None:
    controller = measured(floor=0.6)
    assert controller.is_allowed(history(1, 2, ENOUGH - 1))
    assert not controller.is_allowed(history(1, 2, ENOUGH))
    assert controller.is_allowed(history(2, 3, ENOUGH))


def test_a_costly_method_is_tried_within_its_allowance_and_used_where_it_pays() -> None:
    controller = measured()
    unknown = CostlyOffer([AcceptanceHistory(6)], [1])
    probe = controller.decide([None], unknown, ROOM)
    assert probe is not None and probe.num_costly == 2 and probe.costly_for == [0]
    for _ in range(ENOUGH):
        controller.costly_costs.record(1, 2, 0, 2 * PLAIN / 10)
    good = controller.decide([None], CostlyOffer([history(6, 6)], [1]), ROOM)
    assert good is not None and good.num_costly == 5
    assert controller.wants_offer(), "what is in use is asked at every step"


def test_a_costly_method_that_loses_is_looked_at_now_and_then() -> None:
    controller = measured()
    for _ in range(ENOUGH):
        controller.costly_costs.record(1, 2, 0, 2 * PLAIN)
    bad = CostlyOffer([history(0, 1)], [1])
    num_steps, spent = 40_000, 0.0
    looks: list[int] = []
    for step in range(num_steps):
        decision = controller.decide([None], bad, ROOM) if controller.wants_offer() else None
        number = 0 if decision is None else decision.num_costly
        controller.record_step(1, number, PLAIN + number * EXTRA)
        if number:
            looks.append(step)
            spent += number * (PLAIN + EXTRA)
            controller.settle(1, [DraftResult(number, 0, True)])
    assert 0 < spent <= (LOSS_SHARE * num_steps + MOST_STEPS) * PLAIN
    assert min(after - before for before, after in itertools.pairwise(looks)) >= PROBE_EVERY
    assert max(looks) > num_steps / 2


def test_a_look_that_finds_a_costly_method_right_pays_for_itself() -> None:
    controller = measured()
    controller.costly_costs.record(1, 2, 0, 2 * PLAIN / 10)
    controller.credit.balance = 2.0
    probe = controller.decide([None], CostlyOffer([history(0, 1)], [1]), ROOM)
    assert probe is not None and probe.num_costly == 2
    controller.settle(1, [DraftResult(2, 2, True)])
    assert controller.credit.balance > 3


def test_a_costly_method_catches_up_with_a_text_only_as_far_as_can_be_lost() -> None:
    controller = measured()
    for _ in range(ENOUGH):
        controller.costly_costs.record(1, 2, 0, 2 * PLAIN / 10)
        controller.costly_costs.record(1, 1, 100, PLAIN / 10 + 100 * PLAIN / 20)
    good = [history(6, 6)]
    assert controller.decide([None], CostlyOffer(good, [1000]), ROOM) is None, "50 steps of catching up"
    near = controller.decide([None], CostlyOffer(good, [60]), ROOM)
    assert near is not None and near.num_costly == 5
    assert controller.decide([None], CostlyOffer(good, [60]), ROOM) is None, "three steps each time, of six"


def test_a_costly_method_of_a_gpu_is_used_before_anything_is_known_of_it_and_not_left_for_one_bad_draft() -> None:
    controller = Controller(5, priors=ON_GPU)
    controller.record_step(1, 0, PLAIN)
    drafts = AcceptanceHistory(6, presumed=MADE_TO_GUESS)
    offer = CostlyOffer([AcceptanceHistory(6, drafts)], [100])
    first = controller.decide([None], offer, ROOM)
    assert first is not None and first.num_costly >= 3, "no look of two tokens"
    for _ in range(3):
        drafts.record(1, 0)
    assert drafts.expected()[5] > 1.5, "later positions are not taken for what the first was"
    again = controller.decide([None], offer, ROOM)
    assert again is not None and again.num_costly >= 2
    for _ in range(ENOUGH):
        drafts.record(1, 0)
    assert controller.decide([None], offer, ROOM) is None


def test_who_has_no_good_copy_gets_the_costly_methods_draft_beside_the_others() -> None:
    controller = measured(3, EXTRA / 20, priors=ON_GPU)
    controller.costs.record(2, 0, 0.95 * PLAIN)
    for number in (1, 3):
        controller.costly_costs.record(number, 1, 0, number * PLAIN / 20)
    sure, likely = history(6, 6), history(3, 4)
    mixed = controller.decide([sure, None, sure], CostlyOffer([likely] * 3, [1] * 3), ROOM)
    assert mixed is not None and mixed.num_free == [5, 0, 5]
    assert mixed.num_costly >= 3 and list(mixed.costly_for) == [1]


def test_drafts_are_as_long_as_there_is_room_for_everybodys() -> None:
    controller = measured(4, EXTRA / 20, priors=ON_GPU)
    sure: list[AcceptanceHistory | None] = [history(6, 6)] * 4
    decision = controller.decide(sure, None, 11)
    assert decision is not None and decision.num_free == [2] * 4
    assert controller.decide(sure, None, 3) is None


def test_a_text_can_afford_a_draft_although_others_have_lost_everything() -> None:
    controller = measured()
    controller.credit.balance = 0.0
    sure = history(6, 6)
    assert controller.decide([sure], None, ROOM) is None
    controller.welcome_next()
    decision = controller.decide([sure], None, ROOM)
    assert decision is not None and decision.num_free == [int(TEXT_STEPS * PLAIN / EXTRA)]


def lost_to_an_adversary(controller: Controller, size: int, extra: float, num_steps: int) -> float:
    """Seconds that drafts cost where every guess that nobody verifies is right, and none that somebody does."""
    sure: list[AcceptanceHistory | None] = [history(6, 6)] * size
    lost = 0.0
    for _ in range(num_steps):
        decision = controller.decide(sure, None, ROOM)
        lengths = [0] * size if decision is None else decision.num_free
        number = sum(lengths)
        controller.record_step(size, number, PLAIN + number * extra)
        controller.settle(size, [DraftResult(k, 0, False) for k in lengths if k])
        lost += number * extra
    return lost


@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("part", [0.02, 0.25])
@pytest.mark.parametrize("num_steps", [10, 100, 3000])
@pytest.mark.parametrize("trust", [FIRST_STEPS, MOST_STEPS])
def test_an_adversary_takes_a_few_steps_and_half_a_percent_of_the_time_and_no_more(
    size: int, part: float, num_steps: int, trust: float
) -> None:
    """`part`: what a draft token costs, of a sequence's share of a step. `trust`: what drafts have gained before."""
    extra = part * PLAIN / size
    controller = measured(size, extra)
    controller.credit.balance = trust
    controller.costs.record(max(1, size - 1), 0, PLAIN if size == 1 else PLAIN - PLAIN / size)
    lost = lost_to_an_adversary(controller, size, extra, num_steps)
    assert 0 < lost <= (trust + LOSS_SHARE * num_steps) * PLAIN + 1e-9


def test_an_adversary_who_was_trusted_takes_little_of_what_was_gained() -> None:
    """Whatever drafts have gained before, the loss after that is bounded."""
    controller = measured()
    sure = history(6, 6)
    for _ in range(500):
        decision = controller.decide([sure], None, ROOM)
        if decision is None:
            controller.record_step(1, 0, PLAIN)
            continue
        controller.record_step(1, decision.num_free[0], PLAIN + decision.num_free[0] * EXTRA)
        controller.settle(1, [DraftResult(decision.num_free[0], decision.num_free[0], False)])
    lost = lost_to_an_adversary(controller, 1, EXTRA, 100)
    assert 2 * PLAIN < lost <= (MOST_STEPS + LOSS_SHARE * 100) * PLAIN + 1e-9


def test_costs_that_speak_against_drafts_are_measured_again() -> None:
    controller = measured(extra=10 * PLAIN)
    likely = history(2, 2)
    decisions = [_after_plain_step(controller, likely) for _ in range(2 * RETRY)]
    tried = [decision for decision in decisions if decision is not None]
    assert RETRY <= len(tried) <= RETRY + 2, "it is tried until a step with drafts is measured"
    controller.record_step(1, 2, PLAIN)
    assert controller.decide([likely], None, ROOM) is None


def _after_plain_step(controller: Controller, made: AcceptanceHistory) -> object:
    controller.record_step(1, 0, PLAIN)
    return controller.decide([made], None, ROOM)


def simulated(text: list[int], num_known: int, extra: float) -> tuple[float, float, list[int]]:
    """Seconds that a sequence takes to become `text` with drafts from its own tokens, seconds without, and the places
    of the draft tokens that were verified: every step costs what `measured` says."""
    sequence = Sequence(0, text[:num_known], SamplingParams(max_tokens=len(text)))
    speculator = Speculator(5, make_free=NgramProposer, clock=lambda: 0.0)  # of looks: those seconds hold all
    step_cost, seconds, drafted = StepCost(), 0.0, list[int]()
    while len(sequence.token_ids) < len(text):
        speculator.propose([sequence], ROOM)
        start, draft_ids = len(sequence.token_ids), sequence.draft_ids
        came = text[start : start + len(draft_ids)]
        accepted = 0
        while accepted < len(came) and came[accepted] == draft_ids[accepted]:
            accepted += 1
        took = PLAIN + extra * len(draft_ids)
        item = ScheduledSequence(sequence, start - 1, 1 + len(draft_ids), True, 0, len(draft_ids))
        plan = StepPlan((item,), item.num_tokens, 0, len(draft_ids))
        if draft_ids:
            speculator.record(plan, [accepted], took, [RequestStats()])
        else:
            speculator.record_plain(plan, took, step_cost)
        sequence.token_ids = text[: start + accepted + 1]
        seconds += took
        drafted += range(start, start + len(draft_ids))
    return seconds, PLAIN * (len(text) - num_known), drafted


@pytest.mark.parametrize("num_different", [2, 3, 8, 30, 500])
@pytest.mark.parametrize("extra", [EXTRA, PLAIN])
def test_a_text_whose_guesses_are_chance_loses_next_to_nothing(num_different: int, extra: float) -> None:
    """Every latest token has occurred before, so there is always a guess."""
    rng = random.Random(1)
    text = [rng.randrange(num_different) for _ in range(4000)]
    seconds, plain, _ = simulated(text, 200, extra)
    assert seconds <= 1.03 * plain


def test_an_acceptance_that_collapses_in_the_middle_of_an_answer_loses_at_most_three_percent() -> None:
    """Copying that ends, begins again and ends: what is lost after it is less than 3 % of the time there."""
    rng = random.Random(2)
    source = [rng.randrange(1000) for _ in range(300)]
    for num_different in (3, 8, 30, 1000):
        copied = source + source
        noise = [rng.randrange(num_different) for _ in range(600)]
        seconds, plain, drafted = simulated(copied + noise, len(source), EXTRA)
        only_copied, plain_copied, _ = simulated(copied, len(source), EXTRA)
        assert only_copied < plain_copied / 1.8, "copying gains"
        assert len(drafted) > 200
        assert seconds - only_copied <= 1.03 * (plain - plain_copied)


def test_copying_is_noticed_when_it_begins_and_left_when_it_ends() -> None:
    """By a speculator that has seen nothing before. What is new in this text never occurred, so nothing is guessed."""
    source, new = list(range(1000, 1200)), list(range(3000, 3200))
    text = source + new + source + list(range(5000, 5100))
    begin = len(source) + len(new)
    end = begin + len(source)
    seconds, plain, drafted = simulated(text, len(source), EXTRA)
    assert not [place for place in drafted if place < begin]
    assert begin < min(drafted) <= begin + 8
    assert max(drafted) < end + 5, "no further than the last draft of the copy"
    assert seconds < plain - (len(source) - 20) * PLAIN / 2, "copying takes half the time"


def test_a_tree_that_costs_more_than_its_depth_is_worth_is_left() -> None:
    controller = measured()
    controller.costly_costs.record(1, 1, 0, PLAIN / 10)
    likely = CostlyOffer([history(2, 3)], [1])
    line = controller.decide([None], likely, ROOM)
    assert line is not None and line.num_costly >= 2 and controller.wants_offer()
    for depth in range(1, 6):
        controller.costly_costs.record_tokens(1, depth, 8 * depth)
    controller.decide([None], likely, ROOM)
    assert not controller.wants_offer(), "it is not in use: what was decided is a probe at most"


def test_a_method_that_drafts_in_one_pass_pays_for_one() -> None:
    controller = measured()
    controller.costly_costs.record(1, 1, 0, PLAIN)
    likely = [history(3, 4)]
    in_one = controller.decide([None], CostlyOffer(likely, [1], lambda _: 1), ROOM)
    assert in_one is not None and in_one.num_costly == 3
    assert controller.wants_offer()
    controller.decide([None], CostlyOffer(likely, [1]), ROOM)
    assert not controller.wants_offer(), "three passes cost more than three right tokens are worth: a probe at most"


def test_drafts_that_are_under_way_cost_what_steps_with_such_took_longer() -> None:
    """A copy that is not quite as good is better as long as drafts take their time, and not where they are there."""
    passes, extra = 5 * PLAIN / 20, EXTRA / 20
    controller = measured(extra=extra, priors=ON_GPU)
    for _ in range(ENOUGH):
        controller.costly_costs.record(1, 5, 0, passes)
    copy, better, nothing = history(4, 5), history(6, 6), history(0, 1)

    def chosen(num_ready: int) -> str:
        decision = controller.decide([copy], CostlyOffer([better], [3], num_ready=num_ready), ROOM)
        assert decision is not None and (decision.num_costly == 5 or decision.num_free[0] >= 4)
        return "costly" if decision.num_costly else "free"

    def take_a_step(seconds: float, num_right: int) -> float:
        """With drafts that are ready, and nothing else to choose; returns what was booked, in plain steps."""
        controller.credit.balance = 3.0
        decision = controller.decide([nothing], CostlyOffer([better], [3], num_ready=5), ROOM)
        assert decision is not None and decision.num_costly == 5
        controller.record_step(1, 5, PLAIN + seconds, passes, was_ready=True)
        before = controller.credit.balance
        controller.settle(1, [DraftResult(5, num_right, True)], was_ready=True)
        return controller.credit.balance - before

    assert chosen(0) == chosen(5) == "free", "what they take is not known"
    assert take_a_step(0.0, 1) == pytest.approx(1.0), "all that they cost is that step's time"
    assert (chosen(5), chosen(3), chosen(0)) == ("costly", "free", "free"), "three of five would be begun anew"
    take_a_step(0.0, 5)
    controller.record_step(1, 0, 2 * PLAIN)  # a plain step that nobody decided on
    assert controller.costs.plain(1) == pytest.approx(PLAIN), "is one more of many"
    assert controller.costs.added_ready(1, 0) is None
    booked = [take_a_step(passes + 5 * extra, 0) for _ in range(30)]
    assert booked[-1] == pytest.approx(-(passes + 5 * extra) / PLAIN)
    assert chosen(5) == "free"


def test_who_leaves_drafts_that_are_under_way_has_to_begin_anew() -> None:
    """So a copy must be better by as much."""
    extra = EXTRA / 20
    controller = measured(extra=extra, priors=ON_GPU)
    for _ in range(ENOUGH):
        controller.costly_costs.record(1, 5, 0, 5 * PLAIN / 20)
    copy = history(5, 6)
    for _ in range(20):
        controller.costs.record_ready(1, 5, PLAIN + PLAIN / 20)
    same = CostlyOffer([history(5, 6)], [3], num_ready=5)
    decision = controller.decide([copy], same, ROOM)
    assert decision is not None and decision.num_costly == 5, "it is 5 % dearer, and 20 % are lost otherwise"
    again = controller.decide([copy], CostlyOffer([history(5, 6)], [3]), ROOM)
    assert again is not None and not again.num_costly


def test_a_draft_beside_a_copy_is_taken_for_what_drafts_were_there_or_in_its_text() -> None:
    experience = Experience(6, "ngram")
    for sequence_id in (1, 2):
        experience.here("draft", "greedy", sequence_id)  # who is asked about is one to learn of
    experience.look({1: "match of 4"})
    for _ in range(HISTORY):
        experience.record("draft", "greedy", 1, 1, 0)  # a hard text, beside copies
    experience.look({2: "match of 4", 3: "match of 1"})
    for _ in range(HISTORY):
        experience.record("draft", "greedy", 2, 5, 5)  # an easy one
    experience.look({1: "match of 4", 3: "match of 1"})
    hard_there = experience.here("draft", "greedy", 1).expected()
    assert hard_there[5] > 4, "drafts there have been right of late"
    experience.look({})
    assert experience.here("draft", "greedy", 1).expected()[5] < 1.2, "and in this text they were not"
    experience.look({2: "match of 1"})
    assert experience.here("draft", "greedy", 2).expected()[5] > 5, "an easy text is easy wherever"
    assert experience.here("draft", "sampled", 4).expected()[1] == pytest.approx(1 + MADE_TO_GUESS)
    for sequence_id in (1, 2, 4):
        experience.forget(sequence_id)
    assert not experience.num_texts
    experience.record("draft", "greedy", 1, 1, 0)
    assert not experience.num_texts, "who has left does not come back"
