"""Widen a decoder to a larger shape without changing what it computes. Knows weights and arithmetic; knows no files.

The widened model costs what any model of the larger shape costs and answers as the small one does, so acceptance rates
and prefix hits measured on it are real. What the small model has no use for is zero where somebody would see it, and
random everywhere else:

- The residual stream keeps its values, and its new dimensions are zero for every token: what writes to the stream
  (embedding, o, down) has zeros there. What reads it (q, k, v, gate, up, an untied head) is random in the new columns,
  which meet zeros.
- New heads, neurons and layers are random, and zeros in o and down keep them out of the stream. New layers come last,
  so layer i of the small model is layer i of the large one.
- A head of 64 lies in a head of 128 at the same rotary frequencies: theta^(-2i/64) is theta^(-2(2i)/128), so dimension
  i of each half becomes dimension 2i of that half. In the dimensions between, the queries are zero.
- Query heads stay with their key/value head: a group of 3 lies in a group of 4. A group that is too large for that is
  shared out among several key/value heads, which are copies.
- RMSNorm averages over r^2 = (new / old width) times as many entries: its output grows by r, and its epsilon shrinks by
  r^2. Attention divides by the root of a larger head size. `Factors` makes up for both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from autobot_llm.engine.models.config import ModelConfig

RANDOM_STD = 0.02  # of weights that nobody sees: what models of this size start their training with
MODEL_TYPES = ("llama", "mistral")
EAGLE_LAYERS = ("midlayer.", "layers.0.")  # the one layer's name: as published, and as other exports have it


# E hidden size, H query heads, K key/value heads, G query heads of a key/value head, D head size, F feed-forward size,
# V vocabulary. A 2 marks the widened model's: E2, D2 ...
@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a decoder, its vocabulary aside."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 1 or more")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_size % 2:
            raise ValueError(f"head_size={self.head_size} is odd; rotary embeddings pair the two halves of a head")


SHAPES = {
    "mistral-7b": Shape(4096, 32, 32, 8, 128, 14336),
    # 67.6M parameters with 8,192 tokens and tied embeddings. Two layers as in the embedded draft, and as in the 68M
    # drafts that are published: at this size a draft's time is mostly its number of layers.
    "draft-68m": Shape(1536, 2, 24, 8, 64, 4608),
    "small": Shape(512, 10, 8, 4, 128, 1408),  # every kind of widening at once, cheap enough for a CPU
}


def resized(config: ModelConfig, shape: Shape) -> ModelConfig:
    """The configuration with these sizes, all layers alike."""
    return replace(
        config,
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_size=shape.head_size,
        intermediate_size=shape.intermediate_size,
        sliding_windows=config.sliding_windows[:1] * shape.num_layers,
    )


def widened_config(config: ModelConfig, target: Shape) -> ModelConfig:
    """The configuration of the widened model: other sizes, and an epsilon for them. Raises what `shape_of` raises."""
    ratio = shape_of(config).hidden_size / target.hidden_size
    return replace(resized(config, target), rms_norm_eps=config.rms_norm_eps * ratio)


def shape_of(config: ModelConfig) -> Shape:
    """The shape of a loaded configuration. Raises ValueError for a family with parts that are not widened here."""
    if config.model_type not in MODEL_TYPES:
        raise ValueError(f"model_type={config.model_type!r} cannot be widened: expected {' or '.join(MODEL_TYPES)}")
    return Shape(
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_size=config.head_size,
        intermediate_size=config.intermediate_size,
    )


@dataclass(frozen=True, slots=True)
class Factors:
    """What weights are multiplied by, so that norms over r^2 as many entries and larger heads change nothing.

    r is seldom a power of two (3.27 from 384 to 4096), so somewhere bfloat16 rounds. The norm before attention takes
    the nearest power of two, which is exact, and leaves a factor f near 1: k computes k / f, and q makes up for it
    together with the root of the head sizes, so k's weights are exact and q's are rounded once; v takes f by itself.
    The other norms take 1 / r and are rounded, which leaves gate and up exact, and a tied head.

    Measured on 2,574 positions of real text, 384 to 4096 wide, root mean square change of the logits by the rounding of
    weights: 0.0104, and 0.0115 to 0.0119 with 1 / r in every norm and the root in q, k or both. Giving gate and up the
    f of an exact norm is as good (0.0093 and 0.0097 at 512 wide, 0.0095 and 0.0094 from 192 to 1536), and rounds
    more weights. The arithmetic of bfloat16 changes the small model's own logits by 0.041. Where r is a power of two
    and heads keep their size, nothing is rounded.
    """

    input_norm: float
    q: float
    v: float
    q_bias: float
    k_bias: float
    norm: float

    @classmethod
    def between(cls, source: Shape, target: Shape) -> Factors:
        r = math.sqrt(target.hidden_size / source.hidden_size)
        power = 2.0 ** round(math.log2(r))
        f = power / r
        root = math.sqrt(target.head_size / source.head_size)
        return cls(input_norm=1 / power, q=root * f * f, v=f, q_bias=root * f, k_bias=1 / f, norm=1 / r)


class Widening:
    """From one shape to another: where each row and column goes, and what fills the rest.

    Tensors are made on `device` in `dtype`. The random ones follow from `seed`, the kind of device and the order of
    calls. Raises ValueError, naming the size, for a target that cannot hold the source.
    """

    def __init__(
        self, source: Shape, target: Shape, *, dtype: torch.dtype, device: torch.device | str, seed: int = 0
    ) -> None:
        self._num_copies = _copies_of_kv_heads(source, target)
        self._source = source
        self._target = target
        self._factors = Factors.between(source, target)
        self._dtype = dtype
        self._device = torch.device(device)
        self._random = torch.Generator(self._device).manual_seed(seed)
        query_heads = self._query_heads()
        self._query_rows = self._head_rows(query_heads)
        self._kv_rows = self._head_rows(torch.arange(source.num_kv_heads * self._num_copies))
        every_dimension = torch.arange(target.head_size)
        self._rows_of_query_heads = self._at(query_heads[:, None] * target.head_size + every_dimension)

    def model(
        self, tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The widened model's tensors, made one by one in the order of `shapes`, which are its names and their shapes.

        `tensors` are the source's. Names are those of Hugging Face transformers.
        """
        for name, shape in shapes.items():
            made = self._widened(name, tensors[name]) if name in tensors else self._silent(name, shape)
            assert made.shape == shape, f"{name}: {tuple(made.shape)} instead of {shape}"
            yield name, made

    def layer(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of one layer, by their names within it: `self_attn.q_proj.weight`, `input_layernorm.weight` ...

        Its q, k and v may read several normed streams side by side, as EAGLE's read two: [rows, 2 E].
        """
        return {name: self._layer_tensor(name, tensor) for name, tensor in tensors.items()}

    def medusa_heads(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Medusa heads for the widened model: `{head}.0.linear.weight`, `.bias` and `{head}.1.weight`, as published.

        They read what the final norm returns: the small model's, and zeros, which the residual blocks keep.
        """
        size = self._target.hidden_size
        widened = {}
        for name, tensor in tensors.items():
            if name.endswith(".linear.weight"):
                widened[name] = self._writer(tensor, self._stream(1), size)
            elif name.endswith(".linear.bias"):
                widened[name] = self._vector(tensor, self._stream(1), size)
            elif name.endswith(".weight"):
                widened[name] = self._reader(tensor)
            else:
                raise ValueError(
                    f"{name}: expected a tensor of Medusa heads: *.linear.weight, *.linear.bias or *.weight"
                )
        return widened

    def eagle(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """An EAGLE-3 draft for the widened model, with the names of its published checkpoints.

        The source of this widening is then the shape of the draft's one layer. What the draft reads from the model are
        the streams behind some layers, which keep their values and their numbers.
        """
        widened = {}
        for name, tensor in tensors.items():
            prefix = next((prefix for prefix in EAGLE_LAYERS if name.startswith(prefix)), None)
            if prefix is not None:
                widened[name] = self._layer_tensor(name.removeprefix(prefix), tensor)
            elif name == "fc.weight":
                num_streams = self._num_streams(tensor)
                columns = self._stream(num_streams)
                widened[name] = self._writer(tensor, columns, num_streams * self._target.hidden_size)
            elif name in ("d2t", "t2d"):
                widened[name] = tensor.to(self._device)
            else:
                widened[name] = self._widened(name if name == "lm_head.weight" else f"model.{name}", tensor)
        return widened

    # --- by name ------------------------------------------------------------------------------------------------------

    def _widened(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        match name.split("."):
            case ["model", "embed_tokens", "weight"]:
                made = self._zeros(tensor.shape[0], self._target.hidden_size)
                made[:, self._stream(1)] = self._cast(tensor)
                return made
            case ["model", "layers", _, *names]:
                return self._layer_tensor(".".join(names), tensor)
            case ["model", "norm", "weight"]:
                return self._norm(tensor, self._factors.norm)
            case ["lm_head", "weight"]:
                return self._reader(tensor)
        raise ValueError(f"{name}: no tensor of this name can be widened")

    def _layer_tensor(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        factors, target = self._factors, self._target
        num_query_rows, num_kv_rows = target.num_heads * target.head_size, target.num_kv_heads * target.head_size
        neurons = torch.arange(self._source.intermediate_size, device=self._device)
        num_neurons = target.intermediate_size
        match name:
            case "input_layernorm.weight" | "hidden_norm.weight":  # the latter is EAGLE's, for its second stream
                return self._norm(tensor, factors.input_norm)
            case "post_attention_layernorm.weight":
                return self._norm(tensor, factors.norm)
            case "self_attn.q_proj.weight":
                return self._reader(tensor, self._query_rows, num_query_rows, factors.q, self._rows_of_query_heads)
            case "self_attn.k_proj.weight":
                return self._reader(self._copied(tensor), self._kv_rows, num_kv_rows)
            case "self_attn.v_proj.weight":
                return self._reader(self._copied(tensor), self._kv_rows, num_kv_rows, factors.v)
            case "self_attn.q_proj.bias":
                return self._vector(tensor, self._query_rows, num_query_rows, factors.q_bias)
            case "self_attn.k_proj.bias":
                return self._vector(self._copied(tensor), self._kv_rows, num_kv_rows, factors.k_bias)
            case "self_attn.v_proj.bias":
                return self._vector(self._copied(tensor), self._kv_rows, num_kv_rows)
            case "self_attn.o_proj.weight":
                return self._writer(tensor, self._query_rows, num_query_rows)
            case "mlp.gate_proj.weight" | "mlp.up_proj.weight":
                return self._reader(tensor, neurons, num_neurons)
            case "mlp.gate_proj.bias" | "mlp.up_proj.bias":
                return self._vector(tensor, neurons, num_neurons)
            case "mlp.down_proj.weight":
                return self._writer(tensor, neurons, num_neurons)
            case "self_attn.o_proj.bias" | "mlp.down_proj.bias":
                return self._vector(tensor, self._stream(1), target.hidden_size)
        raise ValueError(f"{name}: no tensor of this name in a layer can be widened")

    def _silent(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor of a new layer: it computes, and adds nothing to the stream."""
        if "norm" in name:
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        if name.endswith((".o_proj.weight", ".down_proj.weight", ".bias")):
            return self._zeros(*shape)
        return self._noise(*shape)

    # --- by what a tensor does ----------------------------------------------------------------------------------------

    def _reader(
        self,
        tensor: torch.Tensor,
        rows: torch.Tensor | None = None,
        num_rows: int = 0,
        factor: float = 1.0,
        zero_rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A matrix that reads the stream: its rows go to `rows` of `num_rows`, all others are random.

        The rest of `zero_rows` is zero, whatever the stream holds. Without `rows`, all stay where they are.
        """
        if rows is None:
            num_rows = tensor.shape[0]
            rows = torch.arange(num_rows, device=self._device)
        num_streams = self._num_streams(tensor)
        made = self._noise(num_rows, num_streams * self._target.hidden_size)
        columns = self._stream(num_streams)
        if zero_rows is not None:
            made[zero_rows[:, None], columns] = 0.0
        made[rows[:, None], columns] = self._cast(tensor, factor)
        return made

    def _writer(self, tensor: torch.Tensor, columns: torch.Tensor, num_columns: int) -> torch.Tensor:
        """A matrix that writes to the stream: its columns go to `columns` of `num_columns`, and all else is zero."""
        made = self._zeros(self._target.hidden_size, num_columns)
        made[self._stream(1)[:, None], columns] = self._cast(tensor)
        return made

    def _norm(self, tensor: torch.Tensor, factor: float) -> torch.Tensor:
        made = torch.ones(self._target.hidden_size, dtype=self._dtype, device=self._device)
        made[self._stream(1)] = self._cast(tensor, factor)
        return made

    def _vector(self, tensor: torch.Tensor, places: torch.Tensor, size: int, factor: float = 1.0) -> torch.Tensor:
        made = self._zeros(size)
        made[places] = self._cast(tensor, factor)
        return made

    def _cast(self, tensor: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        return (tensor.to(self._device, torch.float64) * factor).to(self._dtype)  # rounded once

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=self._dtype, device=self._device)

    def _noise(self, *shape: int) -> torch.Tensor:
        made = torch.empty(shape, dtype=self._dtype, device=self._device)
        return made.normal_(0.0, RANDOM_STD, generator=self._random)

    # --- where things go ----------------------------------------------------------------------------------------------

    def _num_streams(self, tensor: torch.Tensor) -> int:
        return tensor.shape[1] // self._source.hidden_size

    def _stream(self, num_streams: int) -> torch.Tensor:
        """The old dimensions of so many streams side by side."""
        starts = torch.arange(num_streams) * self._target.hidden_size
        return self._at(starts[:, None] + torch.arange(self._source.hidden_size))

    def _query_heads(self) -> torch.Tensor:
        """The new place of each query head: in the group of its key/value head, or of one of that head's copies."""
        old_group = self._source.num_heads // self._source.num_kv_heads
        group = self._target.num_heads // self._target.num_kv_heads
        heads = torch.arange(self._source.num_heads)
        kv_head, place = heads // old_group, heads % old_group
        return (kv_head * self._num_copies + place // group) * group + place % group

    def _head_rows(self, heads: torch.Tensor) -> torch.Tensor:
        """The new rows of these heads, one for each old dimension."""
        old_half, half = self._source.head_size // 2, self._target.head_size // 2
        within_half = torch.arange(old_half) * (half // old_half)
        dimensions = torch.cat((within_half, half + within_half))
        return self._at(heads[:, None] * self._target.head_size + dimensions)

    def _copied(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of key/value heads, each head as often as it is copied."""
        heads = tensor.view(self._source.num_kv_heads, -1)
        return heads.repeat_interleave(self._num_copies, dim=0).view(-1, *tensor.shape[1:])

    def _at(self, places: torch.Tensor) -> torch.Tensor:
        return places.flatten().to(self._device)


def _copies_of_kv_heads(source: Shape, target: Shape) -> int:
    """How many key/value heads of the target each one of the source needs. Raises ValueError where it does not fit."""
    for name in ("hidden_size", "num_layers", "intermediate_size"):
        old, new = getattr(source, name), getattr(target, name)
        if new < old:
            raise ValueError(f"{name}={new} is less than the {old} of the model to be widened")
    if target.head_size % source.head_size:
        raise ValueError(
            f"head_size={target.head_size}: expected a multiple of {source.head_size}, the head size of the model to "
            "be widened: only then are its rotary frequencies among the new ones"
        )
    old_group, group = source.num_heads // source.num_kv_heads, target.num_heads // target.num_kv_heads
    num_copies = math.ceil(old_group / group)
    if source.num_kv_heads * num_copies > target.num_kv_heads:
        raise ValueError(
            f"num_heads={target.num_heads}, num_kv_heads={target.num_kv_heads}: {source.num_kv_heads} groups of "
            f"{old_group} query heads need {source.num_kv_heads * num_copies} groups of {group}"
        )
    return num_copies
