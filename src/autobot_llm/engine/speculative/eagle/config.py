"""The sizes of an EAGLE-3 draft and what it reads from its target. Knows config.json; knows no tensor.

Format: the configuration of a Llama model with one layer, and beside it draft_vocab_size and, where they are not the
usual ones, target_hidden_size and eagle_aux_hidden_state_layer_ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from autobot_llm.engine.models.config import ModelConfig, load_config
from autobot_llm.errors import ModelLoadError

NUM_FEATURES = 3


@dataclass(frozen=True, slots=True)
class EagleConfig:
    """`layer` holds the sizes of the draft's one layer, its rotary embeddings and the target's vocabulary.

    `feature_layers` are three numbers of the target's layers: i is the stream that layer i reads, which is what layer
    i - 1 returned; the number of layers itself is the stream behind the last one, before the final norm. None: the
    checkpoint does not say, and `default_feature_layers` is meant. With `shares_lm_head` the draft projects with the
    rows of the target's own head.
    """

    layer: ModelConfig
    draft_vocab_size: int
    target_hidden_size: int
    feature_layers: tuple[int, int, int] | None
    norm_before_residual: bool = False
    shares_lm_head: bool = False


def default_feature_layers(num_layers: int) -> tuple[int, int, int]:
    """An early, a middle and a late layer, as published drafts were trained with. Raises ModelLoadError below 6."""
    if num_layers < 6:
        raise ModelLoadError(f"a target of {num_layers} layers: EAGLE-3's usual features need 6 or more; name three")
    return (2, num_layers // 2, num_layers - 3)


class _File(msgspec.Struct):
    draft_vocab_size: int | None = None
    target_hidden_size: int | None = None
    eagle_aux_hidden_state_layer_ids: tuple[int, int, int] | None = None
    norm_before_residual: bool = False
    eagle_shares_lm_head: bool = False


def load_eagle_config(folder: Path) -> EagleConfig:
    """Read config.json. Raises ModelLoadError, naming file and field."""
    layer = load_config(folder)
    path = folder / "config.json"
    try:
        raw = msgspec.json.decode(path.read_bytes(), type=_File)
    except msgspec.DecodeError as exc:
        raise ModelLoadError(f"{path}: {exc}") from exc
    if layer.num_layers != 1:
        raise ModelLoadError(f"{path}: num_hidden_layers={layer.num_layers}: an EAGLE-3 draft has 1")
    draft_vocab_size = raw.draft_vocab_size or layer.vocab_size
    if not 1 <= draft_vocab_size <= layer.vocab_size:
        raise ModelLoadError(f"{path}: draft_vocab_size={draft_vocab_size}: expected 1 to {layer.vocab_size}")
    return EagleConfig(
        layer=layer,
        draft_vocab_size=draft_vocab_size,
        target_hidden_size=raw.target_hidden_size or layer.hidden_size,
        feature_layers=raw.eagle_aux_hidden_state_layer_ids,
        norm_before_residual=raw.norm_before_residual,
        shares_lm_head=raw.eagle_shares_lm_head,
    )
