"""Read and write EAGLE-3 drafts in the published format. Knows names, shapes and files; knows no arithmetic.

Published: config.json and model.safetensors (or pytorch_model.bin) with fc.weight, midlayer.*, norm.weight,
lm_head.weight, d2t and t2d. Other exports call the layer `layers.0`, or store the target's embeddings beside it.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from autobot_llm.engine.models.config_file import llama_config
from autobot_llm.engine.models.whole_file import write_json, write_tensors
from autobot_llm.engine.speculative.eagle.config import EagleConfig, load_eagle_config
from autobot_llm.engine.speculative.eagle.model import EagleDraft
from autobot_llm.errors import ModelLoadError

FILE_NAMES = ("model.safetensors", "pytorch_model.bin")
_EMBEDDINGS = "embed_tokens.weight"


def load_eagle(
    folder: Path,
    *,
    vocab_size: int,
    target_hidden_size: int,
    lm_head_VE: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> EagleDraft:
    """The draft in `folder`, for a target of these sizes; `lm_head_VE` is the target's projection, for a draft that
    shares it.

    Raises ModelLoadError, naming file, tensor and shape, for whatever is missing, malformed or of another target.
    """
    folder = Path(folder)
    config = load_eagle_config(folder)
    where = folder / "config.json"
    if config.layer.vocab_size != vocab_size:
        raise ModelLoadError(f"{where}: vocab_size={config.layer.vocab_size}; the target has {vocab_size}")
    if config.target_hidden_size != target_hidden_size:
        raise ModelLoadError(f"{where}: features of {config.target_hidden_size}; the target's are {target_hidden_size}")
    path = next((folder / name for name in FILE_NAMES if (folder / name).exists()), None)
    if path is None:
        raise ModelLoadError(f"{folder}: neither {' nor '.join(FILE_NAMES)} is there")
    found = {_published_name(name): tensor for name, tensor in _read(path).items()}
    found.pop(_EMBEDDINGS, None)  # the target's, which are there already
    with torch.device("meta"):
        draft = EagleDraft(config)
    state: dict[str, torch.Tensor] = {}
    for name, empty in draft.state_dict().items():
        tensor = found.pop(name, None)
        if tensor is None and name in ("d2t", "t2d") and config.draft_vocab_size == vocab_size:
            tensor = torch.zeros_like(empty, device="cpu") if name == "d2t" else torch.ones(vocab_size)
        if tensor is None:
            raise ModelLoadError(f"{path}: tensor {name} is missing")
        if tensor.shape != empty.shape:
            raise ModelLoadError(
                f"{path}: tensor {name} has shape {tuple(tensor.shape)}; config.json asks for {tuple(empty.shape)}"
            )
        state[name] = tensor.to(device=device, dtype=dtype if empty.is_floating_point() else empty.dtype)
    if found:
        raise ModelLoadError(
            f"{path}: an EAGLE-3 draft of this config.json has no tensor {', '.join(sorted(found)[:3])}"
        )
    draft.load_state_dict(state, assign=True)
    ids_W = draft.target_ids
    if int(ids_W.min()) < 0 or int(ids_W.max()) >= vocab_size:
        raise ModelLoadError(f"{path}: d2t points outside of the target's {vocab_size} tokens")
    if config.shares_lm_head:
        if lm_head_VE is None:
            raise ModelLoadError(f"{folder}: the draft shares the target's projection, which is not given")
        draft.share_lm_head(lm_head_VE.to(device=device, dtype=dtype))
    return draft.requires_grad_(False)


def save_eagle(folder: Path, draft: EagleDraft, *, base_model: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config.json and model.safetensors into `folder`; each file appears whole or not at all."""
    tensors = draft.state_dict()
    stored = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    write_tensors(folder / FILE_NAMES[0], stored)
    write_json(folder / "config.json", _config_file(draft.config, base_model, dtype))


def _config_file(config: EagleConfig, base_model: str, dtype: torch.dtype) -> dict[str, Any]:
    about = llama_config(config.layer, dtype) | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        "norm_before_residual": config.norm_before_residual,
        "eagle_shares_lm_head": config.shares_lm_head,
        "base_model_name_or_path": base_model,
    }
    if config.feature_layers is not None:
        about["eagle_aux_hidden_state_layer_ids"] = list(config.feature_layers)
    return about


def _published_name(name: str) -> str:
    name = name.removeprefix("model.")
    return f"midlayer.{name.removeprefix('layers.0.')}" if name.startswith("layers.0.") else name


def _read(path: Path) -> Mapping[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(str(path))
        value = torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError) as exc:
        raise ModelLoadError(f"{path}: not a file of tensors alone: {str(exc).splitlines()[0]}") from exc
    if not isinstance(value, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in value.values()):
        raise ModelLoadError(f"{path}: expected a dictionary of tensors")
    return value
