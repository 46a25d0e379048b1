"""Folders that we write and read, beside the packages whose formats they are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from quantized_folders import as_auto_awq, as_auto_gptq, logits_of, sequences, small_model

from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.models.weights import load_weights
from autobot_llm.engine.quantization.quantize import quantize_folder
from autobot_llm.engine.quantization.scheme import QuantizationConfig, QuantizationType
from autobot_llm.engine.quantization.weight import QuantizedWeight
from autobot_llm.errors import ConfigurationError, ModelLoadError

TYPES = [kind for kind in QuantizationType if kind is not QuantizationType.NONE]


def quantized(folder: Path, source: Path, kind: str, **more: object) -> Path:
    config = QuantizationConfig(type=QuantizationType(kind), **more)
    quantize_folder(source, folder, config, sequences_BL=sequences())
    return folder


def engine_logits(folder: Path, ids: torch.Tensor, *, keep_quantized: bool) -> torch.Tensor:
    """Our decoder's, with cached attention, in float32 from the folder's weights."""
    import numpy as np

    from autobot_llm.engine.attention.sdpa import SdpaAttention
    from autobot_llm.engine.batching.plan import StepBatch
    from autobot_llm.engine.models.decoder import Decoder

    config = load_config(folder)
    weights = load_weights(folder, config, dtype=torch.float32, device="cpu", keep_quantized=keep_quantized)
    assert weights.is_quantized is keep_quantized
    num_tokens = ids.shape[1]
    attention = SdpaAttention(config, num_blocks=8, block_size=16, dtype=torch.float32, device=torch.device("cpu"))
    places = np.arange(num_tokens)
    batch = StepBatch(
        ids_T=ids[0].numpy(), positions_T=places.astype(np.int32), slots_T=places,
        query_starts=np.array([0, num_tokens], np.int32), context_lens=np.array([num_tokens], np.int32),
        block_tables_SB=np.arange(8, dtype=np.int32)[None], logit_rows_R=places,
        pending_rows_T=np.full(num_tokens, -1, np.int32),
    )  # fmt: skip
    return Decoder(config, weights).forward(
        ids[0], torch.from_numpy(batch.positions_T), torch.from_numpy(places), attention, attention.prepare(batch)
    )


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", TYPES)
def test_transformers_reads_what_we_write_and_computes_what_we_compute(tmp_path: Path, kind: str) -> None:
    source = small_model(tmp_path / "model")
    folder = quantized(tmp_path / "quantized", source, kind)
    ids = sequences(1)
    theirs = logits_of(folder, ids)[0]
    # the products for 4 and 8 bits take their inputs in bfloat16; a rounded activation may fall on the other side
    assert relative_error(engine_logits(folder, ids, keep_quantized=True), theirs) < 0.03
    if kind not in ("w8a8", "fp8"):  # without rounded activations the dequantized twin is the same model
        exactly = 0.01 if kind == "awq" else 1e-4  # theirs is rounded to bfloat16 where it is dequantized at load
        assert relative_error(engine_logits(folder, ids, keep_quantized=False), theirs) < exactly
    # and the comparison can tell: another model's logits are far away
    assert relative_error(theirs.roll(1, 0), theirs) > 0.5


def dense_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    return engine_logits(folder, ids, keep_quantized=False)


@pytest.mark.parametrize("kind", TYPES)
def test_compressed_tensors_own_decompression_gives_our_matrices_bit_for_bit(tmp_path: Path, kind: str) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig as TheirConfig
    from safetensors.torch import load_file

    folder = quantized(tmp_path / "quantized", small_model(tmp_path / "model"), kind)
    config = load_config(folder)
    ours = load_weights(folder, config, dtype=None, device="cpu")
    theirs = TheirConfig(**json.loads((folder / "config.json").read_text())["quantization_config"])
    scheme = theirs.config_groups["group_0"]
    stored = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
    for index, layer in enumerate(ours.layers):
        module = f"model.layers.{index}.mlp.down_proj."
        parts = {name.removeprefix(module): t for name, t in stored.items() if name.startswith(module)}
        compressor = BaseCompressor.get_value_from_registry(theirs.format)
        expected = compressor.decompress(parts, scheme)["weight"].to(torch.bfloat16)
        assert torch.equal(layer.down_weight, expected)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_every_family_is_quantized_with_its_biases_and_norms(tmp_path: Path, family: str) -> None:
    source = small_model(tmp_path / "model", family)
    folder = quantized(tmp_path / "quantized", source, "awq", group_size=32)
    ids = sequences(1)
    assert relative_error(engine_logits(folder, ids, keep_quantized=True), dense_logits(source, ids)) < 0.35
    config = load_config(folder)
    assert config.quantization is not None
    assert config.quantization.scheme.group_size == 32


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("permuted", [False, True])
def test_auto_gptq_folders_are_read(tmp_path: Path, version: str, permuted: bool) -> None:
    source = small_model(tmp_path / "model")
    dense = as_auto_gptq(tmp_path / "gptq", source, version=version, permuted=permuted)
    check_read(tmp_path / "gptq", dense)


def test_a_quantized_head_is_dequantized(tmp_path: Path) -> None:
    source = small_model(tmp_path / "model", tie_word_embeddings=False)
    dense = as_auto_gptq(tmp_path / "gptq", source, version="gptq", head=True)
    config = load_config(tmp_path / "gptq")
    weights = load_weights(tmp_path / "gptq", config, dtype=torch.float32, device="cpu", keep_quantized=True)
    assert not isinstance(weights.lm_head_VE, QuantizedWeight)
    torch.testing.assert_close(weights.lm_head_VE, dense["lm_head"], rtol=1e-6, atol=1e-6)
    assert isinstance(weights.layers[0].qkv_weight, QuantizedWeight)


def test_auto_awq_folders_are_read(tmp_path: Path) -> None:
    check_read(tmp_path / "awq", as_auto_awq(tmp_path / "awq", small_model(tmp_path / "model")))


def check_read(folder: Path, dense: dict[str, torch.Tensor]) -> None:
    config = load_config(folder)
    for keep_quantized in (False, True):
        weights = load_weights(folder, config, dtype=torch.float32, device="cpu", keep_quantized=keep_quantized)
        for index, layer in enumerate(weights.layers):
            prefix = f"model.layers.{index}"
            qkv = torch.cat([dense[f"{prefix}.self_attn.{name}_proj"] for name in "qkv"])
            for found, expected in ((layer.qkv_weight, qkv), (layer.down_weight, dense[f"{prefix}.mlp.down_proj"])):
                whole = found.dequantize() if isinstance(found, QuantizedWeight) else found
                torch.testing.assert_close(whole, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_method": "bitsandbytes"}, ["quant_method='bitsandbytes'", "compressed-tensors, gptq, awq"]),
        ({"quant_method": "gptq", "bits": 3}, ["bits=3", "4, 8"]),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, ["marlin", "gptq, gptq_v2"]),
        ({"quant_method": "awq", "version": "gemv"}, ["version='gemv'", "gemm"]),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, ["config_groups is empty"]),
        (
            {"quant_method": "compressed-tensors", "format": "marlin-24", "config_groups": {"a": {"weights": {}}}},
            ["format='marlin-24'", "pack-quantized"],
        ),
        (
            {
                "quant_method": "compressed-tensors", "format": "float-quantized",
                "config_groups": {"a": {"weights": {"type": "float", "num_bits": 8, "strategy": "channel"},
                                        "input_activations": {"type": "float", "num_bits": 8, "dynamic": False}}},
            },
            ["input_activations.dynamic=false", "expected true"],
        ),
        ({"quant_method": "gptq", "bits": "four"}, ["quantization_config", "bits"]),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, changes: dict[str, object], words: list[str]) -> None:
    source = small_model(tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": changes}))
    with pytest.raises(ModelLoadError) as caught:
        load_config(source)
    for word in (str(source / "config.json"), *words):
        assert word in caught.value.message


def test_a_folder_whose_tensors_do_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    folder = quantized(tmp_path / "quantized", small_model(tmp_path / "model"), "w4")
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 384
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match=r"mlp\.gate_proj\.weight_packed has shape"):
        load_weights(folder, load_config(folder), dtype=None, device="cpu")


def test_a_group_size_that_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = small_model(tmp_path / "model", intermediate_size=224)
    with pytest.raises(ConfigurationError, match=r"224 is not a multiple of group_size=128: expected .* 32"):
        quantized(tmp_path / "quantized", source, "w4")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_quantized_model_is_not_quantized_again(tmp_path: Path) -> None:
    folder = quantized(tmp_path / "quantized", small_model(tmp_path / "model"), "w8")
    with pytest.raises(ConfigurationError, match="quantized already"):
        quantized(tmp_path / "again", folder, "w4")


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    source = small_model(tmp_path / "model")
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigurationError, match="exists already"):
        quantized(tmp_path / "out", source, "w8")
    assert not list((tmp_path / "out").iterdir())


def test_a_model_that_changes_while_it_is_quantized_is_refused(tmp_path: Path) -> None:
    source = small_model(tmp_path / "model")

    def replace_the_file(what: str, done: int, total: int) -> None:
        if done == 1:
            data = (source / "model.safetensors").read_bytes()
            (source / "new").write_bytes(data)
            (source / "new").replace(source / "model.safetensors")

    config = QuantizationConfig(type=QuantizationType.W8)
    with pytest.raises(ModelLoadError, match="changed while it was read"):
        quantize_folder(source, tmp_path / "out", config, on_progress=replace_the_file)
    assert not (tmp_path / "out").exists()


PROGRAM = """
import sys, torch
from pathlib import Path
sys.path[:0] = [{tests!r}, {tests!r} + '/..']
from quantized_folders import sequences
from autobot_llm.engine.quantization.quantize import quantize_folder
from autobot_llm.engine.quantization.scheme import QuantizationConfig, QuantizationType
def tell(what, done, total):
    if what == "layers quantized" and done == {stop_at}:
        print("there", flush=True)
        import time
        time.sleep(60)
result = quantize_folder(Path({source!r}), Path({out!r}), QuantizationConfig(type=QuantizationType.GPTQ),
                         sequences_BL=sequences(), on_progress=tell)
print(result.num_resumed_layers)
"""


def stopped_run(source: Path, out: Path, with_signal: int) -> int:
    """The exit code of a process that is stopped when it has quantized one layer."""
    code = PROGRAM.format(tests=str(Path(__file__).parent), source=str(source), out=str(out), stop_at=1)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"there\n"
        time.sleep(0.2)
        os.kill(process.pid, with_signal)
        return process.wait(60)


@pytest.mark.skipif(os.name != "posix", reason="signals are a thing of POSIX systems")
def test_after_a_kill_no_folder_is_there_and_the_next_run_goes_on(tmp_path: Path) -> None:
    source = small_model(tmp_path / "model")
    assert stopped_run(source, tmp_path / "out", signal.SIGKILL) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    config = QuantizationConfig(type=QuantizationType.GPTQ)
    resumed = quantize_folder(source, tmp_path / "out", config, sequences_BL=sequences())
    assert resumed.num_resumed_layers == 1
    whole = quantize_folder(source, tmp_path / "whole", config, sequences_BL=sequences())
    assert whole.num_resumed_layers == 0
    assert resumed.num_linear_bytes == whole.num_linear_bytes
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "whole"]


@pytest.mark.skipif(os.name != "posix", reason="signals are a thing of POSIX systems")
def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    source = small_model(tmp_path / "model")
    assert stopped_run(source, tmp_path / "out", signal.SIGINT) != 0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_run_with_other_inputs_starts_anew(tmp_path: Path) -> None:
    source = small_model(tmp_path / "model")
    stopped_run(source, tmp_path / "out", signal.SIGKILL)
    config = QuantizationConfig(type=QuantizationType.GPTQ, desc_act=False)
    assert quantize_folder(source, tmp_path / "out", config, sequences_BL=sequences()).num_resumed_layers == 0
