"""Numbers of one byte turned into wider ones: each of the 256, as torch reads it."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from autobot_llm.engine.kernels.gpu.narrow import halves_of_words, numbers_of_bytes

ON_GPU = torch.cuda.is_available()


@triton.jit
def _widen(  # type: ignore[no-untyped-def]
    bytes_ptr, words_ptr, of_bytes_ptr, low_ptr, high_ptr, FLOAT8: tl.constexpr, FAST: tl.constexpr
):
    n = tl.arange(0, 256)
    like = tl.zeros((256,), low_ptr.dtype.element_ty)
    tl.store(of_bytes_ptr + n, numbers_of_bytes(tl.load(bytes_ptr + n), like, FAST))
    words = tl.load(words_ptr + n)
    tl.store(low_ptr + n, halves_of_words(words, False, FLOAT8, FAST))
    tl.store(high_ptr + n, halves_of_words(words, True, FLOAT8, FAST))


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
def test_every_byte_is_the_number_it_stands_for(stored: torch.dtype, device: torch.device, dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    if stored == torch.float8_e4m3fn:
        every[every & 127 == 127] = 126  # no NaN is ever stored
    low, high = every.to(device), every.flip(0).contiguous().to(device)
    words = torch.stack((low, high), 1).view(torch.int16).flatten().contiguous()
    outs = [torch.full((256,), torch.nan, dtype=dtype, device=device) for _ in range(3)]
    _widen[(1,)](low.view(stored), words, *outs, FLOAT8=stored == torch.float8_e4m3fn, FAST=ON_GPU)
    for got, source in zip(outs, (low, low, high), strict=True):
        assert got.float().equal(source.view(stored).float())
