"""Rows of x in 16 bits and scales: how near they are to what they were, and what they say of numbers that are none."""

from __future__ import annotations

import math

import pytest
import torch

from autobot_llm.engine.kernels.gpu.scaled_rows import X_GROUP, scale_rows, scale_rows_reference

GPU = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5


def numbers_of(scaled: torch.Tensor, scales_TG: torch.Tensor, unit: float = 1.0) -> torch.Tensor:
    """What the kernel multiplies with, in float64."""
    wide = scaled.double()
    if scaled.dtype == torch.int8:
        wide = 256 * wide[:, 0] + wide[:, 1]
    num_groups = wide.shape[1] // X_GROUP
    return wide * scales_TG[:, :num_groups].double().repeat_interleave(X_GROUP, 1) / unit


def largest_of_groups(x_TI: torch.Tensor) -> torch.Tensor:
    return x_TI.abs().unflatten(1, (-1, X_GROUP)).amax(-1).repeat_interleave(X_GROUP, 1)


def random_rows(num_rows: int, num_inputs: int) -> torch.Tensor:
    """With outliers, and groups of very different sizes."""
    generator = torch.Generator().manual_seed(num_inputs)
    x = torch.randn(num_rows, num_inputs, generator=generator)
    x[:, ::301] *= 400
    x[:, X_GROUP : 2 * X_GROUP] *= 1e-6
    return x.to(torch.bfloat16).to(GPU)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("num_inputs", [128, 1408, 4096])
def test_fixed_point_is_off_by_half_a_step_of_the_largest_at_most(num_inputs: int, normed: bool) -> None:
    x = random_rows(3, num_inputs)
    norm = (
        torch.rand(num_inputs, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).to(GPU)
        if normed
        else None
    )
    scaled, scales_TG = scale_rows(x, integer=True, unit=1 / 16, norm=norm, eps=EPS)
    assert scaled.shape == (3, 2, num_inputs) and scales_TG.shape[1] % 4 == 0
    wide = x.double()
    if norm is not None:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * norm.double()
    errors = (numbers_of(scaled, scales_TG, 1 / 16) - wide).abs() / largest_of_groups(wide)
    assert float(errors.max()) < 0.5 / 32512 + (1e-6 if normed else 1e-7)
    assert int(scaled[:, 0].abs().max()) <= 127


def test_float16_keeps_what_bfloat16_has() -> None:
    x = random_rows(2, 1408)
    scaled, scales_TG = scale_rows(x, integer=False)
    assert scaled.dtype == torch.float16 and bool(scaled.isfinite().all())
    wide = x.double()
    errors = (numbers_of(scaled, scales_TG) - wide).abs() / wide.abs().clamp(min=1e-7 * float(wide.abs().max()))
    assert float(errors.max()) < 2**-11


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("integer", [False, True])
def test_rows_are_those_of_the_twin(integer: bool, normed: bool) -> None:
    """But for the last place, where float32 rounds otherwise than float64."""
    x = random_rows(2, 1408)
    norm = torch.rand(1408, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).to(GPU) if normed else None
    found = numbers_of(*scale_rows(x, integer=integer, unit=0.5, norm=norm, eps=EPS), 0.5)
    wanted = numbers_of(*scale_rows_reference(x, integer=integer, unit=0.5, norm=norm, eps=EPS), 0.5)
    steps = (found - wanted).abs() / largest_of_groups(wanted) * 32512
    assert float(steps.max()) < (1.1 if integer else 16.1) and float((steps > 0.5).double().mean()) < 0.02


@pytest.mark.parametrize("integer", [False, True])
def test_groups_of_nothing_are_nothing(integer: bool) -> None:
    x = torch.zeros(1, 256, dtype=torch.bfloat16, device=GPU)
    assert bool((numbers_of(*scale_rows(x, integer=integer)) == 0).all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("integer", [False, True])
def test_a_number_that_is_none_spoils_its_group_and_no_other(integer: bool, value: float) -> None:
    x = torch.ones(1, 256, dtype=torch.bfloat16, device=GPU)
    x[0, 5] = value
    scaled, scales_TG = scale_rows(x, integer=integer)
    found = numbers_of(scaled, scales_TG)
    assert not math.isfinite(float(found[0, :X_GROUP].sum())) and bool((found[0, X_GROUP:] - 1).abs().max() < 1e-4)
