"""What becomes of a model's matrices on a GPU that computes with quantized weights. Knows schemes and what the kernels
read; knows no files and no kernels.

What the kernels cannot read is dequantized, and `text` says which and why.
"""

from __future__ import annotations

import logging
from collections import Counter

import torch

from autobot_llm.engine.memory import weight_bytes
from autobot_llm.engine.models.config import ModelConfig
from autobot_llm.engine.quantization.online import online_scheme, rounded
from autobot_llm.engine.quantization.packed import PackedWeight, packed, why_not_packed, why_scheme_not_packed
from autobot_llm.engine.quantization.scheme import QuantizationType, Scheme
from autobot_llm.engine.quantization.weight import QuantizedWeight
from autobot_llm.errors import ConfigurationError

log = logging.getLogger(__name__)

_NOT_QUANTIZED = "stored unquantized, or in parts whose inputs are grouped differently"


class WeightPacker:
    """Takes matrices as they are loaded; afterwards it can say what they are. For a quantized folder or a type that is
    made at load: `for_model` gives None where neither is.

    Raises ConfigurationError for a type that cannot be made at load, here.
    """

    def __init__(self, scheme: Scheme, capability: tuple[int, int], *, rounds: bool) -> None:
        self.scheme = scheme
        self._capability = capability
        self._rounds = rounds
        self._reasons: Counter[str] = Counter()
        self._num_matrices = 0
        self._why_not = why_scheme_not_packed(scheme, capability)

    @classmethod
    def for_model(cls, config: ModelConfig, kind: QuantizationType, capability: tuple[int, int]) -> WeightPacker | None:
        """A folder's own quantization comes before the type that is asked for."""
        if config.quantization is not None:
            return cls(config.quantization.scheme, capability, rounds=False)
        if kind is QuantizationType.NONE:
            return None
        packer = cls(online_scheme(kind), capability, rounds=True)
        if packer._why_not is not None:
            raise ConfigurationError(
                f"AUTOBOT_QUANTIZATION_TYPE={kind.value!r}: {packer._why_not}; expected int8 or int4"
            )
        return packer

    def __call__(self, matrix_OI: torch.Tensor) -> PackedWeight | torch.Tensor:
        """The matrix as the decoder is to have it, on the device where it is."""
        self._num_matrices += 1
        if self._rounds:
            matrix_OI = rounded(matrix_OI, self.scheme)
        if not isinstance(matrix_OI, QuantizedWeight):
            self._reasons[_NOT_QUANTIZED] += 1
            return matrix_OI
        reason = why_not_packed(matrix_OI, self._capability)
        if reason is None:
            return packed(matrix_OI)
        self._reasons[reason] += 1
        return matrix_OI.dequantize()

    @property
    def text(self) -> str:
        """The scheme, and whether the weights are read as they are."""
        num_whole = self._reasons.total()
        if not num_whole:
            return f"{self.scheme.name} weights as they are"
        reasons = "; ".join(f"{count}: {reason}" for reason, count in self._reasons.most_common())
        return f"{self.scheme.name}, {num_whole} of {self._num_matrices} matrices dequantized ({reasons})"

    def warn(self) -> None:
        """Log what could not be read as it is."""
        if self._reasons:
            log.warning("quantized weights that take as much memory as others: %s", self.text)

    def expected_bytes(self, config: ModelConfig, num_bytes_each: int) -> int:
        """Of the whole model, before anything is read: as if every matrix that the scheme allows were packed."""
        return weight_bytes(config, num_bytes_each, self.scheme if self._why_not is None else None)
