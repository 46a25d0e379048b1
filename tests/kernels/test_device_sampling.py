"""Sampling on the device: the host sampler's tokens, whatever the logits and parameters, and the right distribution."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence as SequenceABC
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from autobot_llm.engine.kernels.gpu import numerics
from autobot_llm.engine.kernels.gpu.sampling import DeviceSampler, SamplingTensors, sample_reference
from autobot_llm.engine.noise import exponential_noise, noise_keys
from autobot_llm.engine.sampler import SampledToken, Sampler
from autobot_llm.engine.sequence import SamplingParams, Sequence

ON_GPU = torch.cuda.is_available()
VOCAB_SIZES = [257, 8192, 32_000] if ON_GPU else [257, 1000]
NUM_ROWS = 512 if ON_GPU else 24

GREEDY = SamplingParams(max_tokens=9, temperature=0.0)


def sequences_of(params: SequenceABC[SamplingParams]) -> list[Sequence]:
    """One sequence for each, with as many tokens as its place: a noise key of its own."""
    return [Sequence(i, [1] * (i % 50 + 1), p) for i, p in enumerate(params)]


def tensors_of(sequences: SequenceABC[Sequence], device: torch.device) -> SamplingTensors:
    params = [s.params for s in sequences]
    keys = noise_keys((s.params.seed, len(s.token_ids)) for s in sequences).view(np.int64).flatten()
    return SamplingTensors(
        temperature_R=torch.tensor([p.temperature for p in params], device=device),
        top_k_R=torch.tensor([p.top_k for p in params], dtype=torch.int32, device=device),
        top_p_R=torch.tensor([p.top_p for p in params], device=device),
        min_p_R=torch.tensor([p.min_p for p in params], device=device),
        keys_R=torch.from_numpy(keys).to(device),
        is_drawn_R=torch.tensor([not p.is_greedy for p in params], dtype=torch.int32, device=device),
    )


def sample_on_device(
    logits_RV: torch.Tensor, params: SequenceABC[SamplingParams], device: torch.device, **flags: bool
) -> tuple[list[int], list[float]]:
    sampler = DeviceSampler(logits_RV.shape[1], len(params), device)
    flags = flags or {"any_drawn": True, "any_restricted": True}
    tokens_R, values_R = sampler.sample(logits_RV.to(device), tensors_of(sequences_of(params), device), **flags)
    return tokens_R.tolist(), values_R.tolist()


def sample_on_host(logits_RV: torch.Tensor, params: SequenceABC[SamplingParams]) -> list[int]:
    outcomes = Sampler(logits_RV.shape[1]).sample(logits_RV, sequences_of(params))
    assert all(isinstance(outcome, SampledToken) for outcome in outcomes), outcomes
    return [outcome.token_id for outcome in outcomes if isinstance(outcome, SampledToken)]


def drawn(seed: int = 0, **values: Any) -> SamplingParams:
    return SamplingParams(max_tokens=9, seed=seed, **values)


def float32(x: float) -> float:
    """Parameters travel to the device as float32: the host gets the same."""
    return float(np.float32(x))


def logits_of(kind: str, num_rows: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    logits_RV = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))
    match kind:
        case "peaked":
            return logits_RV * 12
        case "flat":
            return logits_RV * 0.01
        case "ties":
            return (logits_RV * 2).round() - 3
        case "equal":
            return torch.full_like(logits_RV, -1.5)
        case "excluded":
            return torch.where(logits_RV > 1.0, logits_RV * 3, -math.inf)
        case _:
            return logits_RV * 3


KINDS = ["usual", "peaked", "flat", "ties", "equal", "excluded"]


def random_params(num_rows: int, vocab_size: int, seed: int) -> list[SamplingParams]:
    """Every parameter from values at, inside and beyond its limits, independently; one row in eight is greedy."""
    choose = np.random.default_rng(seed).choice
    return [
        drawn(
            seed=i,
            temperature=float32(choose([0.0, 1e-35, 1e-3, 0.3, 1.0, 1.0, 2.0, 1e4])),
            top_k=int(choose([0, 0, 1, 5, 64, 65, 150, 1000, vocab_size])),
            top_p=float32(choose([1.0, 1.0, 0.01, 0.5, 0.9, 0.95, 0.999])),
            min_p=float32(choose([0.0, 0.0, 0.0, 0.02, 0.3, 0.9])),
        )
        for i in range(num_rows)
    ]


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_device_chooses_the_host_samplers_tokens(kind: str, vocab_size: int, device: torch.device) -> None:
    logits_RV = logits_of(kind, NUM_ROWS, vocab_size)
    params = random_params(NUM_ROWS, vocab_size, seed=vocab_size)
    tokens, values = sample_on_device(logits_RV, params, device)
    assert tokens == sample_on_host(logits_RV, params)
    assert values == logits_RV.amax(-1).tolist()


# The name says where the row is decided: among the candidates, or by a search through the whole row.
RESTRICTIONS = {
    "one": {"top_k": 1},
    "few": {"top_k": 40},
    "nucleus": {"top_p": float32(0.9)},
    "above a tenth": {"min_p": float32(0.1)},
    "all three": {"top_k": 64, "top_p": float32(0.95), "min_p": float32(0.01)},
    "many": {"top_k": 200, "temperature": 3.0},
    "wide nucleus": {"top_p": float32(0.999), "temperature": 3.0},
    "many, then nucleus": {"top_k": 240, "top_p": float32(0.97), "temperature": 4.0},
    "above a millionth": {"min_p": float32(1e-6)},
    "the best alone": {"min_p": 1.0},
}


@pytest.mark.parametrize("restriction", RESTRICTIONS.values(), ids=RESTRICTIONS)
def test_each_restriction_alone_agrees_with_sorting_in_float64(
    restriction: dict[str, Any], device: torch.device
) -> None:
    params = [drawn(seed=i, **restriction) for i in range(NUM_ROWS // 4)]
    logits_RV = logits_of("usual", len(params), VOCAB_SIZES[-1], seed=4)
    tokens, _ = sample_on_device(logits_RV, params, device)
    assert tokens == sample_reference(logits_RV, tensors_of(sequences_of(params), torch.device("cpu"))).tolist()


def test_rows_without_restrictions_are_drawn_alike_with_and_without_restricted_company(device: torch.device) -> None:
    logits_RV = logits_of("usual", 8, VOCAB_SIZES[0])
    free = [drawn(seed=i, temperature=1.5) for i in range(8)]
    alone, _ = sample_on_device(logits_RV, free, device, any_drawn=True)
    mixed = [p if i % 2 else drawn(seed=i, top_k=3) for i, p in enumerate(free)]
    in_company, _ = sample_on_device(logits_RV, mixed, device)
    assert alone == sample_on_host(logits_RV, free)
    assert in_company[1::2] == alone[1::2]


@pytest.mark.parametrize("vocab_size", [*VOCAB_SIZES, 4096, 4097, 20_000])
def test_greedy_rows_take_the_lowest_of_the_best(vocab_size: int, device: torch.device) -> None:
    logits_RV = logits_of("ties", 6, vocab_size)
    best_id = vocab_size - 1
    logits_RV[0, best_id] = 50.0  # the very last
    logits_RV[1] = -math.inf
    logits_RV[1, vocab_size // 2] = -3.0
    logits_RV[2, [3, 200]] = 60.0
    logits_RV[3] = -1.0
    logits_RV[3, [5, 9]] = torch.tensor([-0.0, 0.0])  # equal, so the first
    tokens, values = sample_on_device(logits_RV, [GREEDY] * 6, device, any_drawn=False)
    assert tokens[:4] == [best_id, vocab_size // 2, 3, 5]
    assert tokens == logits_RV.numpy().argmax(-1).tolist()
    assert values == logits_RV.amax(-1).tolist()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("params", [GREEDY, drawn(), drawn(top_p=0.9), drawn(top_k=5), drawn(top_k=200, top_p=0.5)])
def test_a_broken_row_shows_it_and_harms_nobody_else(params: SamplingParams, device: torch.device) -> None:
    logits_RV = logits_of("usual", 6, 1000)
    logits_RV[0, 700] = math.nan
    logits_RV[1, 3] = math.inf
    logits_RV[2] = -math.inf
    logits_RV[4] = math.nan
    tokens, values = sample_on_device(logits_RV, [params] * 6, device)
    assert math.isnan(values[0]) and values[1:3] == [math.inf, -math.inf] and math.isnan(values[4])
    assert all(0 <= token < 1000 for token in tokens)  # the next step looks them up before the host sees the values
    healthy = [3, 5]
    everyone = sequences_of([params] * 6)
    outcomes = Sampler(1000).sample(logits_RV[healthy], [everyone[r] for r in healthy])
    assert [SampledToken(tokens[r]) for r in healthy] == outcomes


def test_rows_may_lie_far_apart(device: torch.device) -> None:
    logits_RV = logits_of("usual", 4, 1000)
    params = [drawn(seed=i, top_p=float32(0.8)) for i in range(4)]
    wide = torch.full((4, 1500), math.nan)
    wide[:, 100:1100] = logits_RV
    sampler = DeviceSampler(1000, 9, device)  # and there may be fewer than there is room for
    tensors = tensors_of(sequences_of(params), device)
    tokens_R, _ = sampler.sample(wide.to(device)[:, 100:1100], tensors, any_drawn=True, any_restricted=True)
    assert tokens_R.tolist() == sample_on_host(logits_RV, params)


def test_a_sampler_remembers_nothing_between_calls(device: torch.device) -> None:
    sampler, params = DeviceSampler(1000, 4, device), [drawn(seed=i, top_k=30) for i in range(4)]
    tensors = tensors_of(sequences_of(params), device)
    for seed in range(3):
        logits_RV = logits_of("usual", 4, 1000, seed)
        tokens_R, _ = sampler.sample(logits_RV.to(device), tensors, any_drawn=True, any_restricted=True)
        assert tokens_R.tolist() == sample_on_host(logits_RV, params)
    assert sampler.sample(logits_RV[:0].to(device))[0].shape == (0,)


@pytest.mark.parametrize("restriction", [{}, {"top_k": 6}], ids=["free", "top_k"])
def test_drawn_tokens_follow_the_distribution(restriction: dict[str, Any], device: torch.device) -> None:
    num_draws, vocab_size = (20_000, 16) if ON_GPU else (150, 16)
    logits_V = logits_of("usual", 1, vocab_size)[0] / 3
    params = [drawn(seed=i, temperature=1.25, **restriction) for i in range(num_draws)]
    tokens, _ = sample_on_device(logits_V.expand(num_draws, -1).contiguous(), params, device)
    scores_V = logits_V.double() / 1.25
    num_kept = restriction.get("top_k", vocab_size)
    scores_V[scores_V < scores_V.topk(num_kept).values[-1]] = -math.inf
    expected_V = scores_V.softmax(-1) * num_draws
    counts = Counter(tokens)
    assert sum(counts[i] for i in range(vocab_size) if expected_V[i] > 0) == num_draws
    chi_square = sum((counts[i] - float(e)) ** 2 / float(e) for i, e in enumerate(expected_V) if e > 0)
    assert chi_square < {16: 50.5, 6: 35.9}[num_kept]  # exceeded once in 100,000 (15 and 5 degrees of freedom)


@triton.jit
def _exponential_kernel(x_ptr, out_ptr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.arange(0, N)
    tl.store(out_ptr + places, numerics.exponential(tl.load(x_ptr + places)))


@triton.jit
def _log1p_kernel(x_ptr, out_ptr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.arange(0, N)
    tl.store(out_ptr + places, numerics.minus_log1p_of_minus(tl.load(x_ptr + places)))


@triton.jit
def _noise_kernel(ids_ptr, key_ptr, out_ptr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.arange(0, N)
    tl.store(out_ptr + places, numerics.exponential_noise(tl.load(key_ptr), tl.load(ids_ptr + places)))


@triton.jit
def _order_kernel(x_ptr, out_ptr, back_ptr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.arange(0, N)
    orders = numerics.order_of(tl.load(x_ptr + places))
    tl.store(out_ptr + places, orders)
    tl.store(back_ptr + places, numerics.value_of(orders))


UNIT = 2.0**-23


def test_exponential_is_within_4_units_in_the_last_place(device: torch.device) -> None:
    x = -torch.logspace(-9, math.log10(87), 8192, dtype=torch.float64).float().to(device)
    out = torch.full_like(x, math.nan)
    _exponential_kernel[(1,)](x, out, N=len(x))
    torch.testing.assert_close(out.double(), x.double().exp(), rtol=4 * UNIT, atol=0)
    edges = torch.tensor([0.0, -0.0, -200.0, -math.inf], device=device)
    _exponential_kernel[(1,)](edges, out, N=4)
    assert out[:4].tolist() == [1.0, 1.0, 0.0, 0.0]


def test_the_logarithm_behind_the_noise_is_within_4_units_however_small_u_is(device: torch.device) -> None:
    u = torch.cat((torch.logspace(-15.9, -1, 4096, dtype=torch.float64), torch.linspace(0.1, 1 - 2**-24, 4096)))
    u = u.float().to(device)
    out = torch.full_like(u, math.nan)
    _log1p_kernel[(1,)](u, out, N=len(u))
    torch.testing.assert_close(out.double(), -torch.log1p(-u.double()), rtol=4 * UNIT, atol=0)
    _log1p_kernel[(1,)](torch.ones(1, device=device), out, N=1)
    assert out[0] == math.inf


@pytest.mark.parametrize("place", [(0, 0), (1, 77), (-5, 3), (2**63, 123_456)], ids=str)
def test_noise_is_the_hosts(place: tuple[int, int], device: torch.device) -> None:
    ids = torch.randint(200_000, (4096,), generator=torch.Generator().manual_seed(0))
    keys_R1 = noise_keys([place])
    out = torch.full((4096,), math.nan, device=device)
    _noise_kernel[(1,)](ids.to(device), torch.from_numpy(keys_R1.view(np.int64)).to(device), out, N=4096)
    expected = torch.from_numpy(exponential_noise(keys_R1, ids.numpy()[None]))[0]
    torch.testing.assert_close(out.cpu(), expected, rtol=6 * UNIT, atol=0)


def test_orders_sort_as_the_floats_do(device: torch.device) -> None:
    ascending = [-math.inf, -3e38, -2.0, -1e-44, 0.0, 1e-44, 1e-20, 2.0, 3e38, math.inf, math.nan]
    x = torch.tensor([*ascending, -0.0, -math.nan, -1.0, 0.5, 7.0], device=device)
    orders, back = torch.full_like(x, 0, dtype=torch.int32), torch.zeros_like(x)
    _order_kernel[(1,)](x, orders, back, N=len(x))
    in_order = orders[: len(ascending)].tolist()
    assert in_order == sorted(set(in_order)) and orders[0] == numerics.MINUS_INFINITY_ORDER.value
    assert orders[11] == orders[4] and orders[12] == orders[10]
    torch.testing.assert_close(back, x, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not ON_GPU, reason="graphs are CUDA's")
@pytest.mark.parametrize("any_restricted", [False, True])
def test_a_graph_serves_any_logits_and_parameters(any_restricted: bool, device: torch.device) -> None:
    num_rows, vocab_size = 32, 8192
    sampler = DeviceSampler(vocab_size, num_rows, device)
    logits_RV = torch.zeros(num_rows, vocab_size, device=device)
    static = tensors_of(sequences_of([drawn()] * num_rows), device)

    def run() -> torch.Tensor:
        return sampler.sample(logits_RV, static, any_drawn=True, any_restricted=any_restricted)[0]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens_R = run()
    for seed, kind in enumerate(KINDS):
        params = random_params(num_rows, vocab_size, seed)
        if not any_restricted:
            params = [drawn(seed=p.seed, temperature=p.temperature) for p in params]
        logits = logits_of(kind, num_rows, vocab_size, seed)
        logits_RV.copy_(logits)
        for name in SamplingTensors.__slots__:
            getattr(static, name).copy_(getattr(tensors_of(sequences_of(params), device), name))
        graph.replay()
        assert tokens_R.tolist() == sample_on_host(logits, params)
