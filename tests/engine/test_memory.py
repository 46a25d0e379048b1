"""Planning a GPU's memory: never over what is there, and advice that works when it is followed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from autobot_llm.engine.memory import (
    GIB,
    MIB,
    CachePlan,
    DeviceMemory,
    MemoryDemand,
    estimated_activation_bytes,
    plan_cache,
    remedies,
)
from autobot_llm.engine.models.config import load_config
from autobot_llm.errors import ConfigurationError
from autobot_llm.settings import load_settings

H200 = DeviceMemory(total=140 * GIB, free=139 * GIB)
SMALL_GPU = DeviceMemory(total=24 * GIB, free=23 * GIB)
MISTRAL_7B = MemoryDemand(
    weight_bytes=14_483_464_192,
    activation_bytes=1 * GIB,
    graph_bytes=GIB // 2,
    block_bytes=2 * MIB,
    block_size=16,
    max_model_len=32_768,
    max_num_seqs=64,
    utilization=0.9,
)
TINY = Path(__file__).parents[2] / "src" / "autobot_llm" / "assets" / "tiny"

MEMORIES = st.builds(
    lambda total, share: DeviceMemory(total, int(total * share)), st.integers(GIB, 200 * GIB), st.floats(0, 1)
)
DEMANDS = st.builds(
    MemoryDemand,
    weight_bytes=st.integers(10 * MIB, 160 * GIB),
    activation_bytes=st.integers(0, 8 * GIB),
    graph_bytes=st.sampled_from([0, 300 * MIB, 2 * GIB]),
    block_bytes=st.integers(2**10, 8 * MIB),
    block_size=st.just(16),
    max_model_len=st.integers(1, 200_000),
    max_num_seqs=st.integers(1, 256),
    utilization=st.floats(0.01, 1),
    cache_bytes=st.none() | st.integers(1, 160 * GIB),
    num_weight_bytes_each=st.sampled_from([2, 4]),
)


def plan_or_none(memory: DeviceMemory, demand: MemoryDemand) -> CachePlan | None:
    try:
        return plan_cache(memory, demand)
    except ConfigurationError:
        return None


@st.composite
def fitting(draw: st.DrawFn) -> tuple[DeviceMemory, MemoryDemand]:
    """A demand, and a device with room for it; most of any two drawn for themselves do not fit."""
    demand = draw(DEMANDS)
    if demand.cache_bytes is not None:
        demand = replace(demand, cache_bytes=demand.cache_bytes + demand.sequence_bytes)
    needed = demand.fixed_bytes + (demand.cache_bytes or demand.sequence_bytes)
    total = int(needed / demand.utilization * draw(st.floats(1.03, 4))) + GIB
    lowest = needed + DeviceMemory(total, 0).reserve
    return DeviceMemory(total, draw(st.integers(lowest, total))), demand


@given(fitting())
def test_a_plan_never_exceeds_the_memory_or_the_share(device: tuple[DeviceMemory, MemoryDemand]) -> None:
    memory, demand = device
    plan = plan_cache(memory, demand)
    assert plan.num_bytes == plan.num_blocks * demand.block_bytes
    assert plan.num_full_sequences >= 1
    used = demand.weight_bytes + demand.activation_bytes + demand.graph_bytes + plan.num_bytes
    assert used <= memory.free - memory.reserve
    if demand.cache_bytes is None:
        assert used <= memory.total * demand.utilization
    else:
        assert demand.cache_bytes - demand.block_bytes < plan.num_bytes <= demand.cache_bytes


@given(fitting(), st.integers(0, 20 * GIB), st.floats(1, 2))
def test_more_memory_and_smaller_wishes_never_make_the_cache_smaller(
    device: tuple[DeviceMemory, MemoryDemand], more: int, factor: float
) -> None:
    memory, demand = device
    plan = plan_cache(memory, demand)
    easier = [
        (replace(memory, total=memory.total + more, free=memory.free + more), demand),
        (memory, replace(demand, weight_bytes=int(demand.weight_bytes / factor))),
        (memory, replace(demand, activation_bytes=int(demand.activation_bytes / factor))),
        (memory, replace(demand, graph_bytes=0)),
        (memory, replace(demand, utilization=min(1.0, demand.utilization * factor))),
    ]
    for roomier, smaller in easier:
        if memory.reserve == roomier.reserve:  # one hundredth of what is added is kept in reserve
            assert plan_cache(roomier, smaller).num_blocks >= plan.num_blocks


@given(MEMORIES, DEMANDS)
def test_advice_that_is_followed_fits_and_the_message_says_it(memory: DeviceMemory, demand: MemoryDemand) -> None:
    try:
        plan_cache(memory, demand, name="a-model")
    except ConfigurationError as error:
        message = error.message
    else:
        assume(False)
    assert "a-model does not fit" in message
    found = remedies(memory, demand)
    for remedy in found:
        assert remedy.text in message
        assert plan_cache(remedy.memory, remedy.demand).num_full_sequences >= 1
    assert ("larger GPU" in message) == (not found)


@given(MEMORIES, DEMANDS)
def test_the_values_that_the_advice_names_fit_when_typed_in(memory: DeviceMemory, demand: MemoryDemand) -> None:
    """From the text alone, through the settings' own parser."""
    assume(plan_or_none(memory, demand) is None)
    # the other remedies are no settings
    found = [
        r
        for r in remedies(memory, demand)
        if (r.memory, r.demand.num_weight_bytes_each) == (memory, demand.num_weight_bytes_each)
    ]
    assume(found)
    for remedy in found:
        typed = dict(re.findall(r"(AUTOBOT_\w+)=(\w[\w.]*)", remedy.text))
        assert typed
        settings = load_settings(environ=typed, env_file=None)
        followed = replace(
            demand,
            max_model_len=settings.max_model_len or demand.max_model_len,
            cache_bytes=settings.kv_cache_memory or demand.cache_bytes,
            graph_bytes=0 if settings.cuda_graphs == "off" else demand.graph_bytes,
            utilization=settings.gpu_memory_utilization
            if "AUTOBOT_GPU_MEMORY_UTILIZATION" in typed
            else demand.utilization,
        )
        assert plan_or_none(memory, followed) is not None, remedy.text


def test_a_7b_model_fills_its_share_of_a_large_gpu() -> None:
    plan = plan_cache(H200, MISTRAL_7B)
    rest = int(H200.total * 0.9) - MISTRAL_7B.fixed_bytes
    assert plan.num_blocks == rest // (2 * MIB)
    assert plan.num_full_sequences == plan.num_blocks // 2048
    assert plan.num_tokens == plan.num_blocks * 16


def test_a_small_model_takes_no_more_blocks_than_its_sequences_and_prefixes_use() -> None:
    small = replace(MISTRAL_7B, weight_bytes=30 * MIB, block_bytes=2**16, max_model_len=2048)
    assert plan_cache(H200, small).num_blocks == 2 * 64 * 128


def test_a_size_that_is_asked_for_is_what_there_is() -> None:
    plan = plan_cache(H200, replace(MISTRAL_7B, cache_bytes=10 * GIB + 5))
    assert plan.num_blocks == 10 * GIB // (2 * MIB)


def test_memory_held_by_others_is_not_planned_for() -> None:
    shared = replace(SMALL_GPU, free=20 * GIB)
    assert plan_cache(SMALL_GPU, MISTRAL_7B).num_blocks > plan_cache(shared, MISTRAL_7B).num_blocks


@pytest.mark.parametrize(
    ("memory", "demand", "told"),
    [
        (
            SMALL_GPU,
            replace(MISTRAL_7B, max_model_len=49_152, utilization=0.8),
            [
                "KV cache for one sequence of 49152 tokens 6.00 GiB",
                "AUTOBOT_MAX_MODEL_LEN=34",
                "for 64 such",
                "AUTOBOT_GPU_MEMORY_UTILIZATION=0.88 or more",
            ],
        ),
        (
            SMALL_GPU,
            replace(MISTRAL_7B, cache_bytes=10 * GIB),
            ["KV cache for AUTOBOT_KV_CACHE_MEMORY 10.00 GiB", "AUTOBOT_KV_CACHE_MEMORY=7", "MiB or less"],
        ),
        (
            SMALL_GPU,
            replace(MISTRAL_7B, cache_bytes=1 * GIB),
            ["AUTOBOT_KV_CACHE_MEMORY=4096MiB or more", "AUTOBOT_MAX_MODEL_LEN=8192 or less"],
        ),
        (
            replace(SMALL_GPU, free=10 * GIB),
            MISTRAL_7B,
            ["more free memory on this GPU, of which others hold 14.00 GiB"],
        ),
        (
            replace(SMALL_GPU, total=20 * GIB, free=20 * GIB),
            replace(
                MISTRAL_7B,
                weight_bytes=28_966_928_384,
                block_bytes=4 * MIB,
                num_weight_bytes_each=4,
                max_model_len=8192,
            ),
            ["weights 26.98 GiB", "a copy of the model that is stored in bfloat16"],
        ),
        (DeviceMemory(8 * GIB, 8 * GIB), MISTRAL_7B, ["a larger GPU or a smaller model"]),
    ],
)
def test_the_error_says_what_is_needed_and_what_would_fit(
    memory: DeviceMemory, demand: MemoryDemand, told: list[str]
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        plan_cache(memory, demand, name="Mistral-7B")
    for part in told:
        assert part in caught.value.message


def test_the_concurrency_that_the_error_names_is_reached() -> None:
    demand = replace(MISTRAL_7B, max_model_len=131_072)
    with pytest.raises(ConfigurationError) as caught:
        plan_cache(SMALL_GPU, demand)
    together = re.search(r"\((\d+) or less for 64 such sequences at once\)", caught.value.message)
    assert together is not None
    assert plan_cache(SMALL_GPU, replace(demand, max_model_len=int(together[1]))).num_full_sequences >= 64
    assert plan_cache(SMALL_GPU, replace(demand, max_model_len=int(together[1]) + 16)).num_full_sequences < 64


def test_activations_grow_with_the_step() -> None:
    config = load_config(TINY)
    sizes = [
        estimated_activation_bytes(config, num_batched_tokens=tokens, num_rows=rows, num_bytes_each=2)
        for tokens, rows in ((256, 1), (4096, 1), (4096, 64))
    ]
    assert sizes == sorted(set(sizes))
    assert sizes[1] > 4096 * 2 * (config.hidden_size + 3 * config.intermediate_size)
