"""Find and load what was trained to guess for one model: Medusa heads, or an EAGLE-3 draft. Knows folders, files and
the model's sizes; knows nothing of steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from autobot_llm.engine.attention.paged import BLOCK_SIZE
from autobot_llm.engine.executor import FeatureKinds
from autobot_llm.engine.gpu.graph_sizes import MAX_ROWS
from autobot_llm.engine.gpu.options import DraftPlace, why_not_fused
from autobot_llm.engine.kv_cache.block_pool import BlockPool
from autobot_llm.engine.models.config import ModelConfig
from autobot_llm.engine.models.embeddings import Embeddings, load_embeddings
from autobot_llm.engine.speculative.eagle.checkpoint import load_eagle
from autobot_llm.engine.speculative.eagle.config import default_feature_layers, load_eagle_config
from autobot_llm.engine.speculative.eagle.device_proposer import DEVICE_BREADTH, DeviceEagleProposer
from autobot_llm.engine.speculative.eagle.model import EagleDraft
from autobot_llm.engine.speculative.eagle.proposer import EagleProposer
from autobot_llm.engine.speculative.medusa.checkpoint import load_medusa_heads
from autobot_llm.engine.speculative.medusa.config import MEDUSA_CHECKPOINTS, TREE_CANDIDATES
from autobot_llm.engine.speculative.medusa.decoder import assumed_accuracies
from autobot_llm.engine.speculative.medusa.device_heads import DeviceHeads
from autobot_llm.engine.speculative.medusa.heads import StackedHeads
from autobot_llm.engine.speculative.medusa.proposer import WANTED, MedusaProposer
from autobot_llm.errors import ConfigurationError, ModelLoadError

HeadsMethod = Literal["medusa", "eagle3"]


def find_heads(folder: Path, method: HeadsMethod) -> Path | None:
    """The folder of heads for the model in `folder`: `medusa` or `eagle3` in it, `<model>-medusa` or `<model>-eagle3`
    beside it, else the published Medusa heads under their name, with or without their owner's. None where there are
    none."""
    places = [folder / method, folder.with_name(f"{folder.name}-{method}")]
    if method == "medusa":
        published = (heads for model, heads in MEDUSA_CHECKPOINTS.items() if model.split("/")[-1] == folder.name)
        for owner, name in (heads.split("/") for heads in published):
            places += [
                folder.with_name(name),
                folder.parent.parent / owner / name,
                folder.with_name(f"{owner}--{name}"),
            ]
    return next((place for place in places if (place / "config.json").is_file()), None)


def method_of(heads_folder: Path) -> HeadsMethod:
    """What the heads in a folder are for, by the names of its files."""
    return "medusa" if any(heads_folder.glob("medusa_lm_head.*")) else "eagle3"


def features_of(method: HeadsMethod, heads_folder: Path, config: ModelConfig) -> FeatureKinds:
    """What a method reads of the model's steps. Raises ModelLoadError for what its files say of that."""
    if method == "medusa":
        return WANTED
    layers = load_eagle_config(heads_folder).feature_layers or default_feature_layers(config.num_layers)
    if not all(0 <= layer <= config.num_layers for layer in layers):
        raise ModelLoadError(
            f"{heads_folder}: eagle_aux_hidden_state_layer_ids={list(layers)}: the model has {config.num_layers} layers"
        )
    return FeatureKinds(layers=layers)


def make_medusa(
    heads_folder: Path,
    folder: Path,
    config: ModelConfig,
    *,
    breadth: int = 1,
    stream: torch.cuda.Stream | None = None,
) -> MedusaProposer:
    """The heads of `heads_folder` for the model in `folder`; `breadth` of their trees as of MedusaProposer. Raises
    ModelLoadError where they do not fit.

    `stream`: that of a GPU's steps. The heads run there, in the model's dtype, and their trees are as broad as a step
    takes: its rows are next to nothing beside its weights.
    """
    dtype = torch.float32 if stream is None else getattr(torch, config.checkpoint_dtype or "float32")
    device = "cpu" if stream is None else stream.device
    lm_head_VE = load_embeddings(folder, config).lm_head_VE.to(device=device, dtype=dtype)
    loaded = load_medusa_heads(
        heads_folder,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        lm_head_VE=lm_head_VE,
        dtype=dtype,
        device=device,
    )
    accuracies = loaded.about.medusa_head_accuracies or assumed_accuracies(len(loaded.heads))
    heads = StackedHeads(loaded.heads)
    if stream is None:
        return MedusaProposer(heads, accuracies, breadth=breadth)
    on_device = DeviceHeads(heads, config.hidden_size, dtype, stream)
    return MedusaProposer(on_device, accuracies, breadth=TREE_CANDIDATES, max_rows=MAX_ROWS)


def make_eagle(
    heads_folder: Path, folder: Path, config: ModelConfig, max_model_len: int, *, breadth: int = 1
) -> EagleProposer:
    """The EAGLE-3 draft of `heads_folder` for the model in `folder`; `breadth` of its trees as of EagleProposer. Raises
    ModelLoadError where it does not fit."""
    embeddings = load_embeddings(folder, config)
    draft = _load_eagle(heads_folder, config, embeddings, torch.float32)
    layers = features_of("eagle3", heads_folder, config).layers
    return EagleProposer(draft, embeddings.embed_VE, layers, max_model_len=max_model_len, breadth=breadth)


def make_eagle_on_device(
    heads_folder: Path, config: ModelConfig, place: DraftPlace, *, num_tokens: int, num_blocks: int
) -> DeviceEagleProposer:
    """The same beside a model that runs on a GPU, for drafts at most `num_tokens` deep, with at most so many cache
    blocks. Raises ModelLoadError where it does not fit the model, ConfigurationError where it does not fit into
    memory."""
    from autobot_llm.engine.gpu.eagle_trees import build_eagle_trees  # triton is needed only here

    embed_VE, limits = place.embeddings.embed_VE, place.limits
    eagle_config = load_eagle_config(heads_folder)
    why_not = why_not_fused(eagle_config.layer, embed_VE.dtype)
    if why_not is not None:
        raise ModelLoadError(f"{heads_folder}: {why_not}")
    try:
        draft = _load_eagle(heads_folder, config, place.embeddings, embed_VE.dtype)
        device, num_blocks = build_eagle_trees(
            draft, place, max_depth=num_tokens, num_blocks=num_blocks, name=heads_folder.name
        )
    except torch.OutOfMemoryError as error:
        raise ConfigurationError(
            f"{heads_folder}: the GPU has no room for the draft beside the model: {error}; set "
            "AUTOBOT_GPU_MEMORY_UTILIZATION lower"
        ) from error
    return DeviceEagleProposer(
        device,
        BlockPool(num_blocks, BLOCK_SIZE, prefix_caching=False, scattered=True),
        features_of("eagle3", heads_folder, config).layers,
        max_model_len=limits.max_model_len,
        breadth=DEVICE_BREADTH,
        max_rows=MAX_ROWS,
    )


def _load_eagle(heads_folder: Path, config: ModelConfig, embeddings: Embeddings, dtype: torch.dtype) -> EagleDraft:
    """The draft on the embeddings' device."""
    draft = load_eagle(
        heads_folder,
        vocab_size=config.vocab_size,
        target_hidden_size=config.hidden_size,
        lm_head_VE=embeddings.lm_head_VE,
        dtype=dtype,
        device=embeddings.embed_VE.device,
    )
    size = draft.config.layer.hidden_size
    if size != config.hidden_size:
        raise ModelLoadError(
            f"{heads_folder}: hidden_size={size}, and the embeddings it reads are the model's, of {config.hidden_size}"
        )
    return draft
