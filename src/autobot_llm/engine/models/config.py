"""Read a Hugging Face model folder's settings into one frozen value. Knows JSON files; knows nothing of tensors.

Families: Llama, Mistral, Qwen2 and Qwen3 (dense). Whatever the decoder could not compute exactly is refused here,
by file and field, before a weight is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from autobot_llm.engine.quantization.detection import NotSupportedError, StoredQuantization, detect
from autobot_llm.errors import ModelLoadError

ModelType = Literal["llama", "mistral", "qwen2", "qwen3"]
CheckpointDtype = Literal["float32", "bfloat16", "float16"]

MODEL_TYPES: tuple[ModelType, ...] = ("llama", "mistral", "qwen2", "qwen3")
HIDDEN_ACTS = ("silu", "swish")  # two names of x * sigmoid(x)
ROPE_TYPES = ("default", "linear", "llama3")
DTYPES: tuple[CheckpointDtype, ...] = ("float32", "bfloat16", "float16")

DEFAULT_ROPE_THETA = 10_000.0
QWEN3_HEAD_SIZE = 128  # Qwen3's default, whatever hidden_size / num_attention_heads is


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    `linear` divides every frequency by `factor`. `llama3` (Llama 3.1) divides the low ones, keeps the high ones and
    blends between; the other three fields are its own, and 0 for `linear`.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """How the model's makers advise to sample from it. None: they do not say."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything that the shape and the arithmetic of a decoder depend on.

    `sliding_windows` has one entry for each layer: a query sees that many latest positions, its own included; 0 is all
    of them. `checkpoint_dtype` is what config.json says, if it does. `eos_token_ids` joins config.json's and
    generation_config.json's.
    """

    model_type: ModelType
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int, ...]
    bos_token_id: int | None
    eos_token_ids: frozenset[int]
    checkpoint_dtype: CheckpointDtype | None
    generation: GenerationDefaults
    quantization: StoredQuantization | None = None


_Count = Annotated[int, msgspec.Meta(ge=1)]
_TokenId = Annotated[int, msgspec.Meta(ge=0)]
_Positive = Annotated[float, msgspec.Meta(gt=0)]


class _RopeFile(msgspec.Struct):
    rope_type: str | None = None
    type: str | None = None
    """The name of `rope_type` before transformers 4.43."""
    rope_theta: _Positive | None = None
    factor: _Positive | None = None
    low_freq_factor: _Positive | None = None
    high_freq_factor: _Positive | None = None
    original_max_position_embeddings: _Count | None = None
    partial_rotary_factor: float | None = None


class _ConfigFile(msgspec.Struct):
    model_type: str
    vocab_size: _Count
    hidden_size: _Count
    intermediate_size: _Count
    num_hidden_layers: Annotated[int, msgspec.Meta(ge=1, le=100_000)]  # there is a value for each before any is read
    num_attention_heads: _Count
    num_key_value_heads: _Count | None = None
    head_dim: _Count | None = None
    hidden_act: str = "silu"
    rms_norm_eps: _Positive = 1e-6
    max_position_embeddings: _Count = 2048
    rope_theta: _Positive | None = None
    rope_scaling: _RopeFile | None = None
    rope_parameters: _RopeFile | None = None
    partial_rotary_factor: float | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: _Count | None = None
    use_sliding_window: bool = False
    max_window_layers: int | None = None
    layer_types: list[str] | None = None
    bos_token_id: _TokenId | None = None
    eos_token_id: _TokenId | list[_TokenId] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    quantization_config: Any = None


class _GenerationFile(msgspec.Struct):
    eos_token_id: _TokenId | list[_TokenId] | None = None
    do_sample: bool | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    repetition_penalty: _Positive | None = None


class _ModelTypeOnly(msgspec.Struct):
    model_type: str


def load_config(folder: Path) -> ModelConfig:
    """Read config.json and, where there is one, generation_config.json.

    Raises ModelLoadError, naming file and field, for a missing or garbled file, a value of the wrong type, an unknown
    family, and everything the decoder does not compute. Format: the configuration files of Hugging Face transformers,
    versions 4 and 5.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelLoadError(f"{folder}: no such folder; a model is a folder with config.json and *.safetensors files")
    path = folder / "config.json"
    # the family first, so that an unknown one is not reported as a missing field of a known one
    model_type = _choice(path, "model_type", _read(path, _ModelTypeOnly).model_type, MODEL_TYPES)
    raw = _read(path, _ConfigFile)
    _choice(path, "hidden_act", raw.hidden_act, HIDDEN_ACTS)
    num_kv_heads = raw.num_key_value_heads or raw.num_attention_heads
    if raw.num_attention_heads % num_kv_heads:
        raise ModelLoadError(
            f"{path}: num_attention_heads={raw.num_attention_heads} is not a multiple of "
            f"num_key_value_heads={num_kv_heads}"
        )
    rope_theta, rope_scaling = _rope(path, raw)
    generation, generation_eos = _generation(folder / "generation_config.json")
    dtype_name = raw.dtype or raw.torch_dtype
    return ModelConfig(
        model_type=model_type,
        vocab_size=raw.vocab_size,
        hidden_size=raw.hidden_size,
        intermediate_size=raw.intermediate_size,
        num_layers=raw.num_hidden_layers,
        num_heads=raw.num_attention_heads,
        num_kv_heads=num_kv_heads,
        head_size=_head_size(path, raw),
        rms_norm_eps=raw.rms_norm_eps,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_position_embeddings=raw.max_position_embeddings,
        tie_word_embeddings=raw.tie_word_embeddings,
        qkv_bias=model_type == "qwen2" or (model_type in ("llama", "qwen3") and raw.attention_bias),
        o_bias=model_type in ("llama", "qwen3") and raw.attention_bias,
        mlp_bias=model_type == "llama" and raw.mlp_bias,
        qk_norm=model_type == "qwen3",
        sliding_windows=_sliding_windows(path, raw),
        bos_token_id=raw.bos_token_id,
        eos_token_ids=_token_ids(raw.eos_token_id) | generation_eos,
        checkpoint_dtype=None if dtype_name is None else _choice(path, "dtype", dtype_name, DTYPES),
        generation=generation,
        quantization=_quantization(path, raw.quantization_config),
    )


_Value = TypeVar("_Value", bound=str)
_File = TypeVar("_File", bound=msgspec.Struct)


def _choice(path: Path, field: str, value: str, accepted: tuple[_Value, ...]) -> _Value:
    for known in accepted:
        if known == value:
            return known
    raise ModelLoadError(f"{path}: {field}={value!r}: expected {', '.join(accepted[:-1])} or {accepted[-1]}")


def _read(path: Path, kind: type[_File]) -> _File:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError as exc:
        raise ModelLoadError(f"{path}: no such file") from exc
    except (
        OSError,
        msgspec.DecodeError,
        RecursionError,
    ) as exc:  # a wrong type is reported with its path: `$.hidden_size`
        raise ModelLoadError(f"{path}: {exc}") from exc


def _quantization(path: Path, value: Any) -> StoredQuantization | None:
    if value is None:
        return None
    try:
        return detect(value)
    except NotSupportedError as exc:
        raise ModelLoadError(f"{path}: quantization_config: {exc}") from exc


def _head_size(path: Path, raw: _ConfigFile) -> int:
    if raw.head_dim is not None:
        head_size = raw.head_dim
    elif raw.model_type == "qwen3":
        head_size = QWEN3_HEAD_SIZE
    elif raw.hidden_size % raw.num_attention_heads:
        raise ModelLoadError(
            f"{path}: hidden_size={raw.hidden_size} is not a multiple of "
            f"num_attention_heads={raw.num_attention_heads}, and head_dim is not given"
        )
    else:
        head_size = raw.hidden_size // raw.num_attention_heads
    if head_size % 2:
        raise ModelLoadError(f"{path}: head size {head_size} is odd; rotary embeddings pair the two halves of a head")
    return head_size


def _rope(path: Path, raw: _ConfigFile) -> tuple[float, RopeScaling | None]:
    """Base frequency and scaling, from `rope_theta` and `rope_scaling` or from transformers 5's `rope_parameters`."""
    field = "rope_scaling" if raw.rope_scaling is not None else "rope_parameters"
    rope = raw.rope_scaling or raw.rope_parameters or _RopeFile()
    partial = rope.partial_rotary_factor or raw.partial_rotary_factor or 1.0
    if partial != 1.0:
        raise ModelLoadError(f"{path}: partial_rotary_factor={partial} is not supported; expected 1.0")
    theta = rope.rope_theta or raw.rope_theta or DEFAULT_ROPE_THETA
    kind = _choice(path, f"{field}.rope_type", rope.rope_type or rope.type or "default", ROPE_TYPES)
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", _required(path, f"{field}.factor", rope.factor))
    scaling = RopeScaling(
        "llama3",
        factor=_required(path, f"{field}.factor", rope.factor),
        low_freq_factor=_required(path, f"{field}.low_freq_factor", rope.low_freq_factor),
        high_freq_factor=_required(path, f"{field}.high_freq_factor", rope.high_freq_factor),
        original_max_position_embeddings=rope.original_max_position_embeddings or raw.max_position_embeddings,
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ModelLoadError(
            f"{path}: {field}.high_freq_factor={scaling.high_freq_factor} must be over "
            f"low_freq_factor={scaling.low_freq_factor}"
        )
    return theta, scaling


def _required(path: Path, field: str, value: float | None) -> float:
    if value is None:
        raise ModelLoadError(f"{path}: {field} is missing")
    return value


def _sliding_windows(path: Path, raw: _ConfigFile) -> tuple[int, ...]:
    """One window for each layer, by the family's own rule; 0 is full attention."""
    num_layers = raw.num_hidden_layers
    if raw.model_type == "llama":
        return (0,) * num_layers
    if raw.model_type == "mistral":
        return (raw.sliding_window or 0,) * num_layers
    window = raw.sliding_window if raw.use_sliding_window else None
    if raw.layer_types is None:
        if window is None:
            return (0,) * num_layers
        first = 28 if raw.max_window_layers is None else raw.max_window_layers  # transformers' default
        return tuple(window if layer >= first else 0 for layer in range(num_layers))
    if len(raw.layer_types) != num_layers:
        raise ModelLoadError(
            f"{path}: layer_types has {len(raw.layer_types)} entries for num_hidden_layers={num_layers}"
        )
    windows = []
    for layer_type in raw.layer_types:
        _choice(path, "layer_types", layer_type, ("full_attention", "sliding_attention"))
        if layer_type == "full_attention":
            windows.append(0)
        elif window is None:
            raise ModelLoadError(
                f"{path}: layer_types has sliding_attention, without use_sliding_window and sliding_window"
            )
        else:
            windows.append(window)
    return tuple(windows)


def _token_ids(value: int | list[int] | None) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset([value] if isinstance(value, int) else value)


def _generation(path: Path) -> tuple[GenerationDefaults, frozenset[int]]:
    """The defaults (none where the makers advise greedy decoding) and the end-of-sequence ids."""
    if not path.exists():
        return GenerationDefaults(), frozenset()
    raw = _read(path, _GenerationFile)
    defaults = GenerationDefaults()
    if raw.do_sample is not False:
        defaults = GenerationDefaults(
            temperature=raw.temperature,
            top_k=raw.top_k,
            top_p=raw.top_p,
            min_p=raw.min_p,
            repetition_penalty=raw.repetition_penalty,
        )
    return defaults, _token_ids(raw.eos_token_id)
