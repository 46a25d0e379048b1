"""Our decoder beside Hugging Face transformers: the same logits, however a sequence is cut and stored."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from model_folders import TINY, change_json, write_random_model

from autobot_llm.engine.attention.sdpa import SdpaAttention
from autobot_llm.engine.batching.plan import ScheduledSequence, build_batch
from autobot_llm.engine.eager import EagerExecutor
from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.models.decoder import Decoder
from autobot_llm.engine.models.linear import TORCH_LINEAR, choose_linear
from autobot_llm.engine.models.weights import load_weights
from autobot_llm.engine.sequence import SamplingParams, Sequence
from autobot_llm.engine.tokenizer import Tokenizer
from autobot_llm.types import ChatMessage

BLOCK_SIZE = 16
NUM_BLOCKS = 96

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama untied, with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "llama 3.1 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama linear rope": (
        "llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500_000.0, "factor": 4.0}},
    ),
    "llama without groups": ("llama", {"num_key_value_heads": 4}),
    "llama with one kv head, sharded": ("llama", {"num_key_value_heads": 1, "max_shard_size": "300KB"}),
    "llama with wide heads": ("llama", {"head_dim": 32}),
    "mistral": ("mistral", {"tie_word_embeddings": False}),
    "mistral with a window": ("mistral", {"sliding_window": 20}),
    "qwen2": ("qwen2", {}),
    "qwen2 with windows on late layers": (
        "qwen2", {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3 untied, with biases": ("qwen3", {"attention_bias": True, "tie_word_embeddings": False}),
    "qwen3 with windows by layer": (
        "qwen3",
        {
            "sliding_window": 17,
            "use_sliding_window": True,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}  # fmt: skip


def executor(folder: Path, dtype: torch.dtype = torch.float32) -> EagerExecutor:
    config = load_config(folder)
    weights = load_weights(folder, config, dtype=dtype, device="cpu")
    attention = SdpaAttention(config, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, dtype=dtype, device="cpu")
    return EagerExecutor(Decoder(config, weights), attention, reason="under test")


def sequence(token_ids: list[int], block_ids: list[int]) -> Sequence:
    made = Sequence(0, token_ids, SamplingParams(max_tokens=1))
    made.block_ids = block_ids
    return made


def step(runner: EagerExecutor, *parts: tuple[Sequence, int]) -> np.ndarray:
    """Compute so many further tokens of each sequence; logits of each one's last token."""
    scheduled = []
    for one, num_tokens in parts:
        scheduled.append(ScheduledSequence(one, one.num_computed_tokens, num_tokens, True))
        one.num_computed_tokens += num_tokens
    return runner.execute(build_batch(scheduled, BLOCK_SIZE)).numpy()


def reference(model: transformers.PreTrainedModel, token_ids: list[int]) -> np.ndarray:
    """transformers' logits after each of the tokens."""
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0].float().numpy()


@pytest.mark.parametrize("kind", MODELS)
def test_logits_equal_transformers_in_chunks_batches_and_scattered_blocks(kind: str, tmp_path: Path) -> None:
    family, overrides = MODELS[kind]
    model = write_random_model(tmp_path, family, **overrides)
    runner = executor(tmp_path)
    shuffle = random.Random(3)
    blocks = shuffle.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    lengths = (150, 47, 16, 90)
    all_ids = [[shuffle.randrange(8192) for _ in range(length)] for length in lengths]
    sequences = [sequence(ids, [blocks.pop() for _ in range(-(-len(ids) // BLOCK_SIZE))]) for ids in all_ids]
    expected = [reference(model, ids) for ids in all_ids]
    largest_gap, num_compared = 0.0, 0
    assert max(np.abs(each).max() for each in expected) > 1.0, "logits near 0 would agree whatever is computed"
    # whole prompts, chunks, decoding alone, decoding together and all of them in one step
    plans = [
        [(0, 33), (1, 1)],
        [(0, 1)],
        [(0, 16), (1, 20), (2, 15)],
        [(0, 1), (1, 1), (2, 1)],
        [(1, 1), (0, 50), (3, 80)],
        [(3, 1), (0, 1), (1, 1)],
        [(1, 1), (3, 1)],
        *[[(1, 1)]] * 12,
        [(0, 48), (1, 1), (3, 7)],
    ]
    for plan in plans:
        logits = step(runner, *((sequences[i], num_tokens) for i, num_tokens in plan))
        for row, (i, _) in zip(logits, plan, strict=True):
            last = sequences[i].num_computed_tokens - 1
            largest_gap = max(largest_gap, float(np.abs(row - expected[i][last]).max()))
            num_compared += 1
    assert num_compared == sum(len(plan) for plan in plans)
    assert largest_gap < 1e-4


def test_bfloat16_logits_are_as_near_to_float32_as_those_of_transformers(tmp_path: Path) -> None:
    model = write_random_model(tmp_path, "qwen3", dtype="bfloat16")
    token_ids = list(range(1000, 1070))
    ours = step(executor(tmp_path, torch.bfloat16), (sequence(token_ids, list(range(5))), 70))
    theirs = reference(model, token_ids)[-1]
    exact = reference(model.float(), token_ids)[-1]
    assert np.abs(ours[0] - exact).mean() < 1.2 * np.abs(theirs - exact).mean()


def test_only_the_wanted_rows_have_logits(tmp_path: Path) -> None:
    write_random_model(tmp_path, "llama")
    runner = executor(tmp_path)
    one, other = sequence(list(range(40)), [0, 1, 2]), sequence(list(range(50, 70)), [3, 4])
    plan = [ScheduledSequence(one, 0, 30, False), ScheduledSequence(other, 0, 20, True)]
    assert runner.execute(build_batch(plan, BLOCK_SIZE)).shape == (1, 8192)
    assert runner.execute(build_batch([ScheduledSequence(one, 30, 5, False)], BLOCK_SIZE)).shape == (0, 8192)


def test_logits_may_be_changed_in_place(tmp_path: Path) -> None:
    write_random_model(tmp_path, "llama")
    logits = executor(tmp_path).execute(
        build_batch([ScheduledSequence(sequence([5, 6, 7], [0]), 0, 3, True)], BLOCK_SIZE)
    )
    logits[:, 3] = float("-inf")
    assert int(logits.argmax()) != 3


def test_both_routes_of_a_product_agree() -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(5, 24), torch.randn(5, 40)
    weight, bias = torch.randn(40, 24), torch.randn(40)
    chosen = choose_linear(torch.float32, torch.device("cpu"))
    assert choose_linear(torch.bfloat16, torch.device("cpu")) is TORCH_LINEAR
    for b in (None, bias):
        expected = x @ weight.t() + (0 if b is None else b)
        for linear in (chosen, TORCH_LINEAR):
            torch.testing.assert_close(linear.apply(x, linear.pack(weight), b), expected)
            torch.testing.assert_close(linear.add(residual, x, linear.pack(weight), b), residual + expected)


def test_the_old_spelling_of_rope_scaling_means_the_same(tmp_path: Path) -> None:
    write_random_model(tmp_path, "llama", rope_parameters=LLAMA3_ROPE)
    new = load_config(tmp_path)
    change_json(tmp_path / "config.json", rope_parameters=None, rope_theta=10_000.0, rope_scaling=LLAMA3_ROPE)
    assert load_config(tmp_path) == new
    assert new.rope_scaling is not None and new.rope_scaling.kind == "llama3"


def test_greedy_answers_of_the_embedded_model_equal_transformers() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_folder(TINY)
    runner = executor(TINY)
    for question in ("Tell me a story about a fox.", "What is rain?", "Copy this: one two three."):
        prompt_ids = tokenizer.encode_chat([ChatMessage("user", question)])
        ids = torch.tensor([prompt_ids])
        answer = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, min_new_tokens=40, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )[0, len(prompt_ids) :].tolist()  # fmt: skip
        one = sequence(prompt_ids, list(range(20)))
        ours: list[int] = []
        for _ in range(40):
            logits = step(runner, (one, len(one.token_ids) - one.num_computed_tokens))
            ours.append(int(logits[0].argmax()))
            one.token_ids.append(ours[-1])
        assert ours == answer, question
