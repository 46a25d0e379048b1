"""An engine on a GPU that reads quantized weights as they are: what it answers, and what it holds. `make test-gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest
import torch
from answers import GREEDY, TINY, answers
from quantized_folders import as_whole_weights
from reference import Reference

from autobot_llm.engine.description import DescribedExecutor, TellsQuantization
from autobot_llm.engine.engine import Engine
from autobot_llm.engine.load import load_engine
from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.models.weights import load_weights
from autobot_llm.engine.options import EngineOptions
from autobot_llm.engine.quantization.quantize import quantize_folder
from autobot_llm.engine.quantization.scheme import QuantizationConfig, QuantizationType
from autobot_llm.engine.request import EngineRequest, RequestStats
from autobot_llm.engine.scoring import PromptScoring
from autobot_llm.engine.sequence import SamplingParams

pytestmark = pytest.mark.gpu

STORY = "Once upon a time there was a little girl who had a big red ball. She took it to the park and "


@contextmanager
def engine_of(
    folder: Path, kind: str = "none", *, device: Literal["cpu", "cuda"] = "cuda", **more: object
) -> Iterator[Engine]:
    assert torch.cuda.is_available(), "make test-gpu needs a CUDA device"
    options = EngineOptions(
        folder=folder, cache_dir=Path("unused"), device=device, kv_cache_memory=64 * 2**20, max_model_len=512,
        max_num_seqs=8, max_num_batched_tokens=512, quantization=QuantizationType(kind), prefix_caching=False, **more,  # type: ignore[arg-type]
    )  # fmt: skip
    engine = load_engine(options)
    try:
        yield engine
    finally:
        engine.close()


def answer(engine: Engine, text: str) -> str:
    prompt_ids = engine.tokenizer.encode(text, add_special_tokens=False)
    engine.add(0, EngineRequest(prompt_ids, (SamplingParams(max_tokens=40, temperature=0.0),)), RequestStats())
    found = ""
    while engine.has_work:
        found += "".join(output.text for output in engine.step())
    return found


def story(engine: Engine, num_tokens: int) -> list[int]:
    return engine.tokenizer.encode(STORY * 20, add_special_tokens=False)[:num_tokens]


def mean_logprob(engine: Engine, num_tokens: int) -> float:
    """Of a text in one step of as many rows: those of up to 16 keep activations as they are, whatever the scheme."""
    scoring = PromptScoring(story(engine, num_tokens))
    while not scoring.advance(engine):
        pass
    scoring.release(engine)
    return sum(scoring.logprobs) / len(scoring.logprobs)


@pytest.mark.parametrize("kind", ["w8a8", "fp8", "awq"])
def test_an_engine_answers_what_the_numbers_that_its_weights_stand_for_give(tmp_path: Path, kind: str) -> None:
    ids = torch.randint(5, 8000, (4, 64), generator=torch.Generator().manual_seed(0))
    config = QuantizationConfig(type=QuantizationType(kind), group_size=64)
    quantize_folder(TINY, tmp_path / "quantized", config, sequences_BL=ids)
    reference = Reference(as_whole_weights(tmp_path / "twin", tmp_path / "quantized"))
    with engine_of(tmp_path / "quantized") as engine:
        reference.check(answers(engine, GREEDY, together=False))  # prompts of few rows
        few, many = mean_logprob(engine, 12), mean_logprob(engine, 400)
        expected_few, expected_many = (reference.mean_logprob(story(engine, number)) for number in (12, 400))
        assert isinstance(engine.executor, DescribedExecutor) and isinstance(engine.executor, TellsQuantization)
        weights, num_bytes = engine.executor.description.weights, engine.executor.description.weight_bytes
        assert engine.executor.quantization == weights
        assert weights is not None and weights.endswith("weights as they are")
        assert num_bytes < 0.7 * num_whole_bytes()
    assert few == pytest.approx(expected_few, abs=0.03)
    if kind != "awq":  # of many rows activations are rounded, as a CPU rounds them
        with engine_of(tmp_path / "quantized", device="cpu", compiled_step="off") as engine:
            expected_many = mean_logprob(engine, 400)
    assert many == pytest.approx(expected_many, abs=0.03)


def num_whole_bytes() -> int:
    """What the embedded model's weights take unquantized."""
    return load_weights(TINY, load_config(TINY), dtype=None, device="cpu").num_bytes


def test_weights_are_rounded_while_they_are_loaded_and_go_with_graphs_and_a_rounded_cache(
    reference: Reference,
) -> None:
    with engine_of(TINY, "w4") as engine:
        description = engine.executor.description  # type: ignore[attr-defined]
        assert description.weights == "W4A16 group 128 weights as they are" and description.num_graphs > 0
        assert description.weight_bytes < 0.5 * num_whole_bytes()
        assert dict(description.lines())["weights"].endswith("GB, lossy")
        whole = reference.mean_logprob(story(engine, 400))
        rounded, texts = mean_logprob(engine, 400), [answer(engine, STORY), answer(engine, STORY * 4)]
    assert rounded == pytest.approx(whole, abs=0.25)
    with engine_of(TINY, "w4", cuda_graphs="off") as engine:
        assert mean_logprob(engine, 400) == pytest.approx(rounded, abs=0.01)
        launched = [answer(engine, STORY), answer(engine, STORY * 4)]
    assert [text[:24] for text in launched] == [text[:24] for text in texts]
    with engine_of(TINY, "w4", kv_cache_dtype="int8", cuda_graphs="off") as engine:
        assert mean_logprob(engine, 400) == pytest.approx(rounded, abs=0.03)
        assert len(answer(engine, STORY)) > 40
