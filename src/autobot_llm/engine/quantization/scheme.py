"""What can be asked for and how numbers are kept: types, settings and schemes, as data. Knows no tensors, no files."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from autobot_llm.errors import ConfigurationError

GROUP_SIZES = (32, 64, 128)


class QuantizationType(StrEnum):
    """What a user asks for. All but `none` are lossy.

    w8a8: INT8 weights and activations (SmoothQuant, then GPTQ). w8: INT8 weights alone. w4: INT4 weights by rounding,
    without calibration. gptq, awq: INT4 weights, calibrated. fp8: 8-bit floats, weights and activations (rounded; by
    GPTQ where there is a text).
    """

    NONE = "none"
    W8A8 = "w8a8"
    W8 = "w8"
    W4 = "w4"
    GPTQ = "gptq"
    AWQ = "awq"
    FP8 = "fp8"

    @classmethod
    def from_setting(cls, value: str) -> QuantizationType:
        """The type of a value of AUTOBOT_QUANTIZATION_TYPE, whose int8 and int4 are w8a8 and w4."""
        return cls({"int8": "w8a8", "int4": "w4"}.get(value, value))

    @property
    def needs_calibration(self) -> bool:
        return self in (QuantizationType.W8A8, QuantizationType.GPTQ, QuantizationType.AWQ)

    @property
    def reads_calibration(self) -> bool:
        """Whether it gains from a text; fp8 does without one, too."""
        return self.needs_calibration or self is QuantizationType.FP8


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """How a model is to be quantized. Raises ConfigurationError for values that no scheme takes.

    `smooth_quant_alpha` is the share of the activations' range that moves into the weights (0: none). `desc_act` lets
    GPTQ round the columns with the largest activations first; groups stay where they are, so readers need no map.
    `calibration_samples` sequences of `calibration_sequence_length` tokens are read, or as many as the text has.
    """

    type: QuantizationType = QuantizationType.W8A8
    smooth_quant_alpha: float = 0.5
    group_size: int = 128
    desc_act: bool = True
    calibration_samples: int = 512
    calibration_sequence_length: int = 2048

    def __post_init__(self) -> None:
        if not 0 <= self.smooth_quant_alpha <= 1:
            raise ConfigurationError(f"smooth_quant_alpha={self.smooth_quant_alpha}: expected a number from 0 to 1")
        if self.group_size not in GROUP_SIZES:
            raise ConfigurationError(f"group_size={self.group_size}: expected 32, 64 or 128")
        if self.calibration_samples < 1:
            raise ConfigurationError(f"calibration_samples={self.calibration_samples}: expected 1 or more")
        if self.calibration_sequence_length < 16:
            raise ConfigurationError(
                f"calibration_sequence_length={self.calibration_sequence_length}: expected 16 or more"
            )


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the numbers of a matrix [out, in] are kept, and what its input becomes.

    A number is (value - zero point) * scale. `granularity`: one scale for the tensor, for each output channel, or for
    each `group_size` inputs of an output channel. Symmetric schemes have no zero points. `activations` are quantized
    for each token as it comes (dynamic), with one symmetric scale.
    """

    kind: Literal["int", "float"]
    num_bits: Literal[4, 8]
    granularity: Literal["tensor", "channel", "group"]
    group_size: int | None = None
    symmetric: bool = True
    activations: Literal["int8", "fp8"] | None = None

    @property
    def name(self) -> str:
        """`W4A16 group 128, asymmetric` and the like."""
        weights = f"FP{self.num_bits}" if self.kind == "float" else f"W{self.num_bits}"
        inputs = {"int8": "A8", "fp8": ", activations too", None: "A16" if self.kind == "int" else " weights"}
        where = f" group {self.group_size}" if self.granularity == "group" else f", one scale a {self.granularity}"
        return f"{weights}{inputs[self.activations]}{where}{'' if self.symmetric else ', asymmetric'}"

    @property
    def low(self) -> float:
        return -448.0 if self.kind == "float" else -(2.0 ** (self.num_bits - 1))

    @property
    def high(self) -> float:
        """448 is the largest number of float8_e4m3fn."""
        return 448.0 if self.kind == "float" else 2.0 ** (self.num_bits - 1) - 1

    def num_groups(self, num_inputs: int) -> int:
        return 1 if self.group_size is None else -(-num_inputs // self.group_size)

    def bytes_of(self, num_outputs: int, num_inputs: int, *, scale_bytes: int = 2) -> int:
        """Memory of a matrix: packed values, scales and, where there are any, zero points of one byte."""
        num_scales = 1 if self.granularity == "tensor" else num_outputs * self.num_groups(num_inputs)
        per_scale = scale_bytes + (0 if self.symmetric else 1)
        return num_outputs * num_inputs * self.num_bits // 8 + num_scales * per_scale


def scheme_of(config: QuantizationConfig) -> Scheme:
    """The scheme that a type is stored in. Raises ConfigurationError for `none`, which is none."""
    group = config.group_size
    schemes = {
        QuantizationType.W8A8: Scheme("int", 8, "channel", activations="int8"),
        QuantizationType.W8: Scheme("int", 8, "channel"),
        QuantizationType.W4: Scheme("int", 4, "group", group),
        QuantizationType.GPTQ: Scheme("int", 4, "group", group),
        QuantizationType.AWQ: Scheme("int", 4, "group", group, symmetric=False),
        QuantizationType.FP8: Scheme("float", 8, "channel", activations="fp8"),
    }
    if config.type not in schemes:
        accepted = ", ".join(schemes)
        raise ConfigurationError(f"quantization type {config.type.value!r} keeps the model as it is: use {accepted}")
    return schemes[config.type]
