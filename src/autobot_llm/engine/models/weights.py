"""Read a model folder's safetensors into the tensors a decoder uses. Knows files and shapes; knows no arithmetic.

Every header is checked against the configuration before the first tensor is read, so a truncated or foreign folder
fails at once. Projections that read the same input are stored as one matrix: q, k, v and gate, up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from autobot_llm.engine.models.config import ModelConfig
from autobot_llm.errors import ModelLoadError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


# E hidden size, H query heads, K key/value heads, D head size, F feed-forward size, V vocabulary
@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Matrices are [out, in]; the rows of `qkv_weight` are q [HD], k [KD], v [KD], in this order,
    and those of `gate_up_weight` gate [F], up [F]."""

    input_norm_E: torch.Tensor
    qkv_weight: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm_D: torch.Tensor | None
    k_norm_D: torch.Tensor | None
    o_weight: torch.Tensor
    o_bias: torch.Tensor | None
    post_norm_E: torch.Tensor
    gate_up_weight: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down_weight: torch.Tensor
    down_bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """A whole model. With tied embeddings `lm_head_VE` is the very tensor `embed_VE`."""

    embed_VE: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm_E: torch.Tensor
    lm_head_VE: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_VE.dtype

    @property
    def device(self) -> torch.device:
        return self.embed_VE.device

    @property
    def num_bytes(self) -> int:
        """Bytes of memory held, shared tensors counted once."""
        tensors = {id(t): t for t in self._tensors()}
        return sum(t.numel() * t.element_size() for t in tensors.values())

    def _tensors(self) -> Iterator[torch.Tensor]:
        yield from (self.embed_VE, self.norm_E, self.lm_head_VE)
        for layer in self.layers:
            for name in LayerWeights.__slots__:
                tensor = getattr(layer, name)
                if tensor is not None:
                    yield tensor


def load_weights(
    folder: Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    on_progress: Callable[[int, int], None] | None = None,
) -> DecoderWeights:
    """Load the weights of `folder`, one stored tensor at a time, so that peak memory is the model and one tensor.

    `dtype` None keeps the checkpoint's (where a checkpoint mixes dtypes, the narrowest one that holds them all).
    `on_progress(num_loaded, num_total)` is called after each stored tensor. Raises ModelLoadError, naming file and
    tensor, for whatever is missing, truncated, of the wrong shape or dtype, or not part of such a model.
    Format: safetensors, single or sharded, with the tensor names of Hugging Face transformers.
    """
    shapes = expected_shapes(config)
    with ExitStack() as stack:
        checkpoint = _Checkpoint(Path(folder), stack)
        stored_dtype = checkpoint.check(shapes, config)
        reader = _Reader(checkpoint, dtype or stored_dtype, torch.device(device), len(shapes), on_progress)
        embed_VE = reader.read("model.embed_tokens.weight")
        layers = tuple(_read_layer(reader, config, f"model.layers.{i}") for i in range(config.num_layers))
        norm_E = reader.read("model.norm.weight")
        lm_head_VE = embed_VE if config.tie_word_embeddings else reader.read("lm_head.weight")
    return DecoderWeights(embed_VE=embed_VE, layers=layers, norm_E=norm_E, lm_head_VE=lm_head_VE)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors a checkpoint of this configuration must hold, by name."""
    E, F, D = config.hidden_size, config.intermediate_size, config.head_size
    q_size, kv_size = config.num_heads * D, config.num_kv_heads * D
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, E),
        "model.norm.weight": (E,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, E)
    projections = (
        ("self_attn.q_proj", q_size, E, config.qkv_bias),
        ("self_attn.k_proj", kv_size, E, config.qkv_bias),
        ("self_attn.v_proj", kv_size, E, config.qkv_bias),
        ("self_attn.o_proj", E, q_size, config.o_bias),
        ("mlp.gate_proj", F, E, config.mlp_bias),
        ("mlp.up_proj", F, E, config.mlp_bias),
        ("mlp.down_proj", E, F, config.mlp_bias),
    )
    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (E,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (E,)
        if config.qk_norm:
            shapes[f"{layer}.self_attn.q_norm.weight"] = (D,)
            shapes[f"{layer}.self_attn.k_norm.weight"] = (D,)
        for name, num_out, num_in, has_bias in projections:
            shapes[f"{layer}.{name}.weight"] = (num_out, num_in)
            if has_bias:
                shapes[f"{layer}.{name}.bias"] = (num_out,)
    return shapes


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


class _Checkpoint:
    """The open safetensors files of a folder, and which of them holds which tensor."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        index = folder / INDEX_FILE
        if (folder / SINGLE_FILE).exists():
            self._open(SINGLE_FILE, stack)
            self._file_of = dict.fromkeys(self._files[SINGLE_FILE].keys(), SINGLE_FILE)
        elif index.exists():
            self._open_shards(index, stack)
        else:
            raise ModelLoadError(f"{folder}: {_why_no_safetensors(folder)}")

    def _open_shards(self, index: Path, stack: ExitStack) -> None:
        try:
            self._file_of = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
        except (OSError, msgspec.DecodeError) as exc:
            raise ModelLoadError(f"{index}: {exc}") from exc
        for file_name in sorted(set(self._file_of.values())):
            if Path(file_name).name != file_name:
                raise ModelLoadError(f"{index}: weight_map: {file_name!r} is not the name of a file in the folder")
            self._open(file_name, stack)
        for name, file_name in self._file_of.items():
            if name not in self._files[file_name].keys():  # noqa: SIM118 - a safetensors handle is no mapping
                raise ModelLoadError(f"{self.folder / file_name}: tensor {name} is missing; {INDEX_FILE} lists it here")

    def _open(self, file_name: str, stack: ExitStack) -> None:
        path = self.folder / file_name
        try:
            self._files[file_name] = stack.enter_context(safe_open(str(path), framework="pt", device="cpu"))
        except FileNotFoundError as exc:
            raise ModelLoadError(f"{path}: no such file; {INDEX_FILE} lists it") from exc
        except (SafetensorError, OSError) as exc:
            raise ModelLoadError(f"{path}: truncated, or not a safetensors file: {exc}") from exc

    def check(self, shapes: dict[str, tuple[int, ...]], config: ModelConfig) -> torch.dtype:
        """Compare every header with `shapes`; return the narrowest dtype that holds all tensors exactly."""
        self._refuse_foreign_tensors(shapes, config)
        common: torch.dtype | None = None
        for name, shape in shapes.items():
            if name not in self._file_of:
                raise ModelLoadError(f"{self.folder}: tensor {name} is missing from the safetensors files")
            path = self.folder / self._file_of[name]
            header = self._files[self._file_of[name]].get_slice(name)
            found = tuple(header.get_shape())
            if found != shape:
                raise ModelLoadError(f"{path}: tensor {name} has shape {found}; config.json asks for {shape}")
            dtype = STORED_DTYPES.get(header.get_dtype())
            if dtype is None:
                accepted = ", ".join(STORED_DTYPES)
                raise ModelLoadError(
                    f"{path}: tensor {name} has dtype {header.get_dtype()}; expected one of {accepted}"
                )
            common = dtype if common is None else torch.promote_types(common, dtype)
        assert common is not None, "a model has at least its embedding"
        return common

    def _refuse_foreign_tensors(self, shapes: dict[str, tuple[int, ...]], config: ModelConfig) -> None:
        """A tensor that the decoder would not use means another model: computing without it would be wrong."""
        # old exports store the rotary frequencies, and some store the tied head a second time
        foreign = [
            name
            for name in self._file_of
            if name not in shapes
            and not name.endswith(".rotary_emb.inv_freq")
            and not (name == "lm_head.weight" and config.tie_word_embeddings)
        ]
        if foreign:
            more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
            raise ModelLoadError(
                f"{self.folder}: a {config.model_type} model of this config.json has no tensor "
                f"{', '.join(sorted(foreign)[:3])}{more}"
            )

    def get(self, name: str) -> torch.Tensor:
        file_name = self._file_of[name]
        try:
            tensor: torch.Tensor = self._files[file_name].get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as exc:
            raise ModelLoadError(f"{self.folder / file_name}: tensor {name} cannot be read: {exc}") from exc
        return tensor


def _why_no_safetensors(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    if any(folder.glob("pytorch_model*.bin")):
        return (
            "only pytorch_model.bin, which can run code when it is loaded; convert it: in transformers, "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
        )
    return f"neither {SINGLE_FILE} nor {INDEX_FILE}"


class _Reader:
    """Copies stored tensors into memory of their own: a mapped file that changes later would change the model."""

    def __init__(
        self,
        checkpoint: _Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        num_total: int,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._num_total = num_total
        self._num_loaded = 0
        self._on_progress = on_progress

    def read(self, *names: str) -> torch.Tensor:
        """The named tensors, one below the other."""
        first = self._checkpoint.get(names[0])
        if len(names) == 1:
            fused = torch.empty(first.shape, dtype=self._dtype, device=self._device)
            self._copy(fused, first)
            return fused
        parts = [self._checkpoint.get(name) for name in names]  # mapped, hence no memory yet
        num_rows = sum(part.shape[0] for part in parts)
        fused = torch.empty((num_rows, *first.shape[1:]), dtype=self._dtype, device=self._device)
        row = 0
        for part in parts:
            self._copy(fused[row : row + part.shape[0]], part)
            row += part.shape[0]
        return fused

    def _copy(self, target: torch.Tensor, stored: torch.Tensor) -> None:
        target.copy_(stored)
        self._num_loaded += 1
        if self._on_progress is not None:
            self._on_progress(self._num_loaded, self._num_total)


def _read_layer(reader: _Reader, config: ModelConfig, layer: str) -> LayerWeights:
    qkv = tuple(f"{layer}.self_attn.{name}_proj" for name in "qkv")
    gate_up = (f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj")

    def weight(*modules: str) -> torch.Tensor:
        return reader.read(*(f"{module}.weight" for module in modules))

    def bias(*modules: str) -> torch.Tensor:
        return reader.read(*(f"{module}.bias" for module in modules))

    return LayerWeights(
        input_norm_E=weight(f"{layer}.input_layernorm"),
        qkv_weight=weight(*qkv),
        qkv_bias=bias(*qkv) if config.qkv_bias else None,
        q_norm_D=weight(f"{layer}.self_attn.q_norm") if config.qk_norm else None,
        k_norm_D=weight(f"{layer}.self_attn.k_norm") if config.qk_norm else None,
        o_weight=weight(f"{layer}.self_attn.o_proj"),
        o_bias=bias(f"{layer}.self_attn.o_proj") if config.o_bias else None,
        post_norm_E=weight(f"{layer}.post_attention_layernorm"),
        gate_up_weight=weight(*gate_up),
        gate_up_bias=bias(*gate_up) if config.mlp_bias else None,
        down_weight=weight(f"{layer}.mlp.down_proj"),
        down_bias=bias(f"{layer}.mlp.down_proj") if config.mlp_bias else None,
    )
