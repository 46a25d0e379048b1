"""Loading safetensors: every layout gives the same tensors, and every damage is named before anything runs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from model_folders import TINY, change_json, write_random_model

from autobot_llm.engine.models.checkpoint import INDEX_FILE, SINGLE_FILE
from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.models.weights import DecoderWeights, expected_shapes, load_weights, measure_weights
from autobot_llm.errors import ModelLoadError


def load(folder: Path, dtype: torch.dtype | None = None) -> DecoderWeights:
    return load_weights(folder, load_config(folder), dtype=dtype, device="cpu")


def test_q_k_v_and_gate_up_are_one_matrix_each(tmp_path: Path) -> None:
    model = write_random_model(tmp_path, "qwen2")
    stored = model.state_dict()
    layer = load(tmp_path).layers[1]
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    qkv = torch.cat([stored[f"{attention}.{name}_proj.weight"] for name in "qkv"])
    assert torch.equal(layer.qkv_weight, qkv)
    assert layer.qkv_bias is not None
    assert torch.equal(layer.qkv_bias, torch.cat([stored[f"{attention}.{name}_proj.bias"] for name in "qkv"]))
    gate_up = torch.cat([stored[f"{mlp}.gate_proj.weight"], stored[f"{mlp}.up_proj.weight"]])
    assert torch.equal(layer.gate_up_weight, gate_up)
    assert layer.o_bias is None and layer.gate_up_bias is None and layer.q_norm_D is None


def test_shards_and_one_file_hold_the_same_model(tmp_path: Path) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    write_random_model(one, "llama", seed=5)
    write_random_model(many, "llama", seed=5, max_shard_size="200KB")
    assert len(list(many.glob("*.safetensors"))) > 2
    assert not (many / SINGLE_FILE).exists()
    first, second = load(one), load(many)
    assert torch.equal(first.embed_VE, second.embed_VE)
    for a, b in zip(first.layers, second.layers, strict=True):
        assert torch.equal(a.qkv_weight, b.qkv_weight)
        assert torch.equal(a.down_weight, b.down_weight)


def test_tied_embeddings_are_one_tensor_and_untied_two(tmp_path: Path) -> None:
    write_random_model(tmp_path / "tied", "llama")
    write_random_model(tmp_path / "untied", "llama", tie_word_embeddings=False)
    tied, untied = load(tmp_path / "tied"), load(tmp_path / "untied")
    assert tied.lm_head_VE is tied.embed_VE
    assert not torch.equal(untied.lm_head_VE, untied.embed_VE)
    assert untied.num_bytes - tied.num_bytes == tied.embed_VE.numel() * 4


def test_the_checkpoints_dtype_is_kept_unless_another_is_asked_for() -> None:
    kept, widened = load(TINY), load(TINY, torch.float32)
    assert kept.dtype == torch.bfloat16
    assert widened.dtype == torch.float32
    assert torch.equal(kept.layers[3].o_weight.float(), widened.layers[3].o_weight)
    assert kept.num_bytes == 2 * 15_735_168  # parameters, from the model card


def test_mixed_dtypes_become_the_narrowest_that_holds_them_all(tmp_path: Path) -> None:
    write_random_model(tmp_path, "llama", dtype="bfloat16")
    rewrite(tmp_path, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].float()}))
    weights = load(tmp_path)
    assert weights.dtype == weights.norm_E.dtype == torch.float32


def test_weights_do_not_change_with_the_file(tmp_path: Path) -> None:
    write_random_model(tmp_path, "llama", dtype="bfloat16")
    weights = load(tmp_path)
    before = weights.embed_VE.clone()
    path = tmp_path / SINGLE_FILE
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(path.stat().st_size // 2))
    assert torch.equal(weights.embed_VE, before)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_progress_counts_the_bytes_of_the_files(tmp_path: Path, dtype: torch.dtype | None) -> None:
    model = write_random_model(tmp_path, "qwen3", tie_word_embeddings=False, dtype="bfloat16", intermediate_size=60_000)
    calls: list[tuple[int, int]] = []
    load_weights(
        tmp_path, load_config(tmp_path), dtype=dtype, device="cpu", on_progress=lambda *call: calls.append(call)
    )
    num_total = sum(tensor.numel() * 2 for tensor in model.state_dict().values())
    done = [num_done for num_done, _ in calls]
    assert len(done) > 5  # 71 MB in spans of 8 MiB
    assert done == sorted(set(done))
    assert {total for _, total in calls} == {num_total} == {done[-1]}


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float32])
def test_what_a_model_will_take_up_is_known_from_its_headers(tmp_path: Path, dtype: torch.dtype | None) -> None:
    for name, folder in (("tied", TINY), ("untied", tmp_path)):
        if name == "untied":
            write_random_model(folder, "qwen2", tie_word_embeddings=False)
        measured = measure_weights(folder, load_config(folder), dtype=dtype)
        assert measured == load(folder, dtype).num_bytes, name


def test_measuring_reads_no_weight(tmp_path: Path) -> None:
    transformers.MistralConfig(vocab_size=32_000, dtype="bfloat16").save_pretrained(tmp_path)  # Mistral 7B's sizes
    config = load_config(tmp_path)
    file = write_without_content(tmp_path, expected_shapes(config))
    start = time.perf_counter()
    assert measure_weights(tmp_path, config, dtype=None) == 2 * 7_241_732_096  # parameters, as its makers say
    assert time.perf_counter() - start < 2
    assert file.stat().st_size > 14e9 > 2**24 > file.stat().st_blocks * 512


def write_without_content(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A safetensors file with a header and a hole for its weights, which takes no room on the disk."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path = folder / SINGLE_FILE
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(folder / SINGLE_FILE)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / SINGLE_FILE)


def truncate(folder: Path) -> None:
    path = folder / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:-1000])


NORM = "model.layers.2.input_layernorm.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "truncated": (truncate, [SINGLE_FILE, "truncated"]),
    "empty": (lambda folder: (folder / SINGLE_FILE).write_bytes(b""), [SINGLE_FILE, "not a safetensors file"]),
    "no header": (lambda folder: (folder / SINGLE_FILE).write_bytes(b"\xff" * 500), [SINGLE_FILE, "not a safetensors"]),
    "missing tensor": (lambda folder: rewrite(folder, lambda t: t.pop(NORM)), [NORM, "is missing"]),
    "wrong shape": (
        lambda folder: rewrite(folder, lambda t: t.update({NORM: torch.ones(63)})),
        [SINGLE_FILE, NORM, "(63,)", "(64,)"],
    ),
    "wrong dtype": (
        lambda folder: rewrite(folder, lambda t: t.update({NORM: torch.ones(64, dtype=torch.float64)})),
        [SINGLE_FILE, NORM, "F64", "F32, BF16, F16"],
    ),
    "another model's tensor": (
        lambda folder: rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})),
        ["no tensor model.layers.0.self_attn.q_proj.bias"],
    ),
    "one layer more": (
        lambda folder: change_json(folder / "config.json", num_hidden_layers=2),
        ["no tensor model.layers.2", "more"],
    ),
    "untied without a head": (
        lambda folder: change_json(folder / "config.json", tie_word_embeddings=False),
        ["lm_head.weight is missing"],
    ),
    "no file": (lambda folder: (folder / SINGLE_FILE).unlink(), [f"neither {SINGLE_FILE} nor {INDEX_FILE}"]),
    "pickled": (
        lambda folder: (folder / SINGLE_FILE).rename(folder / "pytorch_model.bin"),
        ["pytorch_model.bin", "convert it"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_by_file_and_tensor(damage: str, tmp_path: Path) -> None:
    write_random_model(tmp_path, "llama")
    spoil, told = DAMAGES[damage]
    spoil(tmp_path)
    with pytest.raises(ModelLoadError) as caught:
        load(tmp_path)
    for part in told:
        assert part in caught.value.message


def sharded(folder: Path) -> list[Path]:
    write_random_model(folder, "llama", max_shard_size="200KB")
    return sorted(folder.glob("model-*.safetensors"))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shard = sharded(tmp_path)[1]
    shard.unlink()
    with pytest.raises(ModelLoadError, match=f"{shard.name}: no such file"):
        load(tmp_path)


def test_a_tensor_that_is_not_where_the_index_says_is_named(tmp_path: Path) -> None:
    shards = sharded(tmp_path)
    index = json.loads((tmp_path / INDEX_FILE).read_text())["weight_map"]
    index["model.norm.weight"] = next(s.name for s in shards if s.name != index["model.norm.weight"])
    change_json(tmp_path / INDEX_FILE, weight_map=index)
    with pytest.raises(ModelLoadError, match=r"tensor model\.norm\.weight is missing"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../b.safetensors"}}'])
def test_a_garbled_index_is_named(text: str, tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX_FILE).write_text(text)
    with pytest.raises(ModelLoadError, match=INDEX_FILE):
        load(tmp_path)


def test_the_tied_head_may_be_stored_a_second_time(tmp_path: Path) -> None:
    write_random_model(tmp_path, "llama")
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": torch.zeros(8192, 64)}))
    weights = load(tmp_path)
    assert weights.lm_head_VE is weights.embed_VE


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("change", ["written to", "replaced", "removed"])
def test_a_file_that_changes_while_it_is_read_is_refused(
    change: str, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    write_random_model(tmp_path, "llama")
    path = tmp_path / SINGLE_FILE
    content = path.read_bytes()

    def change_it(num_done: int, num_total: int) -> None:
        if change == "written to":
            path.write_bytes(content[:-4] + bytes(4))
            return
        path.unlink()
        if change == "replaced":
            path.write_bytes(content)

    with pytest.raises(ModelLoadError, match=rf"{SINGLE_FILE}: (changed|removed) while it was read"):
        load_weights(tmp_path, load_config(tmp_path), dtype=dtype, device="cpu", on_progress=change_it)


def test_a_header_with_a_hole_is_refused(tmp_path: Path) -> None:
    """The tensors' places come from the header, so it must account for every byte."""
    write_random_model(tmp_path, "llama")
    path = tmp_path / SINGLE_FILE
    content = path.read_bytes()
    num_bytes = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + num_bytes])
    header["model.norm.weight"]["data_offsets"] = [n + 8 for n in header["model.norm.weight"]["data_offsets"]]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + num_bytes :] + bytes(8))
    with pytest.raises(ModelLoadError, match="not a safetensors file"):
        load(tmp_path)
