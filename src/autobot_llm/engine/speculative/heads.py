"""Find and load what was trained to guess for one model: Medusa heads, or an EAGLE-3 draft. Knows folders, files and
the model's sizes; knows nothing of steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from autobot_llm.engine.models.config import ModelConfig
from autobot_llm.engine.models.embeddings import load_embeddings
from autobot_llm.engine.speculative.eagle.checkpoint import load_eagle
from autobot_llm.engine.speculative.eagle.config import default_feature_layers
from autobot_llm.engine.speculative.eagle.proposer import EagleProposer
from autobot_llm.engine.speculative.medusa.checkpoint import load_medusa_heads
from autobot_llm.engine.speculative.medusa.config import MEDUSA_CHECKPOINTS
from autobot_llm.engine.speculative.medusa.decoder import assumed_accuracies
from autobot_llm.engine.speculative.medusa.heads import StackedHeads
from autobot_llm.engine.speculative.medusa.proposer import MedusaProposer
from autobot_llm.errors import ModelLoadError

HeadsMethod = Literal["medusa", "eagle3"]


def find_heads(folder: Path, method: HeadsMethod) -> Path | None:
    """The folder of heads for the model in `folder`, of those beside it: `<model>-medusa` or `<model>-eagle3`, else
    the published Medusa heads under their name, with or without their owner's. None where there are none."""
    places = [folder.with_name(f"{folder.name}-{method}")]
    if method == "medusa":
        published = (heads for model, heads in MEDUSA_CHECKPOINTS.items() if model.split("/")[-1] == folder.name)
        for owner, name in (heads.split("/") for heads in published):
            places += [
                folder.with_name(name),
                folder.parent.parent / owner / name,
                folder.with_name(f"{owner}--{name}"),
            ]
    return next((place for place in places if (place / "config.json").is_file()), None)


def make_medusa(heads_folder: Path, folder: Path, config: ModelConfig, *, breadth: int = 1) -> MedusaProposer:
    """The heads of `heads_folder` for the model in `folder`; `breadth` of their trees as of MedusaProposer. Raises
    ModelLoadError where they do not fit."""
    lm_head_VE = load_embeddings(folder, config).lm_head_VE.float()
    loaded = load_medusa_heads(
        heads_folder, hidden_size=config.hidden_size, vocab_size=config.vocab_size, lm_head_VE=lm_head_VE
    )
    accuracies = loaded.about.medusa_head_accuracies or assumed_accuracies(len(loaded.heads))
    return MedusaProposer(StackedHeads(loaded.heads), accuracies, breadth=breadth)


def make_eagle(heads_folder: Path, folder: Path, config: ModelConfig, max_model_len: int) -> EagleProposer:
    """The EAGLE-3 draft of `heads_folder` for the model in `folder`. Raises ModelLoadError where it does not fit."""
    embeddings = load_embeddings(folder, config)
    draft = load_eagle(
        heads_folder,
        vocab_size=config.vocab_size,
        target_hidden_size=config.hidden_size,
        lm_head_VE=embeddings.lm_head_VE,
        dtype=torch.float32,
    )
    size, layers = (
        draft.config.layer.hidden_size,
        draft.config.feature_layers or default_feature_layers(config.num_layers),
    )
    if size != config.hidden_size:
        raise ModelLoadError(
            f"{heads_folder}: hidden_size={size}, and the embeddings it reads are the model's, of {config.hidden_size}"
        )
    if not all(0 <= layer <= config.num_layers for layer in layers):
        raise ModelLoadError(
            f"{heads_folder}: eagle_aux_hidden_state_layer_ids={list(layers)}: the model has {config.num_layers} layers"
        )
    return EagleProposer(draft, embeddings.embed_VE, layers, max_model_len=max_model_len)
