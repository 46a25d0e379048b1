"""Train a draft model: a small Llama that learns the target's distribution of the next token. Knows the loss and the
model folder; knows nothing of where texts come from.

The loss is the cross entropy against the target's whole distribution at every position of its answers.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from autobot_llm.engine.models.config import ModelConfig, load_config
from autobot_llm.engine.models.config_file import llama_config
from autobot_llm.engine.models.weights import DecoderWeights, LayerWeights, load_weights
from autobot_llm.engine.models.whole_file import write_json, write_tensors
from autobot_llm.errors import ConfigurationError
from autobot_llm.training.accuracy import NUM_RANKS, Accuracies, RankCounts
from autobot_llm.training.answers import Answers, Batch
from autobot_llm.training.forward import Model
from autobot_llm.training.loop import Group

INITIAL_STD = 0.02
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
                   "generation_config.json")  # fmt: skip


# B sequences, S positions, R rows that count, V vocabulary
@dataclass(frozen=True, slots=True)
class DraftOptions:
    """A new model of `num_layers` layers and `hidden_size`, or one to go on from: `init`, a folder whose tokenizer is
    the target's."""

    num_layers: int = 2
    hidden_size: int | None = None
    init: Path | None = None


class DraftTask:
    name = "draft"

    def __init__(self, model: Model, options: DraftOptions, folder: Path) -> None:
        """`folder` is the target's: its tokenizer's files go with the draft."""
        self.model = model
        self._folder = folder
        device = model.weights.device
        if options.init is not None:
            config = load_config(options.init)
            if config.vocab_size != model.config.vocab_size or not _same_tokenizer(options.init, folder):
                raise ConfigurationError(f"{options.init}: another tokenizer than that of {folder}")
            if config.model_type != "llama":
                raise ConfigurationError(f"{options.init}: model_type={config.model_type!r}: expected 'llama'")
            weights = load_weights(options.init, config, dtype=torch.float32, device="cpu")
        else:
            config = draft_config(model.config, options)
            weights = _random_weights(config, device)
        self.draft = Model(config, as_parameters(weights, device), f"draft of {model.name}")

    def groups(self) -> list[Group]:
        return [Group(list(parameters_of(self.draft.weights).values()))]

    def learn(self, batch: Batch) -> torch.Tensor:
        rows_R = batch.drafts_from(1)
        with torch.no_grad():
            wanted_RV = self.model.logits_at(batch.ids_BS, rows_R).float().softmax(dim=-1)
        with self._autocast():
            logits_RV = self.draft.logits_at(batch.ids_BS, rows_R)
        loss = -(wanted_RV * logits_RV.float().log_softmax(dim=-1)).sum() / max(1, wanted_RV.shape[0])
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, answers: Answers, batch_size: int) -> Accuracies:
        counts = RankCounts()
        for category in sorted(set(answers.categories)):
            members = answers.rows([i for i, name in enumerate(answers.categories) if name == category])
            for batch in members.batches(batch_size, random.Random(0)):
                rows_R = batch.drafts_from(1)
                right_R = self.model.logits_at(batch.ids_BS, rows_R).argmax(dim=-1)
                with self._autocast():
                    logits_RV = self.draft.logits_at(batch.ids_BS, rows_R)
                counts.add(category, 0, logits_RV.topk(NUM_RANKS, dim=-1).indices, right_R)
        return counts.accuracies()

    def state(self) -> dict[str, torch.Tensor]:
        return {**parameters_of(self.draft.weights)}

    @torch.no_grad()
    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def export(self, folder: Path, accuracies: Accuracies) -> None:
        """A model folder as Hugging Face writes it, in bfloat16."""
        config = self.draft.config
        tensors = {name: tensor.to(torch.bfloat16) for name, tensor in published(config, self.draft.weights)}
        write_tensors(folder / "model.safetensors", tensors)
        for name in TOKENIZER_FILES:
            if (self._folder / name).exists():
                shutil.copyfile(self._folder / name, folder / name)
        write_json(folder / "config.json", llama_config(config, torch.bfloat16))

    def _autocast(self) -> torch.autocast:
        """bfloat16 on a GPU; master weights stay float32."""
        device = self.model.weights.device.type
        return torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")


def draft_config(target: ModelConfig, options: DraftOptions) -> ModelConfig:
    """A Llama with the target's vocabulary, context and head size, half as wide unless the options say."""
    head_size = target.head_size
    num_heads = max(1, (options.hidden_size or target.hidden_size // 2) // head_size)
    if options.hidden_size is not None and options.hidden_size % head_size:
        raise ConfigurationError(
            f"hidden_size={options.hidden_size}: expected a multiple of {head_size}, the head size"
        )
    hidden_size = num_heads * head_size
    num_kv_heads = next(n for n in range(max(1, num_heads // 3), 0, -1) if num_heads % n == 0)
    return replace(
        target,
        model_type="llama",
        hidden_size=hidden_size,
        intermediate_size=-(-hidden_size * 8 // 3 // 64) * 64,
        num_layers=options.num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        tie_word_embeddings=True,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding_windows=(0,) * options.num_layers,
    )


def _same_tokenizer(one: Path, other: Path) -> bool:
    try:
        vocabularies = [
            json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
            for folder in (one, other)
        ]
    except (OSError, ValueError, KeyError) as exc:
        raise ConfigurationError(f"{one}: its tokenizer cannot be compared: {exc}") from exc
    return bool(vocabularies[0] == vocabularies[1])


def _random_weights(config: ModelConfig, device: torch.device) -> DecoderWeights:
    E, F, D = config.hidden_size, config.intermediate_size, config.head_size

    def random_(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, device=device) * INITIAL_STD * scale

    def ones() -> torch.Tensor:
        return torch.ones(E, device=device)

    depth = (2 * config.num_layers) ** -0.5  # what writes to the stream starts smaller the more of it there is
    embed_VE = random_(config.vocab_size, E)
    layers = tuple(
        LayerWeights(
            input_norm_E=ones(), qkv_weight=random_((config.num_heads + 2 * config.num_kv_heads) * D, E), qkv_bias=None,
            q_norm_D=None, k_norm_D=None, o_weight=random_(E, config.num_heads * D, depth), o_bias=None,
            post_norm_E=ones(), gate_up_weight=random_(2 * F, E), gate_up_bias=None, down_weight=random_(E, F, depth),
            down_bias=None,
        )
        for _ in range(config.num_layers)
    )  # fmt: skip
    return DecoderWeights(embed_VE, layers, ones(), embed_VE)


def as_parameters(weights: DecoderWeights, device: torch.device) -> DecoderWeights:
    """Copies of the weights in float32, to be learned; tied ones stay tied."""

    def parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
        return torch.nn.Parameter(tensor.detach().to(device, torch.float32, copy=True))

    embed_VE = parameter(weights.embed_VE)
    layers = []
    for layer in weights.layers:
        made: dict[str, Any] = {field.name: getattr(layer, field.name) for field in fields(layer)}
        layers.append(LayerWeights(**(made | {name: parameter(t) for name, t in made.items() if t is not None})))
    is_tied = weights.lm_head_VE is weights.embed_VE
    lm_head_VE = embed_VE if is_tied else parameter(weights.lm_head_VE)
    return DecoderWeights(embed_VE, tuple(layers), parameter(weights.norm_E), lm_head_VE)


def parameters_of(weights: DecoderWeights) -> dict[str, torch.nn.Parameter]:
    """What `as_parameters` made, each once, by names of our own."""
    named: dict[str, Any] = {"embed": weights.embed_VE, "norm": weights.norm_E}
    if weights.lm_head_VE is not weights.embed_VE:
        named["lm_head"] = weights.lm_head_VE
    for i, layer in enumerate(weights.layers):
        named |= {f"{i}.{field.name}": getattr(layer, field.name) for field in fields(layer)}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def published(config: ModelConfig, weights: DecoderWeights) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors as Hugging Face's Llama and its kin have them."""
    D, kv_rows = config.head_size, config.num_kv_heads * config.head_size
    yield "model.embed_tokens.weight", weights.embed_VE
    yield "model.norm.weight", weights.norm_E
    if not config.tie_word_embeddings:
        yield "lm_head.weight", weights.lm_head_VE
    for i, layer in enumerate(weights.layers):
        prefix = f"model.layers.{i}"
        yield f"{prefix}.input_layernorm.weight", layer.input_norm_E
        yield f"{prefix}.post_attention_layernorm.weight", layer.post_norm_E
        for name, norm in (("q_norm", layer.q_norm_D), ("k_norm", layer.k_norm_D)):
            if norm is not None:
                yield f"{prefix}.self_attn.{name}.weight", norm
        for kind, qkv, gate_up, o, down in (
            ("weight", layer.qkv_weight, layer.gate_up_weight, layer.o_weight, layer.down_weight),
            ("bias", layer.qkv_bias, layer.gate_up_bias, layer.o_bias, layer.down_bias),
        ):
            if qkv is not None:
                parts = torch.split(qkv, [config.num_heads * D, kv_rows, kv_rows])
                yield from ((f"{prefix}.self_attn.{n}_proj.{kind}", part) for n, part in zip("qkv", parts, strict=True))
            if gate_up is not None:
                parts = gate_up.chunk(2)
                names = ("gate", "up")
                yield from ((f"{prefix}.mlp.{n}_proj.{kind}", part) for n, part in zip(names, parts, strict=True))
            if o is not None:
                yield f"{prefix}.self_attn.o_proj.{kind}", o
            if down is not None:
                yield f"{prefix}.mlp.down_proj.{kind}", down
