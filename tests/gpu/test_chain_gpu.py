"""A draft's chains on a CUDA device: against its passes, and under the steps that verify them. `make test-gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import pytest
from answers import TEXTS as SHORT_TEXTS
from answers import answers
from reference import Reference

from autobot_llm.engine.engine import Engine
from autobot_llm.engine.gpu.graph_sizes import MAX_ROWS
from autobot_llm.engine.load import load_engine
from autobot_llm.engine.options import EngineOptions
from autobot_llm.engine.sequence import SamplingParams, Sequence
from autobot_llm.engine.speculative.build import SpeculationOptions
from autobot_llm.engine.speculative.draft_model import DraftModel
from autobot_llm.engine.speculative.policy import Always
from autobot_llm.engine.speculative.speculator import Speculator

pytestmark = pytest.mark.gpu

ASSETS = Path(__file__).parents[2] / "src" / "autobot_llm" / "assets"
TEXTS = (*SHORT_TEXTS, "One, two, three, four, five, one, two, three,")
NUM_TOKENS = 5


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    speculation = SpeculationOptions("draft", ASSETS / "tiny-draft", None, NUM_TOKENS)
    options = EngineOptions(
        folder=ASSETS / "tiny", cache_dir=Path("unused"), device="cuda", max_model_len=512, prefix_caching=False,
        speculation=speculation,
    )  # fmt: skip
    made = load_engine(options)
    yield made
    made.close()


def draft_of(engine: Engine) -> DraftModel:
    assert engine.speculator is not None, engine.speculation_reason
    draft = engine.speculator._costly
    assert isinstance(draft, DraftModel) and draft._chains is not None
    return draft


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("number", [1, 3, 6, 20, 40])
def test_a_chain_draws_what_its_passes_draw(engine: Engine, temperature: float, number: int) -> None:
    """Two places in bfloat16 may round otherwise where a first pass is padded to other rows, or is not the first: 12
    tokens of several sequences are more than a chain takes."""
    draft = draft_of(engine)
    num_right = num_drafted = 0
    num_tokens = min(NUM_TOKENS, MAX_ROWS // number - 1)
    for missing in (1, 2, 12):
        sequences = []
        for i, text in enumerate(islice(cycle(TEXTS), number)):
            params = SamplingParams(max_tokens=99, temperature=temperature, top_p=0.9, seed=i)
            sequences.append(Sequence(1000 + i, engine.tokenizer.encode(text * 3, add_special_tokens=False), params))
        drafts = []
        for is_chained in (False, True):
            rests = [(s, s.token_ids[-missing:]) for s in sequences]
            for sequence, rest in rests:
                del sequence.token_ids[-len(rest) :]
            draft.propose(sequences, 1)
            for sequence, rest in rests:
                sequence.token_ids.extend(rest)
            assert [draft.lag(s) for s in sequences] == [missing] * number
            if is_chained:
                launched = draft.launch(sequences, num_tokens)
                assert launched is not None
                found, seconds = launched.wait()
                assert 0.0 < seconds < 0.1
            else:
                found = draft.propose(sequences, num_tokens)
            drafts.append([one.token_ids for one in found if one is not None])
            for sequence in sequences:
                draft.forget(sequence)
        for one, other in zip(*drafts, strict=True):
            assert len(one) == len(other) == num_tokens
            num_drafted += num_tokens
            num_right += next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), num_tokens)
    assert num_right >= 0.9 * num_drafted, (num_right, num_drafted)
    assert draft.pool.num_free == draft.pool.num_blocks


@pytest.mark.parametrize(("together", "number"), [(False, 6), (True, 6), (True, 24), (True, 40)])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_chains_verified_unseen_give_the_answers_and_the_acceptance_of_passes(
    engine: Engine, reference: Reference, temperature: float, together: bool, number: int
) -> None:
    texts = tuple(islice(cycle(TEXTS), number))
    num_tokens = min(NUM_TOKENS, MAX_ROWS // number - 1) if together else NUM_TOKENS
    draft, chains, own = draft_of(engine), draft_of(engine)._chains, engine.speculator
    params = SamplingParams(max_tokens=60, temperature=temperature, top_p=0.9)
    rates = {}
    try:
        engine.speculator = None
        reference.check(answers(engine, params, together=together, repeat=3, texts=texts))
        for name in ("chains", "passes"):
            draft._chains = chains if name == "chains" else None
            engine.speculator = speculator = Speculator(num_tokens, costly=draft, policy=Always(num_tokens))
            reference.check(answers(engine, params, together=together, repeat=3, texts=texts))
            rates[name] = speculator.acceptance_rate
            assert draft.pool.num_free == draft.pool.num_blocks
    finally:
        draft._chains, engine.speculator = chains, own
    assert rates["chains"] == pytest.approx(rates["passes"], abs=0.08) and rates["chains"] > 0.1, rates
