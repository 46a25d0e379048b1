"""The embedded model answers as transformers does, token by token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from engines import TINY, Driver, greedy, request
from transformers import AutoModelForCausalLM

from autobot_llm.engine.engine import Engine
from autobot_llm.engine.kernels.cpu import build
from autobot_llm.engine.load import load_engine
from autobot_llm.engine.options import EngineOptions

PROMPTS = Path(__file__).parents[2] / "benchmarks" / "data" / "dev_prompts.jsonl"
NUM_PROMPTS = 50
NUM_NEW_TOKENS = 64
# Where transformers' own two best logits are nearer than this, rounding decides and either token is right.
ROUNDING = 1e-4


def prompts(engine: Engine) -> list[list[int]]:
    """Ten prompts of each category, conversations through the chat template."""
    by_category: dict[str, list[list[int]]] = {}
    for line in PROMPTS.read_text().splitlines():
        record = json.loads(line)
        chosen = by_category.setdefault(record["category"], [])
        if len(chosen) < 10:
            text = record.get("prompt") or "".join(
                f"<|{m['role']}|>\n{m['content'].strip()}<|end|>\n" for m in record["messages"]
            )
            ending = "" if "prompt" in record else "<|assistant|>\n"
            chosen.append(engine.tokenizer.encode(text + ending, add_special_tokens=False))
    return [ids for chosen in by_category.values() for ids in chosen]


@pytest.fixture(scope="module")
def reference() -> list[tuple[list[int], list[int], list[float]]]:
    """Prompt, transformers' greedy continuation, and the gap between its two best logits at each place."""
    engine = load_engine(EngineOptions(folder=TINY, cache_dir=Path(), device="cpu", compiled_step="off"))
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    found = []
    for ids in prompts(engine):
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=NUM_NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        best = [score[0].topk(2).values for score in out.scores]
        found.append((ids, out.sequences[0, len(ids) :].tolist(), [float(pair[0] - pair[1]) for pair in best]))
    assert len(found) == NUM_PROMPTS
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize("compiled_step", ["on", "off"])
def test_greedy_output_equals_transformers(
    compiled_step: str, reference: list[tuple[list[int], list[int], list[float]]], tmp_path: Path
) -> None:
    if compiled_step == "on" and build.compiler() is None:
        pytest.skip("no C++ compiler on this machine")
    engine = load_engine(EngineOptions(folder=TINY, cache_dir=tmp_path, device="cpu", compiled_step=compiled_step))
    driver = Driver(engine)
    for i, (ids, _, _) in enumerate(reference):
        # the two end tokens stop it, and as stop tokens they are not among its log probabilities
        driver.add(i, request(ids, greedy(NUM_NEW_TOKENS, num_logprobs=0, stop_token_ids=engine.config.eos_token_ids)))
    driver.run()
    near_ties = []
    for i, (_, expected, gaps) in enumerate(reference):
        got = driver.token_ids.get((i, 0), [])
        if driver.ended[i, 0].end == "stop":
            assert expected[len(got) :][:1] and expected[len(got)] in engine.config.eos_token_ids
            expected = expected[: len(got)]
        if got != expected:
            place = next(j for j, pair in enumerate(zip(got, expected, strict=False)) if pair[0] != pair[1])
            near_ties.append((i, place, gaps[place]))
    print(f"near ties: {near_ties}")
    assert all(gap < ROUNDING for _, _, gap in near_ties)
    assert len(near_ties) <= 1
    engine.executor.close()
