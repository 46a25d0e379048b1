"""Norm, rotary embedding with the cache write, gated activation and embedding: the same as float64, everything written
and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from autobot_llm.engine.attention.paged import BLOCK_SIZE
from autobot_llm.engine.kernels.gpu.activation import silu_mul, silu_mul_reference
from autobot_llm.engine.kernels.gpu.embedding import embed, embed_reference
from autobot_llm.engine.kernels.gpu.norm import rms_norm, rms_norm_reference
from autobot_llm.engine.kernels.gpu.rotary import rotate_and_store, rotate_and_store_reference

ON_GPU = torch.cuda.is_available()
EPS = 1e-5
POISON = 777.0


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def in_wide_rows(x_TX: torch.Tensor) -> torch.Tensor:
    """The same values in rows that lie further apart than they are long."""
    wide = torch.full((x_TX.shape[0], x_TX.shape[1] + 24), POISON, dtype=x_TX.dtype, device=x_TX.device)
    view = wide[:, 8:-16]
    view.copy_(x_TX)
    return view


def assert_rounded(got: torch.Tensor, expected_float64: torch.Tensor) -> None:
    """Equal up to float32 arithmetic and one rounding to the output's dtype."""
    unit = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), expected_float64.double(), rtol=0.51 * unit + 1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [64, 576, 4096, 16_384])
@pytest.mark.parametrize("num_rows", [1, 5, *([777] if ON_GPU else [])])
def test_rms_norm_is_the_float64_norm_rounded_once(
    width: int, num_rows: int, dtype: torch.dtype, device: torch.device
) -> None:
    x_TE = in_wide_rows(random(num_rows, width, dtype=dtype, device=device) * 5)
    x_TE[-1] *= 1e-3  # so that epsilon counts
    weight_E = random(width, dtype=dtype, device=device, seed=1)
    out = poisoned(num_rows, width, dtype=dtype, device=device)
    assert rms_norm(x_TE, weight_E, EPS, out) is out
    assert_rounded(out, rms_norm_reference(x_TE, weight_E, EPS))
    torch.testing.assert_close(rms_norm(x_TE, weight_E, EPS), out, rtol=0, atol=0)


def test_rms_norm_may_write_where_it_reads(dtype: torch.dtype, device: torch.device) -> None:
    x_TE, weight_E = random(3, 576, dtype=dtype, device=device), random(576, dtype=dtype, device=device, seed=1)
    expected = rms_norm_reference(x_TE, weight_E, EPS)
    assert_rounded(rms_norm(x_TE, weight_E, EPS, out=x_TE), expected)


def test_rows_too_wide_for_a_program_are_refused(device: torch.device) -> None:
    with pytest.raises(AssertionError, match="16385.*at most 16384"):
        rms_norm(torch.ones(1, 16_385, device=device), torch.ones(16_385, device=device), EPS)


@pytest.mark.parametrize("size", [64, 1536, 14_336])
@pytest.mark.parametrize("num_rows", [1, 3, *([777] if ON_GPU else [])])
def test_silu_mul_is_the_float64_product_rounded_once(
    size: int, num_rows: int, dtype: torch.dtype, device: torch.device
) -> None:
    gate_up_T2F = in_wide_rows(random(num_rows, 2 * size, dtype=dtype, device=device) * 6)
    out = poisoned(num_rows, size, dtype=dtype, device=device)
    assert silu_mul(gate_up_T2F, out) is out
    assert_rounded(out, silu_mul_reference(gate_up_T2F))
    torch.testing.assert_close(silu_mul(gate_up_T2F), out, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy, in the interpreter
def test_silu_of_a_very_negative_gate_is_zero(dtype: torch.dtype, device: torch.device) -> None:
    gate_up_T2F = torch.tensor([[-300.0, -1e4, 300.0, 2.0, 3.0, 0.5]], dtype=dtype, device=device)
    assert silu_mul(gate_up_T2F).tolist() == [[0.0, 0.0, 150.0]]


@pytest.mark.parametrize("width", [64, 576, 4096])
def test_embedding_takes_known_ids_and_tokens_that_only_the_device_knows(
    width: int, dtype: torch.dtype, device: torch.device
) -> None:
    embed_VE = random(300, width, dtype=dtype, device=device)
    ids_T = torch.tensor([7, 0, 299, 0, 41], dtype=torch.int32, device=device)
    token_rows_T = torch.tensor([-1, 2, -1, 0, -1], dtype=torch.int32, device=device)
    last_tokens_R = torch.tensor([250, 9, 123], dtype=torch.int32, device=device)
    out_TE = poisoned(5, width, dtype=dtype, device=device)
    embed(ids_T, token_rows_T, last_tokens_R, embed_VE, out_TE)
    assert out_TE.equal(embed_VE[torch.tensor([7, 123, 299, 250, 41], device=device)])
    assert out_TE.equal(embed_reference(ids_T, token_rows_T, last_tokens_R, embed_VE))


@dataclass(frozen=True)
class Heads:
    num_heads: int
    num_kv_heads: int
    head_size: int
    normed: bool = False


SHAPES = [Heads(32, 8, 128), Heads(9, 3, 64), Heads(4, 1, 128, normed=True), Heads(7, 7, 64, normed=True)]


class RotaryStep:
    """Random inputs of one step, with slots of its own and some tokens that write nothing."""

    def __init__(self, heads: Heads, num_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        num_kv_heads, size = heads.num_kv_heads, heads.head_size
        self.heads = heads
        num_blocks, num_positions = num_tokens // BLOCK_SIZE + 3, 500
        generator = torch.Generator().manual_seed(num_tokens)
        width = (heads.num_heads + 2 * num_kv_heads) * size
        self.qkv_TX = in_wide_rows(random(num_tokens, width, dtype=dtype, device=device))
        self.qkv_TX[-1:] *= 1e-2  # so that epsilon counts
        self.positions_T = torch.randint(num_positions, (num_tokens,), generator=generator).int().to(device)
        slots_T = torch.randperm(num_blocks * BLOCK_SIZE, generator=generator)[:num_tokens].int()
        slots_T[1::4] = -1
        self.slots_T = slots_T.to(device)
        angles = torch.rand((num_positions, size // 2), generator=generator) * 6.3
        self.cos_sin_PD = torch.cat((angles.cos(), angles.sin()), dim=1).to(device)
        shape = (num_blocks, num_kv_heads, BLOCK_SIZE, size)
        self.keys = torch.full(shape, POISON, dtype=dtype, device=device)
        self.values = torch.full(shape, -POISON, dtype=dtype, device=device)
        self.norms = [random(size, dtype=dtype, device=device, seed=i) if heads.normed else None for i in (1, 2)]

    def run(self, kernel: Callable[..., None]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the kernel makes of copies of the inputs: qkv, keys and values."""
        qkv_TX, keys, values = in_wide_rows(self.qkv_TX), self.keys.clone(), self.values.clone()
        kernel(
            qkv_TX,
            self.positions_T,
            self.slots_T,
            self.cos_sin_PD,
            keys,
            values,
            num_heads=self.heads.num_heads,
            num_kv_heads=self.heads.num_kv_heads,
            head_size=self.heads.head_size,
            q_norm_D=self.norms[0],
            k_norm_D=self.norms[1],
            eps=EPS,
        )
        return qkv_TX, keys, values


@pytest.mark.parametrize("heads", SHAPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 6, 19, *([1000] if ON_GPU else [])])
def test_rotation_and_cache_write_are_the_float64_ones(
    heads: Heads, num_tokens: int, dtype: torch.dtype, device: torch.device
) -> None:
    step = RotaryStep(heads, num_tokens, dtype, device)
    (qkv, keys, values), expected = step.run(rotate_and_store), step.run(rotate_and_store_reference)
    unit = torch.finfo(dtype).eps
    for got, want in zip((qkv, keys, values), expected, strict=True):
        # the twin rounds float64 to the dtype, so a value beside a tie may land one unit away
        torch.testing.assert_close(got.double(), want.double(), rtol=1.01 * unit, atol=1e-6)
    assert values.equal(expected[2])
    assert qkv[:, -heads.num_kv_heads * heads.head_size :].equal(
        step.qkv_TX[:, -heads.num_kv_heads * heads.head_size :]
    )


def test_a_token_without_a_slot_is_rotated_and_not_stored(dtype: torch.dtype, device: torch.device) -> None:
    step = RotaryStep(SHAPES[0], 6, dtype, device)
    step.slots_T.fill_(-1)
    qkv, keys, values = step.run(rotate_and_store)
    assert (keys == POISON).all() and (values == -POISON).all()
    assert not qkv.equal(step.qkv_TX)


def test_what_lies_between_the_rows_is_left_alone(dtype: torch.dtype, device: torch.device) -> None:
    step = RotaryStep(SHAPES[1], 5, dtype, device)
    qkv, _, _ = step.run(rotate_and_store)
    around = qkv.as_strided((5, qkv.shape[1] + 24), qkv.stride(), storage_offset=0)
    assert (around[:, :8] == POISON).all() and (around[:, -16:] == POISON).all()


def test_no_tokens_are_no_work(dtype: torch.dtype, device: torch.device) -> None:
    empty = torch.empty((0, 64), dtype=dtype, device=device)
    assert rms_norm(empty, torch.ones(64, dtype=dtype, device=device), EPS).shape == (0, 64)
    assert silu_mul(empty).shape == (0, 32)
    step = RotaryStep(SHAPES[1], 0, dtype, device)
    _, keys, _ = step.run(rotate_and_store)
    assert (keys == POISON).all()


@pytest.mark.skipif(not ON_GPU, reason="graphs are CUDA's")
def test_a_graph_of_all_of_them_computes_what_they_compute(dtype: torch.dtype, device: torch.device) -> None:
    embed_VE, weight_E = random(300, 576, dtype=dtype, device=device), random(576, dtype=dtype, device=device, seed=1)
    ids_T = torch.arange(40, dtype=torch.int32, device=device)
    none_T, last_R = torch.full_like(ids_T, -1), torch.zeros(1, dtype=torch.int32, device=device)
    hidden_TE, normed_TE = (poisoned(40, 576, dtype=dtype, device=device) for _ in range(2))
    out_TF = poisoned(40, 288, dtype=dtype, device=device)

    def chain() -> None:
        silu_mul(rms_norm(embed(ids_T, none_T, last_R, embed_VE, hidden_TE), weight_E, EPS, normed_TE), out_TF)

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    for start in (0, 100, 200):
        ids_T.copy_(torch.arange(start, start + 40))
        graph.replay()
        expected = silu_mul_reference(rms_norm_reference(embed_VE[ids_T.long()], weight_E, EPS).to(dtype))
        torch.testing.assert_close(out_TF.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-3)
