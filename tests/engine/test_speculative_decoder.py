"""The public parts: pairs of models, their vocabularies, and a decoder for programs that run their model themselves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import TINY, tiny_engine
from fake_device import FakeDevice

import autobot_llm
from autobot_llm.engine.batching.plan import StepBatch
from autobot_llm.engine.executor import NO_FEATURES
from autobot_llm.engine.load import load_engine
from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.options import EngineOptions
from autobot_llm.engine.sequence import SamplingParams, Sequence
from autobot_llm.engine.speculative.build import SpeculationOptions, Target, build_speculator, make_draft_model
from autobot_llm.engine.speculative.costly_costs import CostlyCosts
from autobot_llm.engine.speculative.decoder import SpeculativeConfig, SpeculativeDecoder
from autobot_llm.engine.speculative.measurements import ON_CPU
from autobot_llm.engine.speculative.pairs import (
    DRAFT_MODEL_RECOMMENDATIONS,
    TINY_LLAMA,
    find_draft,
    recommended_draft,
    why_no_draft,
)
from autobot_llm.engine.tokenizer import Tokenizer
from autobot_llm.errors import ConfigurationError, InvalidRequestError

DRAFT = TINY.with_name("tiny-draft")


def options(tmp_path: Path, **more: Any) -> EngineOptions:
    return EngineOptions(folder=TINY, cache_dir=tmp_path, device="cpu", compiled_step="off", max_model_len=256, **more)


@pytest.fixture
def other_vocabulary(tmp_path: Path) -> Path:
    """The embedded draft with two tokens exchanged."""
    folder = tmp_path / "other-draft"
    shutil.copytree(DRAFT, folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = (next(token for token, i in vocabulary.items() if i == wanted) for wanted in (300, 301))
    vocabulary[first], vocabulary[second] = 301, 300
    path.write_text(json.dumps(tokenizer))
    return folder


def test_the_package_offers_the_public_names() -> None:
    assert autobot_llm.SpeculativeDecoder is SpeculativeDecoder
    assert autobot_llm.SpeculativeConfig is SpeculativeConfig
    assert autobot_llm.DRAFT_MODEL_RECOMMENDATIONS is DRAFT_MODEL_RECOMMENDATIONS


@pytest.mark.parametrize(
    ("model", "draft"),
    [
        ("meta-llama/Llama-2-70b-chat-hf", "meta-llama/Llama-2-7b-chat-hf"),
        ("Llama-2-13b", TINY_LLAMA),
        ("Mistral-7B-Instruct-v0.3", TINY_LLAMA),
        ("Qwen/Qwen2-7B-Instruct", "Qwen/Qwen2-0.5B-Instruct"),
        ("qwen3-8b", "Qwen/Qwen2-0.5B-Instruct"),
        ("microsoft/phi-2", "microsoft/phi-1_5"),
        ("something-else", TINY_LLAMA),
    ],
)
def test_a_draft_is_recommended_by_name(model: str, draft: str) -> None:
    assert recommended_draft(model) == draft


def test_a_draft_is_found_beside_its_model(tmp_path: Path) -> None:
    assert find_draft(TINY) == DRAFT
    model, draft = tmp_path / "org" / "Mistral-7B-v0.1", tmp_path / "TinyLlama" / "TinyLlama-1.1B-Chat-v1.0"
    model.mkdir(parents=True)
    assert find_draft(model) is None
    draft.mkdir(parents=True)
    assert find_draft(model) is None, "an empty folder is no model"
    (draft / "config.json").write_text("{}")
    assert find_draft(model) == draft


def test_a_vocabulary_that_differs_in_two_tokens_is_refused_by_name(other_vocabulary: Path, tmp_path: Path) -> None:
    target, draft = Tokenizer.from_folder(TINY), Tokenizer.from_folder(other_vocabulary)
    assert why_no_draft(target, Tokenizer.from_folder(DRAFT)) is None
    why = why_no_draft(target, draft)
    assert why is not None and "2 of its 8,192 tokens differ, the first is 300" in why
    asked = SpeculationOptions(method="draft", draft_model=other_vocabulary)
    with pytest.raises(ConfigurationError, match="AUTOBOT_SPECULATION_DRAFT_MODEL=.*the same tokenizer"):
        load_engine(options(tmp_path, speculation=asked))


@pytest.mark.parametrize("method", ["medusa", "eagle3"])
def test_a_method_without_heads_is_refused_where_it_is_asked_for(method: Any, tmp_path: Path) -> None:
    refusal = f"AUTOBOT_SPECULATION_METHOD='{method}': no tiny-draft-{method} lies beside"
    with pytest.raises(ConfigurationError, match=refusal):
        load_engine(replace(options(tmp_path, speculation=SpeculationOptions(method=method)), folder=DRAFT))


def test_auto_takes_what_there_is(tmp_path: Path) -> None:
    for asked, expected in (
        (SpeculationOptions(method="auto"), ("ngram", "draft")),
        (SpeculationOptions(method="auto", use_ngram=False), ("draft",)),
        (SpeculationOptions(method="ngram"), ("ngram",)),
        (SpeculationOptions(method="none"), None),
    ):
        engine = load_engine(options(tmp_path, speculation=asked))
        assert (engine.speculator and engine.speculator.methods) == expected
        assert engine.speculation_reason
        engine.close()


def target() -> Target:
    return Target(
        folder=TINY, is_on_cpu=True, tokenizer=Tokenizer.from_folder(TINY), config=load_config(TINY),
        features=NO_FEATURES, place=None, num_blocks=4, block_size=16, prefix_caching=True,
        max_num_batched_tokens=64, max_model_len=64,
    )  # fmt: skip


def test_an_executor_whose_draft_model_cannot_be_made_is_closed() -> None:
    device = FakeDevice(4, 16)
    with pytest.raises(ConfigurationError, match="num_blocks=0"):
        make_draft_model(DRAFT, target(), lambda folder, config, context, num_blocks: (device, 0))
    assert device.is_closed


def test_a_draft_that_breaks_while_its_costs_are_measured_is_closed() -> None:
    class Broken(FakeDevice):
        def execute(self, batch: StepBatch) -> torch.Tensor:
            raise RuntimeError("no step today")

    device = Broken(4, 16)
    speculation = SpeculationOptions(method="draft", draft_model=DRAFT)
    with pytest.raises(RuntimeError, match="no step today"):
        build_speculator(speculation, target(), lambda folder, config, context, num_blocks: (device, 4))
    assert device.is_closed


@pytest.fixture
def decoder(tmp_path: Path) -> Iterator[SpeculativeDecoder]:
    made = SpeculativeDecoder(SpeculativeConfig(num_speculative_tokens=4), options(tmp_path))
    yield made
    made.close()


async def test_the_draft_model_goes_on_with_a_text(decoder: SpeculativeDecoder, tmp_path: Path) -> None:
    assert decoder.get_metrics() == {
        "enabled": False,
        "acceptance_rate": 0.0,
        "measurements": 0,
        "mode": "none",
        "draft_model": None,
    }
    assert await decoder.initialize_draft_model(str(TINY))
    target = tiny_engine(tmp_path, compiled=False)
    text = target.tokenizer.encode("<|user|>\nTell me a story.<|end|>\n<|assistant|>\n")
    tokens, count = decoder.speculate(text)
    assert count == len(tokens) == 4
    more, _ = decoder.speculate([*text, *tokens[:2]])
    assert more[:2] == tokens[2:], "greedy, and the text went on as drafted"
    again, _ = decoder.speculate(text)
    assert again == tokens, "another text, from its beginning"
    assert decoder.get_metrics()["mode"] == "draft" and decoder.get_metrics()["draft_model"] == str(DRAFT)
    target.close()


async def test_a_model_without_a_draft_beside_it_has_none(decoder: SpeculativeDecoder, tmp_path: Path) -> None:
    assert not await decoder.initialize_draft_model(str(tmp_path / "alone"))
    assert decoder.speculate([1, 2, 3]) == ([], 0)


def test_lookup_goes_before_the_draft_model() -> None:
    decoder = SpeculativeDecoder(SpeculativeConfig(use_ngram=True, num_speculative_tokens=3))
    assert decoder.speculate([5, 6, 7, 8, 5, 6]) == ([7, 8, 5], 3)
    assert decoder.speculate([5, 6, 7, 8, 5, 6, 9]) == ([], 0)
    for bad in ([], None):
        with pytest.raises(InvalidRequestError):
            decoder.speculate([1] if bad is None else bad, past_key_values=() if bad is None else None)


def test_below_the_floor_it_stops_after_twenty_drafts_and_tries_again() -> None:
    decoder = SpeculativeDecoder(SpeculativeConfig(use_ngram=True, min_acceptance_rate=0.5))
    text = [5, 6, 5, 6]
    for i in range(20):
        assert decoder.get_metrics()["enabled"], i
        assert decoder.record_acceptance(5, 1) == pytest.approx(0.2)
    assert not decoder.get_metrics()["enabled"]
    counts = [decoder.speculate(text)[1] for _ in range(101)]
    assert counts == [0] * 100 + [5]
    assert decoder.get_metrics()["measurements"] == 0
    with pytest.raises(ValueError, match="accepted=3"):
        decoder.record_acceptance(2, 3)


def test_a_drafts_costs_are_known_before_the_first_answer(tmp_path: Path) -> None:
    """Else a short answer could never afford to find out, and no draft would ever be seen."""
    speculation = SpeculationOptions(method="draft", draft_model=DRAFT)
    with closing(load_engine(options(tmp_path, speculation=speculation))) as engine:
        assert engine.speculator is not None
        costs = engine.speculator.controller.costly_costs
        each = costs.per_pass(1)
        assert each is not None
        prior = 1000 * each * ON_CPU.token_behind
        assert costs.catch_up(1000, each) < prior, "tokens that are caught up with share a pass"


def test_a_cache_that_is_too_small_to_rehearse_in_leaves_costs_unknown(tmp_path: Path) -> None:
    speculation = SpeculationOptions(method="draft", draft_model=DRAFT)
    with closing(load_engine(options(tmp_path, speculation=speculation))) as engine:
        speculator = engine.speculator
        assert speculator is not None
        speculator.controller.costly_costs = CostlyCosts()
        speculator.rehearse(Sequence(-2, [0] * 300, SamplingParams(max_tokens=1)))  # beyond the context
        assert speculator.controller.costly_costs.per_pass(1) is None
        speculator.rehearse(Sequence(-3, [0, 0], SamplingParams(max_tokens=1)))
        assert speculator.controller.costly_costs.per_pass(1) is not None


@pytest.mark.parametrize(
    "bad",
    [
        {"num_speculative_tokens": 0},
        {"ngram_prompt_lookup_max": 65},
        {"min_acceptance_rate": 1.5},
        {"draft_tensor_parallel_size": 2},
    ],
)
def test_a_bad_value_is_named_with_what_is_accepted(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"{next(iter(bad))}=.*expected"):
        SpeculativeConfig(**bad)
