"""What a model folder says of itself, and what is said of a folder that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from model_folders import TINY

from autobot_llm.engine.models.config import GenerationDefaults, RopeScaling, load_config
from autobot_llm.errors import ModelLoadError

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
}


def write_config(folder: Path, **changes: Any) -> Path:
    value = {name: field for name, field in {**LLAMA, **changes}.items() if field is not ...}
    (folder / "config.json").write_text(json.dumps(value))
    return folder


def test_the_embedded_model() -> None:
    config = load_config(TINY)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_size) == (8, 6, 2, 64)
    assert config.eos_token_ids == {0, 4}
    assert config.checkpoint_dtype == "bfloat16"
    assert config.sliding_windows == (0,) * 8
    assert config.generation == GenerationDefaults(temperature=0.7, top_k=40, top_p=0.95)


def test_end_of_sequence_ids_of_both_files_count(tmp_path: Path) -> None:
    write_config(tmp_path, eos_token_id=2)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load_config(tmp_path).eos_token_ids == {2, 7}


def test_a_greedy_model_advises_no_sampling(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6, "top_k": 50}')
    assert load_config(tmp_path).generation == GenerationDefaults()


@pytest.mark.parametrize(
    ("family", "fields", "biases"),
    [
        ("llama", {}, (False, False, False)),
        ("llama", {"attention_bias": True}, (True, True, False)),
        ("llama", {"mlp_bias": True}, (False, False, True)),
        ("mistral", {}, (False, False, False)),
        ("qwen2", {}, (True, False, False)),
        ("qwen3", {"attention_bias": True}, (True, True, False)),
    ],
)
def test_which_projections_have_biases(
    family: str, fields: dict[str, Any], biases: tuple[bool, bool, bool], tmp_path: Path
) -> None:
    config = load_config(write_config(tmp_path, model_type=family, **fields))
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == biases
    assert config.qk_norm == (family == "qwen3")


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"model_type": "llama", "sliding_window": 8}, (0, 0, 0, 0)),
        ({"model_type": "mistral", "sliding_window": 8}, (8, 8, 8, 8)),
        ({"model_type": "mistral", "sliding_window": None}, (0, 0, 0, 0)),
        ({"model_type": "qwen2", "sliding_window": 8}, (0, 0, 0, 0)),
        (
            {"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3},
            (0, 0, 0, 8),
        ),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (8, 0, 8, 0),
        ),
    ],
)
def test_the_window_of_each_layer_follows_the_familys_rule(
    fields: dict[str, Any], windows: tuple[int, ...], tmp_path: Path
) -> None:
    assert load_config(write_config(tmp_path, **fields)).sliding_windows == windows


def test_rope_is_read_in_the_spelling_of_every_transformers_version(tmp_path: Path) -> None:
    linear = RopeScaling("linear", 2.0)
    spellings: list[dict[str, Any]] = [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000}},
    ]
    for fields in spellings:
        config = load_config(write_config(tmp_path, **fields))
        assert (config.rope_theta, config.rope_scaling) == (5e5, linear)
    assert load_config(write_config(tmp_path)).rope_theta == 10_000.0


def test_head_sizes(tmp_path: Path) -> None:
    assert load_config(write_config(tmp_path)).head_size == 16
    assert load_config(write_config(tmp_path, head_dim=24)).head_size == 24
    assert load_config(write_config(tmp_path, model_type="qwen3")).head_size == 128
    assert load_config(write_config(tmp_path, num_key_value_heads=...)).num_kv_heads == 4


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"model_type": "gpt2"}, ["model_type='gpt2'", "llama, mistral, qwen2 or qwen3"]),
        ({"model_type": ...}, ["model_type"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "silu"]),
        ({"hidden_size": "64"}, ["$.hidden_size", "int"]),
        ({"hidden_size": 64.5}, ["$.hidden_size"]),
        ({"vocab_size": 0}, ["$.vocab_size", ">= 1"]),
        ({"num_hidden_layers": ...}, ["num_hidden_layers"]),
        ({"num_hidden_layers": 2**31}, ["$.num_hidden_layers", "100000"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads=4", "num_key_value_heads=3"]),
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, ["hidden_size=64", "num_attention_heads=6"]),
        ({"head_dim": 15}, ["15 is odd"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["rope_scaling.rope_type='yarn'", "llama3"]),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, ["rope_type='dynamic'"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["rope_scaling.factor is missing"]),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            ["high_freq_factor"],
        ),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
        ({"torch_dtype": "float8_e4m3fn"}, ["dtype='float8_e4m3fn'", "bfloat16"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "bits"]),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, ["layer_types", "num_hidden_layers=4"]),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 4}, ["use_sliding_window"]),
        ({"model_type": "qwen3", "layer_types": ["linear_attention"] * 4}, ["layer_types='linear_attention'"]),
    ],
)
def test_what_cannot_be_computed_is_refused_by_file_and_field(
    fields: dict[str, Any], told: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError) as caught:
        load_config(write_config(tmp_path, **fields))
    for part in [str(tmp_path / "config.json"), *told]:
        assert part in caught.value.message


def test_a_missing_folder_or_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"nowhere: no such folder"):
        load_config(tmp_path / "nowhere")
    with pytest.raises(ModelLoadError, match=r"config\.json: no such file"):
        load_config(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"model_type": "llama",}', "\ufeff{}"], ids=range(5))
def test_garbled_json_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelLoadError, match=r"config\.json: "):
        load_config(tmp_path)


def test_a_wrong_value_in_generation_config_is_named(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"top_p": 1.5}')
    with pytest.raises(ModelLoadError, match=r"generation_config\.json: .*\$\.top_p"):
        load_config(tmp_path)
