"""A widened model computes what the small one does, at the cost of a large one; folders appear whole or not at all."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from engines import TINY, Driver, greedy, request
from model_folders import write_random_model
from transformers import AutoModelForCausalLM

from autobot_llm.engine.load import load_engine
from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.models.weights import expected_shapes, load_weights
from autobot_llm.engine.options import EngineOptions
from autobot_llm.engine.quantization.scheme import QuantizationType
from autobot_llm.engine.quantization.weight import QuantizedWeight

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from folder_writer import write_folder  # noqa: E402
from random_model import write_random_folder  # noqa: E402
from widen import read_tensors, widen_folder, widened_tensors  # noqa: E402
from widening import RANDOM_STD, SHAPES, Shape, Widening, shape_of, widened_config  # noqa: E402

SMALL = SHAPES["small"]
NUM_PROMPTS, NUM_TOKENS = 10, 120


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Ten prompts of every category, the beginnings of them."""
    records = [json.loads(line) for line in (BENCHMARKS / "data" / "dev_prompts.jsonl").read_text().splitlines()]
    texts = [
        record.get("prompt") or "".join(f"<|{m['role']}|>\n{m['content'].strip()}<|end|>\n" for m in record["messages"])
        for record in records
    ]
    engine = load_engine(EngineOptions(folder=TINY, cache_dir=Path(), device="cpu", compiled_step="off"))
    chosen = texts[:: len(texts) // NUM_PROMPTS][:NUM_PROMPTS]
    return [engine.tokenizer.encode(text, add_special_tokens=False)[:NUM_TOKENS] for text in chosen]


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in float32: wider, deeper, with larger heads, more of them and copies of key/value heads."""
    folder = tmp_path_factory.mktemp("widened") / "small"
    widen_folder(TINY, folder, SMALL, dtype=torch.float32)
    return folder


def logits_of(folder: Path, prompts: list[list[int]], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """transformers' logits after each token of each prompt, one below the other."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        return torch.cat([model(torch.tensor([ids])).logits[0].float() for ids in prompts])


def relative_difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def spread(width: torch.Tensor, size: int) -> torch.Tensor:
    """A stream of the small model as the widened one has it: zeros follow."""
    return F.pad(width, (0, size - width.shape[-1]))


# --- the function -----------------------------------------------------------------------------------------------------


def test_logits_equal_those_of_the_source(small_folder: Path, prompts: list[list[int]]) -> None:
    assert relative_difference(logits_of(small_folder, prompts), logits_of(TINY, prompts)) < 1e-4


def test_greedy_tokens_of_the_engine_equal_those_of_the_source(
    small_folder: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    answers = []
    for folder in (TINY, small_folder):
        engine = load_engine(
            EngineOptions(folder=folder, cache_dir=tmp_path, device="cpu", compiled_step="off", max_model_len=256)
        )
        driver = Driver(engine)
        for i, ids in enumerate(prompts):
            driver.add(i, request(ids, greedy(32, num_logprobs=0)))
        driver.run()
        answers.append(driver.token_ids)
        engine.executor.close()
    assert answers[0] == answers[1]
    assert sum(map(len, answers[0].values())) == NUM_PROMPTS * 32


def test_in_bfloat16_the_logits_are_as_near_as_those_of_the_source(prompts: list[list[int]], tmp_path: Path) -> None:
    widen_folder(TINY, tmp_path / "half", SMALL, dtype=torch.bfloat16)
    exact = logits_of(TINY, prompts)
    own_error = (logits_of(TINY, prompts, torch.bfloat16) - exact).square().mean().sqrt()
    stored = logits_of(tmp_path / "half", prompts)  # rounded weights, float32 arithmetic
    computed = logits_of(tmp_path / "half", prompts, torch.bfloat16)
    assert (stored - exact).square().mean().sqrt() < 0.35 * own_error
    assert (computed - exact).square().mean().sqrt() < 1.15 * own_error
    best = exact.topk(2).values
    ulps = (best[:, 0] - best[:, 1]) / 2.0 ** (best[:, 0].abs().log2().floor() - 7)
    departures = ulps[computed.argmax(-1) != exact.argmax(-1)].tolist()
    assert (ulps > 4).float().mean() > 0.5, "the rule would hold for any model"
    assert all(gap <= 4 for gap in departures), departures


FAMILIES = {
    # a draft: two layers, one key/value head, heads that keep their size, widths in the ratio of 8
    "draft": ("llama", SHAPES["draft-68m"], {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3,
              "num_key_value_heads": 1, "head_dim": 64, "intermediate_size": 512}),
    "llama untied, with biases": ("llama", Shape(96, 4, 8, 4, 32, 128), {"attention_bias": True, "mlp_bias": True,
                                  "tie_word_embeddings": False, "rms_norm_eps": 0.01}),
    "llama, groups shared out": ("llama", Shape(96, 3, 6, 6, 16, 112), {}),
    "llama, heads three times as large": ("llama", Shape(80, 3, 4, 2, 48, 112), {}),
    "llama 3.1 rope": ("llama", Shape(96, 3, 4, 2, 64, 128), {"rope_parameters": {"rope_type": "llama3",
                       "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                       "original_max_position_embeddings": 64}}),
    "mistral with a window": ("mistral", Shape(96, 5, 12, 3, 32, 128), {"sliding_window": 20,
                              "tie_word_embeddings": False}),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_kind_of_source_keeps_its_function(kind: str, prompts: list[list[int]], tmp_path: Path) -> None:
    family, target, overrides = FAMILIES[kind]
    write_random_model(tmp_path / "source", family, **overrides)
    widen_folder(tmp_path / "source", tmp_path / "target", target, dtype=torch.float32)
    expected = logits_of(tmp_path / "source", prompts[:3])
    assert expected.abs().max() > 1.0, "logits near 0 would agree whatever is computed"
    assert relative_difference(logits_of(tmp_path / "target", prompts[:3]), expected) < 1e-4


def test_widths_in_the_ratio_of_a_power_of_four_round_nothing(prompts: list[list[int]], tmp_path: Path) -> None:
    write_random_model(tmp_path / "source", "llama", dtype="bfloat16")
    target = Shape(256, 3, 8, 4, 16, 128)
    widen_folder(tmp_path / "source", tmp_path / "target", target, dtype=torch.bfloat16)
    difference = relative_difference(
        logits_of(tmp_path / "target", prompts[:3]), logits_of(tmp_path / "source", prompts[:3])
    )
    assert difference < 1e-5  # float32 arithmetic; one rounding of a bfloat16 weight is 4e-3


# --- the cost ---------------------------------------------------------------------------------------------------------


def test_the_stream_is_zero_in_new_dimensions_while_new_parts_compute(
    small_folder: Path, prompts: list[list[int]]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(small_folder, dtype=torch.float32)
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0][0]))
    with torch.no_grad():
        states = model(torch.tensor([prompts[0]]), output_hidden_states=True).hidden_states
    assert all(not state[..., 384:].any() and state[..., :384].any() for state in states)
    assert torch.equal(states[8], states[9]), "new layers add nothing"
    assert len(seen) == 2 * SMALL.num_layers
    for name, inputs in seen.items():  # outputs of heads and neurons, the new ones included
        heads_or_neurons = inputs.view(len(inputs), -1, 128).abs().amax(dim=(0, 2))
        assert (heads_or_neurons > 0).all(), name


def test_a_7b_model_has_7_billion_parameters_and_random_readers() -> None:
    config = load_config(TINY)
    shapes = expected_shapes(widened_config(config, SHAPES["mistral-7b"]))
    assert sum(math.prod(shape) for shape in shapes.values()) == 7_013_142_528
    first = {name: shape for name, shape in shapes.items() if name.startswith(("model.layers.0.", "model.layers.31."))}
    widening = Widening(shape_of(config), SHAPES["mistral-7b"], dtype=torch.bfloat16, device="cpu")
    for name, tensor in widening.model(read_tensors(TINY, config), first):
        if name.endswith(("q_proj.weight", "up_proj.weight")):
            new_columns = tensor[:, 384:].float()
            assert new_columns.std() == pytest.approx(RANDOM_STD, rel=0.01), name
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert not tensor[384:].any() and tensor[:384].any() == ("layers.0." in name)


def test_the_draft_has_68_million_parameters() -> None:
    draft = replace(
        load_config(TINY), hidden_size=192, num_layers=2, num_heads=3, num_kv_heads=1, intermediate_size=512
    )
    shapes = expected_shapes(widened_config(draft, SHAPES["draft-68m"]))
    assert sum(math.prod(shape) for shape in shapes.values()) == 67_640_832


def test_a_seed_decides_the_random_weights() -> None:
    def q_proj(seed: int) -> torch.Tensor:
        tensors = widened_tensors(TINY, SMALL, dtype=torch.float32, device="cpu", seed=seed)
        return next(tensor for name, tensor in tensors if name == "model.layers.0.self_attn.q_proj.weight")

    assert torch.equal(q_proj(1), q_proj(1))
    assert not torch.equal(q_proj(1), q_proj(2))


# --- heads and drafts that ride on the model --------------------------------------------------------------------------

SOURCE = Shape(48, 1, 6, 2, 16, 80)
TARGET = Shape(160, 1, 8, 4, 32, 96)


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(shape, generator=generator) + 0.5
        if "norm" in name
        else torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
        for name, shape in shapes.items()
    }


def medusa_logits(tensors: dict[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    outputs = []
    for head in ("0", "1"):
        block = F.linear(hidden, tensors[f"{head}.0.linear.weight"], tensors[f"{head}.0.linear.bias"])
        outputs.append(F.linear(hidden + F.silu(block), tensors[f"{head}.1.weight"]))
    return torch.stack(outputs)


def test_widened_medusa_heads_keep_their_function() -> None:
    shapes = {}
    for head in ("0", "1"):
        shapes |= {f"{head}.0.linear.weight": (48, 48), f"{head}.0.linear.bias": (48,), f"{head}.1.weight": (100, 48)}
    heads = random_tensors(shapes, 3)
    widened = Widening(SOURCE, TARGET, dtype=torch.float32, device="cpu").medusa_heads(heads)
    assert {name: tuple(tensor.shape) for name, tensor in widened.items()} == {
        name: tuple(160 if size == 48 else size for size in shape) for name, shape in shapes.items()
    }
    hidden = torch.randn(7, 48, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(medusa_logits(widened, spread(hidden, 160)), medusa_logits(heads, hidden))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotated(heads_HTD: torch.Tensor) -> torch.Tensor:
    _, num_tokens, size = heads_HTD.shape
    angles = torch.arange(num_tokens)[:, None] * 10_000.0 ** (-torch.arange(0, size, 2) / size)
    first, second = heads_HTD.chunk(2, dim=-1)
    return torch.cat(
        (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), dim=-1
    )


def layer_output(
    tensors: dict[str, torch.Tensor], normed: torch.Tensor, residual: torch.Tensor, shape: Shape, eps: float
) -> torch.Tensor:
    """A decoder layer behind its first norm, as transformers computes it."""

    def heads(name: str) -> torch.Tensor:
        return F.linear(normed, tensors[f"self_attn.{name}_proj.weight"]).unflatten(-1, (-1, shape.head_size))

    q, k, v = (heads(name).transpose(0, 1) for name in "qkv")
    group = shape.num_heads // shape.num_kv_heads
    k, v = k.repeat_interleave(group, dim=0), v.repeat_interleave(group, dim=0)
    attended = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True).transpose(0, 1).flatten(1)
    residual = residual + F.linear(attended, tensors["self_attn.o_proj.weight"])
    normed = rms_norm(residual, tensors["post_attention_layernorm.weight"], eps)
    activated = F.silu(F.linear(normed, tensors["mlp.gate_proj.weight"])) * F.linear(
        normed, tensors["mlp.up_proj.weight"]
    )
    return residual + F.linear(activated, tensors["mlp.down_proj.weight"])


def layer_shapes(shape: Shape, num_streams: int) -> dict[str, tuple[int, ...]]:
    E, F_, D = shape.hidden_size, shape.intermediate_size, shape.head_size
    return {
        "input_layernorm.weight": (E,),
        "self_attn.q_proj.weight": (shape.num_heads * D, num_streams * E),
        "self_attn.k_proj.weight": (shape.num_kv_heads * D, num_streams * E),
        "self_attn.v_proj.weight": (shape.num_kv_heads * D, num_streams * E),
        "self_attn.o_proj.weight": (E, shape.num_heads * D),
        "post_attention_layernorm.weight": (E,),
        "mlp.gate_proj.weight": (F_, E),
        "mlp.up_proj.weight": (F_, E),
        "mlp.down_proj.weight": (E, F_),
    }


def test_a_widened_layer_keeps_its_function() -> None:
    layer = random_tensors(layer_shapes(SOURCE, 1), 6)
    widened = Widening(SOURCE, TARGET, dtype=torch.float32, device="cpu").layer(layer)
    assert {name: tuple(tensor.shape) for name, tensor in widened.items()} == layer_shapes(TARGET, 1)
    hidden = torch.randn(9, 48, generator=torch.Generator().manual_seed(7))

    def output(tensors: dict[str, torch.Tensor], hidden: torch.Tensor, shape: Shape, eps: float) -> torch.Tensor:
        return layer_output(tensors, rms_norm(hidden, tensors["input_layernorm.weight"], eps), hidden, shape, eps)

    expected = output(layer, hidden, SOURCE, 0.1)  # an epsilon that matters
    got = output(widened, spread(hidden, 160), TARGET, 0.1 * 48 / 160)
    torch.testing.assert_close(got, spread(expected, 160), rtol=1e-4, atol=1e-5)


def eagle_logits(
    tensors: dict[str, torch.Tensor], embedded: torch.Tensor, features: torch.Tensor, shape: Shape, eps: float
) -> torch.Tensor:
    """EAGLE-3's draft: three streams of the target fused into one, beside the embeddings, through one layer."""
    fused = F.linear(features, tensors["fc.weight"])
    layer = {name.removeprefix("midlayer."): tensor for name, tensor in tensors.items() if "midlayer" in name}
    normed = torch.cat(
        (rms_norm(embedded, layer["input_layernorm.weight"], eps), rms_norm(fused, layer["hidden_norm.weight"], eps)),
        -1,
    )
    hidden = layer_output(layer, normed, fused, shape, eps)
    return F.linear(rms_norm(hidden, tensors["norm.weight"], eps), tensors["lm_head.weight"])


def test_a_widened_eagle_draft_keeps_its_function() -> None:
    shapes = {f"midlayer.{name}": shape for name, shape in layer_shapes(SOURCE, 2).items()}
    shapes |= {"midlayer.hidden_norm.weight": (48,), "norm.weight": (48,), "fc.weight": (48, 144)}
    shapes |= {"lm_head.weight": (90, 48), "embed_tokens.weight": (100, 48)}
    draft = random_tensors(shapes, 8)
    token_map = {"d2t": torch.arange(90), "t2d": torch.arange(100) < 90}
    widened = Widening(SOURCE, TARGET, dtype=torch.float32, device="cpu").eagle(draft | token_map)
    assert torch.equal(widened["d2t"], token_map["d2t"]) and torch.equal(widened["t2d"], token_map["t2d"])
    assert widened["midlayer.self_attn.q_proj.weight"].shape == (256, 320)
    ids = torch.tensor([5, 99, 0, 42, 17, 63])
    features = torch.randn(6, 3, 48, generator=torch.Generator().manual_seed(9))
    expected = eagle_logits(draft, draft["embed_tokens.weight"][ids], features.flatten(1), SOURCE, 0.1)
    wide = spread(features, 160).flatten(1)
    got = eagle_logits(widened, widened["embed_tokens.weight"][ids], wide, TARGET, 0.1 * 48 / 160)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_tensors_of_another_kind_are_refused_by_name() -> None:
    widening = Widening(SOURCE, TARGET, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="self_attn.q_norm.weight"):
        widening.layer({"self_attn.q_norm.weight": torch.ones(16)})
    with pytest.raises(ValueError, match="0.0.linear.scales"):
        widening.medusa_heads({"0.0.linear.scales": torch.ones(48)})
    with pytest.raises(ValueError, match="fc2"):
        widening.eagle({"fc2": torch.ones(48, 48)})


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 256}, "hidden_size=256 is less than the 384"),
        ({"num_layers": 7}, "num_layers=7 is less than the 8"),
        ({"intermediate_size": 1000}, "intermediate_size=1000 is less than the 1024"),
        ({"head_size": 96}, "head_size=96: expected a multiple of 64"),
        ({"head_size": 32}, "head_size=32: expected a multiple of 64"),
        ({"num_heads": 2, "num_kv_heads": 2}, "2 groups of 3 query heads need 6 groups of 1"),
        ({"num_heads": 32, "num_kv_heads": 1}, "2 groups of 3 query heads need 2 groups of 32"),
    ],
)
def test_a_target_that_cannot_hold_the_source_is_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Widening(shape_of(load_config(TINY)), replace(SMALL, **change), dtype=torch.float32, device="cpu")


def test_an_impossible_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="num_heads=6 is not a multiple of num_kv_heads=4"):
        replace(SMALL, num_heads=6)
    with pytest.raises(ValueError, match="head_size=65 is odd"):
        replace(SMALL, head_size=65)
    with pytest.raises(ValueError, match="num_layers=0"):
        replace(SMALL, num_layers=0)


def test_a_family_with_other_parts_is_refused(tmp_path: Path) -> None:
    write_random_model(tmp_path / "source", "qwen3")
    with pytest.raises(ValueError, match="model_type='qwen3' cannot be widened: expected llama or mistral"):
        widen_folder(tmp_path / "source", tmp_path / "target", SMALL, dtype=torch.float32)
    assert not (tmp_path / "target").exists()


# --- folders ----------------------------------------------------------------------------------------------------------


def test_shards_hold_what_was_given_in_any_order(tmp_path: Path) -> None:
    config = load_config(TINY)
    shapes = expected_shapes(config)
    tensors = read_tensors(TINY, config)
    progress: list[tuple[int, int]] = []
    num_bytes = write_folder(
        tmp_path / "folder",
        config=json.loads((TINY / "config.json").read_text()),
        dtype=torch.bfloat16,
        shapes=shapes,
        tensors=reversed(tensors.items()),
        copies=[TINY / "tokenizer.json", TINY / "no such file"],
        shard_bytes=8_000_000,
        on_progress=lambda num_done, num_total: progress.append((num_done, num_total)),
    )
    files = sorted(path.name for path in (tmp_path / "folder").iterdir())
    assert files == [
        "config.json",
        *[f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)],
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    assert num_bytes == 2 * 15_735_168 and len(progress) == len(shapes) and progress[-1] == (num_bytes, num_bytes)
    ours, theirs = (load_weights(folder, config, dtype=None, device="cpu") for folder in (tmp_path / "folder", TINY))
    assert torch.equal(ours.embed_VE, theirs.embed_VE)
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(a.qkv_weight, b.qkv_weight) and torch.equal(a.down_weight, b.down_weight)


def test_a_folder_that_cannot_be_finished_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.ones(4)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        write_folder(
            tmp_path / "folder",
            config={},
            dtype=torch.float32,
            shapes={"a": (4,), "b": (4,)},
            tensors=broken(),
            copies=[],
        )
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        widen_folder(TINY, tmp_path, SMALL, dtype=torch.float32)
    assert (tmp_path / "kept").read_text() == "mine"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_random_model_runs_in_16_bits_and_in_the_engine(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = tmp_path / "random"
    shape = Shape(256, 6, 4, 2, 64, 512)
    write_random_folder(folder, shape, vocab_size=9_000, max_context=4_096, dtype=dtype)
    config = load_config(folder)
    assert shape_of(config) == shape and config.vocab_size == 9_000 and config.max_position_embeddings == 4_096
    logits = logits_of(folder, [list(range(100, 180))], dtype)
    assert logits.isfinite().all() and 0.05 < logits.std() < 5.0
    engine = load_engine(
        EngineOptions(folder=folder, cache_dir=tmp_path, device="cpu", compiled_step="off", max_model_len=64)
    )
    driver = Driver(engine)
    driver.add(0, request([5, 6, 7], greedy(8, num_logprobs=0)))
    driver.run()
    assert len(driver.token_ids[0, 0]) == 8
    engine.executor.close()


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size=8000: expected 8192 or more"):
        write_random_folder(tmp_path / "a", SMALL, vocab_size=8_000, max_context=64, dtype=torch.float32)


def test_the_command_prints_what_it_made_and_says_why_it_cannot(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(BENCHMARKS / "widen.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    made = run(str(TINY), str(tmp_path / "made"), "--shape", "small", "--device", "cpu")
    assert made.returncode == 0, made.stderr
    report = json.loads(made.stdout)
    assert report["num_parameters"] == 41_560_576 and report["num_bytes"] == 2 * 41_560_576
    assert load_config(tmp_path / "made").rms_norm_eps == pytest.approx(1e-5 * 384 / 512)
    refused = run(str(TINY), str(tmp_path / "refused"), "--shape", "draft-68m")
    assert refused.returncode == 1 and refused.stderr == (
        "widen.py: num_layers=2 is less than the 8 of the model to be widened\n"
    )


@pytest.mark.parametrize("kind", ["w8a8", "w4", "fp8"])
def test_a_random_model_of_packed_numbers_is_one_of_the_same_size_of_numbers(kind: str, tmp_path: Path) -> None:
    shape = Shape(256, 1, 4, 2, 64, 512)
    write_random_folder(
        tmp_path / "model",
        shape,
        vocab_size=8192,
        max_context=64,
        dtype=torch.bfloat16,
        quantized=QuantizationType(kind),
    )
    config = load_config(tmp_path / "model")
    (layer,) = load_weights(tmp_path / "model", config, dtype=None, device="cpu", keep_quantized=True).layers
    assert isinstance(layer.gate_up_weight, QuantizedWeight) and layer.gate_up_weight.shape == (1024, 256)
    assert layer.gate_up_weight.dequantize().float().std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.down_weight.dequantize().float().std().item() == pytest.approx(0.02 / 2**0.5, rel=0.05)
