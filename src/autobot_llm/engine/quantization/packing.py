"""Values of 4 and 8 bits in 32-bit words, as three formats lay them out. Knows integers; knows nothing of scales.

Every function takes or gives whole numbers as int32 tensors: unsigned, 0 to 2**bits - 1.
"""

from __future__ import annotations

import torch

# AutoAWQ's order of the eight values in a word
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


# R rows, C columns, W words of a row
def pack_rows(values_RC: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words_RW, the first value in the lowest bits; a row is padded with zeros. (compressed-tensors)"""
    per_word = 32 // bits
    padded = torch.nn.functional.pad(values_RC.to(torch.int64), (0, -values_RC.shape[1] % per_word))
    shifts = torch.arange(0, 32, bits, dtype=torch.int64, device=values_RC.device)
    words = (padded.view(len(padded), -1, per_word) << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)  # the same bits, as a signed word


def unpack_rows(words_RW: torch.Tensor, bits: int, num_columns: int) -> torch.Tensor:
    """The first `num_columns` values of each row, int32."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words_RW.device)
    values: torch.Tensor = (words_RW.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return values.flatten(1)[:, :num_columns]


def pack_columns(values_RC: torch.Tensor, bits: int) -> torch.Tensor:
    """Words along the first dimension: values of one column share a word."""
    return pack_rows(values_RC.t(), bits).t().contiguous()


def unpack_columns(words: torch.Tensor, bits: int, num_rows: int) -> torch.Tensor:
    return unpack_rows(words.t(), bits, num_rows).t()


def unpack_awq(words_RW: torch.Tensor) -> torch.Tensor:
    """4-bit values of AutoAWQ's `gemm` layout, in their order."""
    values = unpack_rows(words_RW, 4, words_RW.shape[1] * 8).view(len(words_RW), -1, 8)
    reordered: torch.Tensor = values[..., list(AWQ_ORDER)].flatten(1)
    return reordered


def pack_awq(values_RC: torch.Tensor) -> torch.Tensor:
    inverse = [AWQ_ORDER.index(i) for i in range(8)]
    return pack_rows(values_RC.reshape(len(values_RC), -1, 8)[..., inverse].flatten(1), 4)


def nibbles(values_RC: torch.Tensor) -> torch.Tensor:
    """uint8 pairs, the even column in the low half: how 4-bit values are kept in memory. C must be even."""
    values = values_RC.to(torch.uint8)
    return values[:, 0::2] | (values[:, 1::2] << 4)


def from_nibbles(pairs: torch.Tensor) -> torch.Tensor:
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)
