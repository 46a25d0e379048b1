"""Small models to quantize, and folders as AutoGPTQ and AutoAWQ write them."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from model_folders import change_json, write_random_model
from safetensors.torch import load_file, save_file

from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.models.weights import load_weights
from autobot_llm.engine.quantization.packing import pack_awq, pack_columns, pack_rows

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32, "initializer_range": 0.1}
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
               "mlp.up_proj", "mlp.down_proj")  # fmt: skip


def small_model(folder: Path, family: str = "llama", **more: Any) -> Path:
    write_random_model(folder, family, **{"dtype": "bfloat16", **SIZES, **more})
    return folder


def sequences(num: int = 8, length: int = 48, vocabulary: int = 8192) -> torch.Tensor:
    return torch.randint(5, vocabulary, (num, length), generator=torch.Generator().manual_seed(1))


def logits_of(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """transformers' own, in float32.

    Zero points of packed matrices are dequantized at load: kept packed, compressed-tensors 0.19 makes room for as many
    as there are outputs, and does not find them in any folder, its own included.
    """
    import transformers

    quantization = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    is_asymmetric = any(not group["weights"]["symmetric"] for group in quantization.get("config_groups", {}).values())
    how = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if is_asymmetric else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the folder is quantized, too
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()
    with torch.no_grad():
        return model(ids).logits.float()


def as_whole_weights(folder: Path, quantized_folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The same model with its matrices dequantized: the slow twin."""
    config = load_config(quantized_folder)
    weights = load_weights(quantized_folder, config, dtype=dtype, device="cpu")
    tensors = {"model.embed_tokens.weight": weights.embed_VE, "model.norm.weight": weights.norm_E}
    for index, layer in enumerate(weights.layers):
        heads = config.head_size
        rows = (config.num_heads * heads, config.num_kv_heads * heads, config.num_kv_heads * heads)
        matrices = dict(zip(("q", "k", "v"), layer.qkv_weight.split(rows), strict=True))
        gate, up = layer.gate_up_weight.chunk(2)
        named = {f"self_attn.{n}_proj": m for n, m in matrices.items()} | {
            "self_attn.o_proj": layer.o_weight, "mlp.gate_proj": gate, "mlp.up_proj": up,
            "mlp.down_proj": layer.down_weight, "input_layernorm": layer.input_norm_E,
            "post_attention_layernorm": layer.post_norm_E,
        }  # fmt: skip
        if layer.qkv_bias is not None:
            biases = zip(("q", "k", "v"), layer.qkv_bias.split(rows), strict=True)
            tensors |= {f"model.layers.{index}.self_attn.{n}_proj.bias": b.contiguous() for n, b in biases}
        tensors |= {f"model.layers.{index}.{n}.weight": m.contiguous() for n, m in named.items()}
    shutil.copytree(quantized_folder, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    name = str(dtype).removeprefix("torch.")
    change_json(folder / "config.json", quantization_config=None, dtype=name, torch_dtype=name)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def as_auto_gptq(
    folder: Path, source: Path, *, version: str, permuted: bool = False, head: bool = False
) -> dict[str, torch.Tensor]:
    """Write `source` as AutoGPTQ does, 4 bits in groups of 32; return the matrices it stands for."""
    tensors, dense = load_file(source / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(3)
    for module in [*_modules(tensors), *(["lm_head"] if head else [])]:
        weight_OI = tensors.pop(f"{module}.weight").float()
        num_outputs, num_inputs = weight_OI.shape
        group_of_I = torch.arange(num_inputs) // 32
        if permuted:
            group_of_I = group_of_I[torch.randperm(num_inputs, generator=generator)]
        zeros_GO = torch.randint(1, 16, (num_inputs // 32, num_outputs), generator=generator)
        scales_GO = (torch.rand(num_inputs // 32, num_outputs, generator=generator) * 0.02 + 0.01).half()
        values_IO = torch.randint(0, 16, (num_inputs, num_outputs), generator=generator)
        dense[module] = ((values_IO - zeros_GO[group_of_I]) * scales_GO.float()[group_of_I]).t()
        stored_zeros = zeros_GO if version == "gptq_v2" else zeros_GO - 1
        tensors |= {
            f"{module}.qweight": pack_columns(values_IO, 4),
            f"{module}.qzeros": pack_rows(stored_zeros, 4),
            f"{module}.scales": scales_GO,
            f"{module}.g_idx": group_of_I.to(torch.int32),
        }
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": permuted,
              "checkpoint_format": version}  # fmt: skip
    _write(folder, source, tensors, config)
    return dense


def as_auto_awq(folder: Path, source: Path) -> dict[str, torch.Tensor]:
    """Write `source` as AutoAWQ does (gemm), in groups of 32; return the matrices it stands for."""
    tensors, dense = load_file(source / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(4)
    for module in _modules(tensors):
        num_outputs, num_inputs = tensors.pop(f"{module}.weight").shape
        groups_I = torch.arange(num_inputs) // 32
        zeros_GO = torch.randint(0, 16, (num_inputs // 32, num_outputs), generator=generator)
        scales_GO = (torch.rand(num_inputs // 32, num_outputs, generator=generator) * 0.02 + 0.01).half()
        values_IO = torch.randint(0, 16, (num_inputs, num_outputs), generator=generator)
        dense[module] = ((values_IO - zeros_GO[groups_I]) * scales_GO.float()[groups_I]).t()
        tensors |= {
            f"{module}.qweight": pack_awq(values_IO),
            f"{module}.qzeros": pack_awq(zeros_GO),
            f"{module}.scales": scales_GO,
        }
    _write(folder, source, tensors, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True,
                                     "version": "gemm"})  # fmt: skip
    return dense


def _modules(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [name.removesuffix(".weight") for name in tensors if name.removesuffix(".weight").endswith(PROJECTIONS)]


def _write(folder: Path, source: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]) -> None:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
