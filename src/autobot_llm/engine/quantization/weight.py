"""A quantized matrix that is a tensor to everybody else. Knows values, scales and what they mean; knows no files.

`QuantizedWeight` has the shape and dtype of the matrix it stands for. An operator that does not know it gets the
dequantized matrix, which is the slow twin of every faster product (linear.py); only the packed values stay in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from autobot_llm.engine.quantization.packing import from_nibbles, nibbles
from autobot_llm.engine.quantization.scheme import Scheme

FP8 = torch.float8_e4m3fn


# O outputs, I inputs, G groups of inputs
class QuantizedWeight(torch.Tensor):
    """(values_OI - zero_points_OG) * scales_OG, each group's scale over its inputs.

    `stored` holds int8 [O, I], float8_e4m3fn [O, I] or, for 4 bits, uint8 pairs [O, I / 2] of value + 8.
    `group_of_input_I` maps inputs to groups where they do not simply follow each other (GPTQ's desc_act).
    """

    stored: torch.Tensor
    scales_OG: torch.Tensor
    zero_points_OG: torch.Tensor | None
    group_of_input_I: torch.Tensor | None
    scheme: Scheme

    @staticmethod
    def __new__(
        cls,
        stored: torch.Tensor,
        scales_OG: torch.Tensor,
        zero_points_OG: torch.Tensor | None,
        scheme: Scheme,
        *,
        dtype: torch.dtype,
        group_of_input_I: torch.Tensor | None = None,
    ) -> QuantizedWeight:
        num_inputs = stored.shape[1] * (2 if scheme.num_bits == 4 else 1)
        self: QuantizedWeight = torch.Tensor._make_wrapper_subclass(
            cls, (stored.shape[0], num_inputs), dtype=dtype, device=stored.device, requires_grad=False
        )
        self.stored = stored
        self.scales_OG = scales_OG
        self.zero_points_OG = zero_points_OG
        self.group_of_input_I = group_of_input_I
        self.scheme = scheme
        return self

    @classmethod
    def from_values(
        cls,
        values_OI: torch.Tensor,
        scales_OG: torch.Tensor,
        zero_points_OG: torch.Tensor | None,
        scheme: Scheme,
        *,
        dtype: torch.dtype,
        group_of_input_I: torch.Tensor | None = None,
    ) -> QuantizedWeight:
        """Of whole numbers (or, for FP8, numbers that it can hold) in any dtype."""
        if scheme.kind == "float":
            stored = values_OI.to(FP8)
        elif scheme.num_bits == 8:
            stored = values_OI.to(torch.int8)
        else:
            stored = nibbles(values_OI.to(torch.int8) + 8)
        zeros = None if zero_points_OG is None else zero_points_OG.to(torch.int8)
        return cls(stored, scales_OG, zeros, scheme, dtype=dtype, group_of_input_I=group_of_input_I)

    @classmethod
    def below_each_other(cls, parts: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
        """One matrix of all rows, as q, k and v are kept; None where their inputs are grouped differently."""
        first = parts[0]
        for part in parts[1:]:
            ours, theirs = first.group_of_input_I, part.group_of_input_I
            if (ours is None) != (theirs is None) or (
                ours is not None and theirs is not None and not torch.equal(ours, theirs)
            ):
                return None
        zeros = [part.zero_points_OG for part in parts if part.zero_points_OG is not None]
        return cls(
            torch.cat([part.stored.view(torch.uint8) for part in parts]).view(first.stored.dtype),
            torch.cat([part.scales_OG for part in parts]),
            torch.cat(zeros) if zeros else None,
            first.scheme,
            dtype=first.dtype,
            group_of_input_I=first.group_of_input_I,
        )

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """Outputs `start` to `stop`, sharing memory."""
        zeros = self.zero_points_OG
        return QuantizedWeight(
            self.stored[start:stop],
            self.scales_OG[start:stop],
            None if zeros is None else zeros[start:stop],
            self.scheme,
            dtype=self.dtype,
            group_of_input_I=self.group_of_input_I,
        )

    @property
    def values_OI(self) -> torch.Tensor:  # noqa: N802
        """The stored numbers: int8, or float8_e4m3fn."""
        if self.scheme.num_bits == 4:
            return from_nibbles(self.stored).to(torch.int8) - 8
        return self.stored

    @property
    def num_bytes(self) -> int:
        """Memory held: packed values, scales, zero points and the map of groups."""
        tensors = (self.stored, self.scales_OG, self.zero_points_OG, self.group_of_input_I)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The matrix, computed in float32 and rounded once to `dtype` (None: this tensor's)."""
        numbers_OI = self.values_OI.float()
        if self.zero_points_OG is not None:
            numbers_OI = numbers_OI - self._of_inputs(self.zero_points_OG.float())
        return (numbers_OI * self._of_inputs(self.scales_OG.float())).to(dtype or self.dtype)

    def _of_inputs(self, of_groups_OG: torch.Tensor) -> torch.Tensor:
        """What holds for each group, for each input; one column does for all."""
        if self.group_of_input_I is not None:
            return of_groups_OG.index_select(1, self.group_of_input_I)
        if of_groups_OG.shape[1] == 1:
            return of_groups_OG
        size = self.scheme.group_size
        assert size is not None, "several groups have a size"
        return of_groups_OG.repeat_interleave(size, dim=1)[:, : self.shape[1]]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantizedWeight({tuple(self.shape)}, {self.scheme.name}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Any operator sees the dequantized matrix."""
        if func is torch.ops.aten.detach.default:
            return args[0]
        dense_args, dense_kwargs = tree_map(_dense, (tuple(args), dict(kwargs or {})))
        return func(*dense_args, **dense_kwargs)


def _dense(value: Any) -> Any:
    return value.dequantize() if isinstance(value, QuantizedWeight) else value
