"""Steps that pass unlooked at: few while there is something to find, most of them while there is not; none is lost."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import pytest
import torch
from engines import Driver
from fake_device import FakeDevice
from schedules import SIZE, engine_on

from autobot_llm.engine.batching.plan import ScheduledSequence, StepBatch, StepPlan
from autobot_llm.engine.batching.step_cost import StepCost
from autobot_llm.engine.engine import Engine
from autobot_llm.engine.executor import FeatureKinds, Features
from autobot_llm.engine.request import EngineRequest, RequestStats
from autobot_llm.engine.sequence import SamplingParams, Sequence
from autobot_llm.engine.speculative.controller import PROBE_EVERY, PROBES, Controller
from autobot_llm.engine.speculative.credit import FIRST_STEPS, LOSS_SHARE
from autobot_llm.engine.speculative.measurements import ENOUGH, ON_CPU, ON_GPU, AcceptanceHistory, Priors
from autobot_llm.engine.speculative.ngram import NgramProposer
from autobot_llm.engine.speculative.policy import Always, CostlyOffer, DraftResult
from autobot_llm.engine.speculative.proposer import Computed, Draft
from autobot_llm.engine.speculative.rests import MOST_REST, PATIENCE, Rests
from autobot_llm.engine.speculative.speculator import Speculator

PLAIN, EXTRA = 1.2e-3, 0.3e-3
ROOM = 256


def lengths(rests: Rests, number: int) -> list[int]:
    """How many steps pass after each of so many looks in vain."""
    found = []
    for _ in range(number):
        rests.looked(is_in_vain=True)
        found.append(sum(1 for _ in itertools.takewhile(lambda _: rests.passes(), itertools.count())))
    return found


def test_rests_grow_while_looks_are_in_vain_and_end_when_one_is_not() -> None:
    rests = Rests(may_rest=True)
    found = lengths(rests, 6 * PATIENCE)
    assert found == sorted(found) and found[0] == 1 and found[-1] == MOST_REST
    assert rests.take() == sum(found) and rests.take() == 0
    rests.looked(is_in_vain=True)
    rests.looked(is_in_vain=False)
    assert not rests.passes()
    assert lengths(rests, 1) == [1]


def test_another_text_is_looked_at_at_once_and_more_often_at_first() -> None:
    rests = Rests(may_rest=True)
    lengths(rests, 6 * PATIENCE)
    rests.looked(is_in_vain=True)
    rests.start_over()
    assert not rests.passes()
    assert 1 < lengths(rests, 1)[0] < MOST_REST


def test_where_looking_costs_nothing_nobody_rests() -> None:
    assert lengths(Rests(may_rest=False), 10) == [0] * 10
    for speculator in (
        Speculator(5, make_free=NgramProposer, priors=ON_GPU),
        Speculator(5, make_free=NgramProposer, policy=Always(5)),
    ):
        sequence = Sequence(0, [1, 2, 3], SamplingParams(max_tokens=9))
        for _ in range(9):
            speculator.propose([sequence], ROOM)
            assert not speculator.rests()


class Reader:
    """An engine of one sequence that becomes `text`, as `simulated_steps` has it: every step takes what it must."""

    def __init__(self, speculator: Speculator) -> None:
        self.speculator = speculator
        self.num_looks = 0
        self.drafted: list[int] = []
        """The places of the draft tokens that were verified."""

    def read(self, text: list[int], num_known: int) -> float:
        """Seconds in plain steps, of those that it would take without drafts."""
        speculator, sequence = self.speculator, Sequence(len(text), text[:num_known], SamplingParams(max_tokens=9999))
        seconds = 0.0
        while (start := len(sequence.token_ids)) < len(text):
            accepted = 0
            if not speculator.rests():
                self.num_looks += 1
                speculator.propose([sequence], ROOM)
                draft_ids = sequence.draft_ids[: len(text) - start]
                while accepted < len(draft_ids) and text[start + accepted] == draft_ids[accepted]:
                    accepted += 1
                took = PLAIN + EXTRA * len(draft_ids)
                item = ScheduledSequence(sequence, start - 1, 1 + len(draft_ids), True, 0, len(draft_ids))
                plan = StepPlan((item,), item.num_tokens, 0, len(draft_ids))
                if draft_ids:
                    speculator.record(plan, [accepted], took, [RequestStats()])
                else:
                    speculator.record_plain(plan, took, StepCost())
                self.drafted += range(start, start + len(draft_ids))
                seconds += took
            else:
                seconds += PLAIN
            sequence.token_ids = text[: start + accepted + 1]
            sequence.draft_ids = []
        speculator.forget(sequence)
        return seconds / (PLAIN * (len(text) - num_known))


def reader() -> Reader:
    return Reader(Speculator(5, make_free=NgramProposer, clock=lambda: 0.0))


def test_a_text_without_anything_to_find_is_hardly_looked_at() -> None:
    one = reader()
    assert one.read(list(range(1000)), 200) == pytest.approx(1.0)
    assert one.num_looks <= 800 / (1 + MOST_REST) + 6 * PATIENCE


@pytest.mark.parametrize("num_new", [40, 200, 1000])
def test_copying_is_noticed_at_the_next_look_whenever_it_begins(num_new: int) -> None:
    source, new = list(range(1000, 1200)), list(range(3000, 3000 + num_new))
    one = reader()
    taken = one.read(source + new + source, len(source))
    begin = len(source) + num_new
    assert begin < min(one.drafted) <= begin + MOST_REST + 8
    assert taken < 1 - 0.45 * len(source) / (num_new + len(source)), "half of the copying is saved"


@pytest.mark.parametrize("num_different", [2, 3, 8, 30])
def test_a_text_whose_guesses_are_chance_loses_no_more_than_where_every_step_is_looked_at(num_different: int) -> None:
    rng = random.Random(num_different)
    one = reader()
    assert one.read([rng.randrange(num_different) for _ in range(4000)], 200) <= 1.03


def test_steps_that_rest_count_for_what_may_be_lost_like_any_other() -> None:
    """LOSS_SHARE of each is what drafts may cost, and the next try of a method is as far away."""
    speculator = Speculator(5, make_free=NgramProposer, clock=lambda: 0.0)
    one, credit = Reader(speculator), speculator.controller.credit
    one.read(list(range(260)), 60)
    assert one.num_looks < 100
    assert credit.balance == pytest.approx(FIRST_STEPS + LOSS_SHARE * 200 + 0.75, abs=LOSS_SHARE * MOST_REST)


def test_a_plain_steps_seconds_are_those_of_the_step_and_not_of_looking() -> None:
    now = 0.0

    class Slow(NgramProposer):
        def propose(self, sequence: Sequence, num_tokens: int) -> Draft | None:
            nonlocal now
            now += 5.0
            return super().propose(sequence, num_tokens)

    speculator = Speculator(5, make_free=Slow, clock=lambda: now)
    sequence = Sequence(0, [1, 2, 3], SamplingParams(max_tokens=9))
    speculator.propose([sequence], ROOM)
    plan = StepPlan((ScheduledSequence(sequence, 2, 1, True),), 1, 0, 0)
    speculator.record_plain(plan, 5.0 + PLAIN, StepCost())
    assert speculator.controller.costs.plain(1) == pytest.approx(PLAIN)


@pytest.mark.parametrize(("priors", "rarer"), [(ON_CPU, True), (ON_GPU, False)])
def test_a_costly_method_that_never_pays_is_tried_ever_more_seldom_on_a_cpu(priors: Priors, rarer: bool) -> None:
    controller = Controller(5, priors=priors)
    for _ in range(ENOUGH):
        controller.record_step(1, 0, PLAIN)
        controller.costly_costs.record(1, 2, 0, 2 * PLAIN)
    wrong, looks = AcceptanceHistory(6), []
    for _ in range(100):
        wrong.record(1, 0)
    for step in range(20_000):
        decision = controller.decide([None], CostlyOffer([wrong], [1]), ROOM)
        number = 0 if decision is None else decision.num_costly
        controller.record_step(1, number, PLAIN + number * EXTRA)
        if number:
            looks.append(step)
            controller.credit.book(2.0)  # somebody else gains, so that it could always be afforded
    gaps = [after - before for before, after in itertools.pairwise(looks)]
    assert min(gaps) >= PROBE_EVERY
    if rarer:
        assert gaps[: PROBES + 2] == [*[PROBE_EVERY] * PROBES, 2 * PROBE_EVERY, 4 * PROBE_EVERY]
        assert max(gaps) == priors.most_probe
    else:
        assert max(gaps) == PROBE_EVERY
    good = AcceptanceHistory(6)
    for _ in range(100):
        good.record(6, 6)
    for _ in range(ENOUGH):
        controller.costly_costs.record(1, 2, 0, 0.1 * PLAIN)
    controller.credit.book(6.0)
    used = controller.decide([None], CostlyOffer([good], [1]), ROOM)
    assert used is not None and used.num_costly == 5
    controller.settle(1, [DraftResult(5, 5, True)])
    steps = [controller.decide([None], CostlyOffer([wrong], [1]), ROOM)]
    while steps[-1] is None:
        controller.record_step(1, 0, PLAIN)
        steps.append(controller.decide([None], CostlyOffer([wrong], [1]), ROOM))
    assert len(steps) <= PROBE_EVERY + 2, "once it has paid it is tried as often as at first"


# --- in an engine -----------------------------------------------------------------------------------------------------


class Watching(FakeDevice):
    """The fake device, with features that say which position they are of."""

    def execute_with_features(self, batch: StepBatch, wanted: FeatureKinds) -> tuple[torch.Tensor, Features]:
        return self.execute(batch), Features(hidden_RE=torch.zeros(len(batch.logit_rows_R), 1))


class Watcher:
    """CostlyProposer that has nothing to offer, and wants to see every token."""

    name = "watcher"
    wanted = FeatureKinds(hidden=True)

    def __init__(self) -> None:
        self.ends: Counter[int] = Counter()

    def observe(self, computed: Any, features: Features) -> None:
        for one in computed:
            assert isinstance(one, Computed) and one.start == self.ends[one.sequence.id], "no token is missed"
            self.ends[one.sequence.id] = one.start + len(one.token_rows)

    def lag(self, sequence: Sequence) -> int:
        return 1

    def num_passes(self, num_tokens: int) -> int:
        return num_tokens

    def propose(self, sequences: list[Sequence], num_tokens: int) -> list[Draft | None]:
        return [None for _ in sequences]

    def forget(self, sequence: Sequence) -> None:
        self.ends.pop(sequence.id, None)

    def close(self) -> None:
        """Nothing to release."""


def answers(engine: Engine, number: int) -> list[str]:
    driver = Driver(engine)
    for i in range(number):
        params = SamplingParams(max_tokens=150, temperature=0.9, seed=i)
        driver.add(i, EngineRequest([20 + i, 21, 22], (params,)))
    driver.run()
    return [driver.texts[i, 0] for i in range(number)]


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("is_watched", [False, True])
def test_an_engine_whose_steps_rest_gives_the_same_answers_and_who_watches_sees_them_all(
    number: int, is_watched: bool
) -> None:
    def engine(speculator: Speculator | None) -> Engine:
        made = engine_on(Watching(200, SIZE), 200, max_model_len=200)
        made.speculator = speculator
        return made

    watcher = Watcher()
    speculator = Speculator(
        4, make_free=NgramProposer, costly=watcher if is_watched else None, clock=itertools.count().__next__
    )
    num_looks, propose = 0, speculator.propose

    def counted(*arguments: Any, **named: Any) -> None:
        nonlocal num_looks
        num_looks += 1
        propose(*arguments, **named)

    speculator.propose = counted  # type: ignore[method-assign]
    resting = engine(speculator)
    assert answers(resting, number) == answers(engine(None), number)
    assert 0 < num_looks < resting.num_steps / 2
