from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from paged_steps import PagedStep, random_step, relative_error

from autobot_llm.engine.attention.choice import (
    FlashAttentionConfig,
    Hardware,
    Need,
    choose_attention,
    get_optimal_attention_backend,
    make_attention,
)
from autobot_llm.engine.attention.flashinfer import Pages
from autobot_llm.engine.attention.paged import (
    AttentionShape,
    PagedAttention,
    PagedBatch,
    decode_sizes,
    fill_decode_arrays,
    full_load,
)
from autobot_llm.engine.attention.sdpa_paged import SdpaPagedAttention, attend_fresh
from autobot_llm.engine.attention.triton_paged import TritonPagedAttention
from autobot_llm.errors import ConfigurationError

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
HOPPER, AMPERE, TURING = Hardware("cuda", (9, 0)), Hardware("cuda", (8, 6)), Hardware("cuda", (7, 5))


def shape_of(step: PagedStep, windows: tuple[int, ...] = (0,)) -> AttentionShape:
    return AttentionShape(step.num_heads, step.num_kv_heads, step.keys.shape[3], windows)


def triton_attention(step: PagedStep, windows: tuple[int, ...] = (0,), max_sequences: int = 8) -> TritonPagedAttention:
    keys, values = [step.keys] * len(windows), [step.values] * len(windows)
    return TritonPagedAttention(
        shape_of(step, windows), keys, values, max_sequences=max_sequences, reason="it is tested"
    )


def sdpa_attention(step: PagedStep, windows: tuple[int, ...] = (0,)) -> SdpaPagedAttention:
    keys, values = [step.keys] * len(windows), [step.values] * len(windows)
    return SdpaPagedAttention(shape_of(step, windows), keys, values, reason="it is tested", math_dtype=torch.float32)


def attend(attention: PagedAttention, step: PagedStep, layer: int = 0) -> torch.Tensor:
    """An eager step into a poisoned output."""
    out_THD = torch.full(step.q.shape, float("nan"), dtype=step.qkv.dtype, device=step.qkv.device)
    attention.attend(layer, step.q, step.k, step.v, out_THD, attention.prepare(step.batch))
    return out_THD


@pytest.mark.parametrize("make", [triton_attention, sdpa_attention])
def test_a_step_may_mix_every_kind_of_sequence(make: object, dtype: torch.dtype, device: torch.device) -> None:
    # decoding, verifying, a fresh prompt, a chunk after a prefix, a prompt of one token, a short one
    lengths, query_lens = [90, 70, 50, 120, 1, 7], [1, 4, 50, 60, 1, 7]
    step = random_step(lengths, query_lens, num_heads=4, num_kv_heads=2, head_size=64, dtype=dtype, device=device)
    windows = (0, 24)
    attention: PagedAttention = make(step, windows)  # type: ignore[operator]
    for layer, window in enumerate(windows):
        out_THD = attend(attention, step, layer)
        assert relative_error(out_THD, step.expected(window=window)) < TOLERANCE[dtype]


def test_many_heads_may_share_keys(dtype: torch.dtype, device: torch.device) -> None:
    """Of 12 heads, as Mistral Large has them, the decode kernel takes 10 tokens, which is no size that steps have."""
    step = random_step([90, 70], [10, 3], num_heads=12, num_kv_heads=1, head_size=64, dtype=dtype, device=device)
    assert relative_error(attend(triton_attention(step), step), step.expected()) < TOLERANCE[dtype]


def test_kernels_are_met_before_there_is_a_sequence(dtype: torch.dtype, device: torch.device) -> None:
    step = random_step([90, 70], [1, 4], num_heads=4, num_kv_heads=2, head_size=64, dtype=dtype, device=device)
    attention = triton_attention(step, (0, 24))
    keys, values = step.keys.clone(), step.values.clone()
    attention.rehearse(dtype)
    assert torch.equal(step.keys.nan_to_num(), keys.nan_to_num())
    assert torch.equal(step.values.nan_to_num(), values.nan_to_num())


@pytest.mark.gpu
def test_after_the_rehearsal_no_step_meets_a_compiler(device: torch.device) -> None:
    """Sequences, new tokens of each and contexts in every mix that leads to a tile of its own."""
    triton = pytest.importorskip("triton")
    compiled: list[str] = []
    mixes = [(n, q, c) for n in (1, 5, 40, 70, 110) for q in (1, 2, 4, 7, 12, 16, 40) for c in (0, 30)]
    make = partial(random_step, num_heads=4, num_kv_heads=2, head_size=128, dtype=torch.bfloat16, device=device)
    triton_attention(make([20], [1]), max_sequences=128).rehearse(torch.bfloat16)
    triton.knobs.runtime.jit_post_compile_hook = lambda *_, **about: compiled.append(str(about.get("repr")))
    try:
        for number, new, cached in mixes:
            step = make([new + cached] * number, [new] * number)
            attention = triton_attention(step, max_sequences=128)
            assert relative_error(attend(attention, step), step.expected()) < TOLERANCE[torch.bfloat16]
    finally:
        triton.knobs.runtime.jit_post_compile_hook = None
    assert not compiled


def test_a_prompt_in_chunks_gives_what_it_gives_whole(dtype: torch.dtype, device: torch.device) -> None:
    length = 150
    whole = random_step([length], [length], num_heads=4, num_kv_heads=2, head_size=64, dtype=dtype, device=device)
    attention = triton_attention(whole)
    outs = [attend(attention, rows_of(whole, start, min(start + 64, length))) for start in range(0, length, 64)]
    assert relative_error(torch.cat(outs), whole.expected()) < TOLERANCE[dtype]
    assert relative_error(torch.cat(outs), attend(attention, whole).double()) < TOLERANCE[dtype]


def rows_of(whole: PagedStep, start: int, stop: int) -> PagedStep:
    """The step that computes tokens [start, stop) of a one-sequence prompt."""
    batch = replace(
        whole.batch,
        ids_T=whole.batch.ids_T[start:stop],
        positions_T=whole.batch.positions_T[start:stop],
        slots_T=whole.batch.slots_T[start:stop],
        query_starts=np.array([0, stop - start], np.int32),
        context_lens=np.array([stop], np.int32),
        pending_rows_T=whole.batch.pending_rows_T[start:stop],
    )
    return replace(whole, batch=batch, qkv=whole.qkv[start:stop])


def test_steps_of_many_sizes_follow_each_other_in_fixed_arrays(dtype: torch.dtype, device: torch.device) -> None:
    """As a captured graph replays them: addresses, grid and padding stay, contents change."""
    size, heads = 6, {"num_heads": 4, "num_kv_heads": 2, "head_size": 64}
    num_items = size + full_load(num_kv_heads=2, num_processors=3)
    sizes = decode_sizes(size, max_queries=1, table_width=16, num_items=num_items)
    host = {name: np.full(shape, 77, np.int32) for name, shape in sizes.items()}
    tensors = {name: torch.from_numpy(array.copy()).to(device) for name, array in host.items()}
    for seed, lengths in enumerate(([200, 3, 16, 1, 90, 33], [17], [120, 250])):
        step = random_step(lengths, [1] * len(lengths), **heads, dtype=dtype, device=device, seed=seed)
        attention = triton_attention(step, max_sequences=4)
        fill_decode_arrays(host, step.batch)
        for name, array in host.items():
            tensors[name].copy_(torch.from_numpy(array))
        metadata = attention.prepare_captured(PagedBatch.over(tensors, max_queries=1), host)
        padded_THD = torch.zeros(size, 4, 64, dtype=dtype, device=device)
        q_THD = torch.full_like(padded_THD, float("nan"))
        q_THD[: len(lengths)] = step.q
        attention.attend(0, q_THD, step.k, step.v, padded_THD, metadata)
        assert relative_error(padded_THD[: len(lengths)], step.expected()) < TOLERANCE[dtype]
        assert not padded_THD[len(lengths) :].any(), "a row of padding was written"


MANY_TOKENS = (
    ([90, 70, 50, 120, 1, 7], [1, 4, 50, 60, 1, 7]),
    ([100], [100]),
    ([64, 160], [1, 159]),
    ([33, 21], [1, 1]),
)
FEW_TOKENS = (([90, 70, 50, 120, 1, 7], [1, 4, 20, 17, 1, 7]), ([100], [64]), ([64, 63], [1, 63]), ([33, 21], [1, 1]))


@pytest.mark.parametrize(("num_tokens", "steps"), [(160, MANY_TOKENS), (64, FEW_TOKENS)], ids=["tiles", "split"])
def test_steps_with_prompts_follow_each_other_in_fixed_arrays(
    num_tokens: int,
    steps: tuple[tuple[list[int], list[int]], ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """As a captured graph of so many tokens and 6 sequences replays them, in a model with a sliding window too."""
    heads, windows = {"num_heads": 4, "num_kv_heads": 2, "head_size": 64}, (0, 24)
    host: dict[str, np.ndarray] = {}
    for seed, (lengths, query_lens) in enumerate(steps):
        step = random_step(lengths, query_lens, **heads, dtype=dtype, device=device, seed=seed)
        attention = triton_attention(step, windows)
        sizes = attention.prompt_sizes(num_tokens, 6, 16)
        host = host or {name: np.full(shape, 77, np.int32) for name, shape in sizes.items()}
        attention.fill_prompt_arrays(host, step.batch)
        tensors = {name: torch.from_numpy(array.copy()).to(device) for name, array in host.items()}
        metadata = attention.prepare_prompts(tensors)
        used = sum(query_lens)
        padded_THD = torch.zeros(num_tokens, 4, 64, dtype=dtype, device=device)
        q_THD = torch.full_like(padded_THD, float("nan"))
        q_THD[:used] = step.q
        for layer, window in enumerate(windows):
            attention.attend(layer, q_THD, step.k, step.v, padded_THD, metadata)
            assert relative_error(padded_THD[:used], step.expected(window=window)) < TOLERANCE[dtype]
        assert not padded_THD[used:].any(), "a row of padding was written"


def test_arrays_too_small_for_a_step_are_refused() -> None:
    step = random_step(
        [5, 40], [1, 1], num_heads=2, num_kv_heads=1, head_size=64, dtype=torch.float16, device=torch.device("cpu")
    )
    for sequences, width in ((1, 8), (2, 2)):
        sizes = decode_sizes(sequences, max_queries=1, table_width=width, num_items=9)
        arrays = {name: np.zeros(shape, np.int32) for name, shape in sizes.items()}
        with pytest.raises(ValueError, match="does not fit"):
            fill_decode_arrays(arrays, step.batch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has these kernels on CUDA only")
@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
def test_torchs_own_kernels_attend_fresh_prompts_too(kernel: object, dtype: torch.dtype, device: torch.device) -> None:
    lengths = [100, 515]
    step = random_step(lengths, lengths, num_heads=8, num_kv_heads=2, head_size=128, dtype=dtype, device=device)
    out_THD = torch.full(step.q.shape, float("nan"), dtype=dtype, device=device)
    attend_fresh(step.q, step.k, step.v, out_THD, ((0, 100), (100, 615)), kernel)  # type: ignore[arg-type]
    assert relative_error(out_THD, step.expected()) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("backend", "module"), [("flashinfer", "flashinfer"), ("flash_attention", "flash_attn_interface")]
)
def test_an_installed_library_equals_the_twin(
    backend: str, module: str, dtype: torch.dtype, device: torch.device
) -> None:
    if device.type != "cuda" or importlib.util.find_spec(module) is None:
        pytest.skip(f"needs {module} and a CUDA device")
    lengths, query_lens = [900, 70, 50, 1200], [1, 4, 50, 600]
    step = random_step(lengths, query_lens, num_heads=8, num_kv_heads=2, head_size=128, dtype=dtype, device=device)
    step.keys.nan_to_num_(), step.values.nan_to_num_()  # theirs may read the rest of a block
    attention = make_attention(
        backend, shape_of(step), [step.keys], [step.values], max_num_seqs=8, max_num_batched_tokens=4096
    )
    assert relative_error(attend(attention, step), step.expected()) < TOLERANCE[dtype]


def test_flashinfer_is_told_each_sequences_pages_and_one_harmless_page_for_padding() -> None:
    absurd = -1_000_000
    tables_SB = np.array([[7, 3, 9], [4, absurd, absurd], [absurd, absurd, absurd], [5, 6, absurd]], np.int32)
    pages = Pages.of(np.array([33, 16, 0, 17], np.int32), tables_SB)
    assert pages.indptr.tolist() == [0, 3, 4, 5, 7]
    assert pages.indices.tolist() == [7, 3, 9, 4, 0, 5, 6]
    assert pages.last_page_len.tolist() == [1, 16, 1, 1]
    assert {pages.indptr.dtype, pages.indices.dtype, pages.last_page_len.dtype} == {torch.int32}


def everything(module: str) -> bool:
    return True


def nothing(module: str) -> bool:
    return False


@pytest.mark.parametrize(
    ("need", "name", "reason"),
    [
        (Need(HOPPER, is_installed=everything), "triton", "the best on compute capability 9.0"),
        (Need(AMPERE, is_installed=everything), "triton", "the best on compute capability 8.6"),
        (Need(Hardware("cuda", (12, 0)), is_installed=everything), "triton", "the best on compute capability 12.0"),
        (Need(TURING, is_installed=everything), "sdpa", "not triton: it needs compute capability 8.0 or later"),
        (
            Need(Hardware("rocm"), is_installed=everything),
            "sdpa",
            "not triton: it runs on cuda, and this is a ROCm GPU",
        ),
        (Need(Hardware("cpu"), is_installed=everything), "sdpa", "not triton: it runs on cuda, and this is a CPU"),
        (Need(HOPPER, is_installed=nothing), "sdpa", "not triton: the module triton is not installed"),
        (Need(HOPPER, head_size=96, is_installed=everything), "sdpa", "not triton: it takes heads of 64, 128"),
        (Need(HOPPER, dtype=torch.float32, is_installed=everything), "sdpa", "not triton: it computes bfloat16"),
        (Need(HOPPER, enable_jit=False, is_installed=everything), "sdpa", "not triton: it compiles its kernels"),
    ],
    ids=str,
)
def test_the_best_backend_follows_from_the_hardware_and_says_why(need: Need, name: str, reason: str) -> None:
    choice = get_optimal_attention_backend(need)
    assert choice.name == name and choice.reason.startswith(reason)


def test_this_machine_has_a_best_backend() -> None:
    assert get_optimal_attention_backend().name == ("triton" if torch.cuda.is_available() else "sdpa")


@pytest.mark.parametrize("name", ["triton", "flashinfer", "flash_attention", "sdpa"])
def test_a_named_backend_is_chosen_where_it_runs(name: str) -> None:
    choice = choose_attention(FlashAttentionConfig(backend=name), Need(HOPPER, is_installed=everything))
    assert (choice.name, choice.reason) == (name, "chosen by AUTOBOT_ATTENTION_BACKEND")


@pytest.mark.parametrize(
    ("backend", "need", "why"),
    [
        (
            "flashinfer",
            Need(HOPPER, is_installed=nothing),
            "flashinfer is not installed; expected auto or sdpa",
        ),
        ("flash_attention", Need(AMPERE, is_installed=everything), "compute capability 9.0 to below 10.0, and this is"),
        ("triton", Need(TURING, is_installed=everything), "8.0 or later, and this is compute capability 7.5"),
        ("triton", Need(Hardware("rocm"), is_installed=everything), "it runs on cuda, and this is a ROCm GPU"),
        ("triton", Need(HOPPER, head_size=80, is_installed=everything), "heads of 64, 128, and the model's are 80"),
        ("flashinfer", Need(HOPPER, dtype=torch.float32, is_installed=everything), "and the cache is float32"),
    ],
    ids=str,
)
def test_a_forced_backend_that_cannot_run_says_why_and_what_can(backend: str, need: Need, why: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        choose_attention(FlashAttentionConfig(backend=backend), need)
    assert f"AUTOBOT_ATTENTION_BACKEND='{backend}' cannot run here" in str(error.value)
    assert why in str(error.value) and "sdpa" in str(error.value).partition("expected")[2]


def test_without_compilation_only_what_is_built_ahead_is_chosen() -> None:
    need = Need(HOPPER, is_installed=everything)
    for name in ("triton", "flashinfer"):
        with pytest.raises(ConfigurationError, match="enable_jit is off; expected auto, flash_attention or sdpa"):
            choose_attention(FlashAttentionConfig(backend=name, enable_jit=False), need)
    assert choose_attention(FlashAttentionConfig(backend="auto", enable_jit=False), need).name == "sdpa"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "xformers"}, "AUTOBOT_ATTENTION_BACKEND='xformers': expected auto, triton"),
        ({"page_size": 32}, "page_size=32: expected 16"),
        ({"use_block_sparse": False}, "use_block_sparse=False: expected True"),
        ({"use_fp8_attention": True}, "use_fp8_attention=True: expected False"),
    ],
)
def test_an_option_that_cannot_be_honoured_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        FlashAttentionConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("use_cuda_graph", [True, False])
def test_what_is_made_can_be_captured_only_where_that_is_wanted(use_cuda_graph: bool, device: torch.device) -> None:
    step = random_step([20], [1], num_heads=4, num_kv_heads=2, head_size=64, dtype=torch.float16, device=device)
    config = FlashAttentionConfig(backend="auto", use_cuda_graph=use_cuda_graph)
    attention = make_attention(
        config, shape_of(step), [step.keys], [step.values], max_num_seqs=2, max_num_batched_tokens=64
    )
    assert attention.can_capture == (use_cuda_graph and device.type == "cuda")
    assert relative_error(attend(attention, step), step.expected()) < TOLERANCE[torch.float16]
