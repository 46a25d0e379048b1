from __future__ import annotations

import numpy as np
import pytest
import torch
from paged_steps import PagedStep, device_batch, random_step, relative_error, with_trees

from autobot_llm.engine.attention.paged import ItemCut, PagedBatch, full_load, plan_items
from autobot_llm.engine.batching.plan import StepBatch
from autobot_llm.engine.kernels.gpu.decode_attention import DecodeTile, DecodeWorkspace, paged_decode

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def attend(
    step: PagedStep, batch: PagedBatch, *, window: int = 0, tile: DecodeTile | None = None, num_launches: int = 1
) -> torch.Tensor:
    """Run the kernel on a poisoned output and a poisoned workspace."""
    workspace = DecodeWorkspace.allocate(
        batch.items_I8.shape[0],
        max_queries=batch.max_queries,
        group_size=step.num_heads // step.num_kv_heads,
        num_kv_heads=step.num_kv_heads,
        head_size=step.keys.shape[3],
        device=step.qkv.device,
    )
    workspace.partials.fill_(float("nan"))
    workspace.stats.fill_(float("nan"))
    out_THD = torch.full(step.q.shape, float("nan"), dtype=step.qkv.dtype, device=step.qkv.device)
    for _ in range(num_launches):
        out_THD.fill_(float("nan"))
        paged_decode(step.q, step.keys, step.values, batch, out_THD, workspace, window=window, tile=tile)
    assert int(workspace.arrivals.abs().max()) == 0, "a counter was left for the next launch"
    return out_THD


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (7, 1)], ids=["own keys", "4 share", "7 share"])
def test_every_mix_of_lengths_equals_the_twin(
    heads: tuple[int, int], head_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    lengths = [1, 16, 17, 63, 200, 64] if device.type == "cpu" else [1, 16, 17, 63, 64, 3000, 640, 129, 8000]
    step = random_step(
        lengths,
        [1] * len(lengths),
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_size=head_size,
        dtype=dtype,
        device=device,
    )
    out_THD = attend(step, device_batch(step))
    assert relative_error(out_THD, step.expected()) < TOLERANCE[dtype]


@pytest.mark.parametrize("query_lens", [[4, 4, 4], [1, 7, 3], [16, 1, 2]], ids=str)
def test_several_new_tokens_per_sequence_see_each_other_in_order(
    query_lens: list[int], dtype: torch.dtype, device: torch.device
) -> None:
    step = random_step([150, 33, 90], query_lens, num_heads=4, num_kv_heads=2, head_size=64, dtype=dtype, device=device)
    out_THD = attend(step, device_batch(step))
    assert relative_error(out_THD, step.expected()) < TOLERANCE[dtype]


@pytest.mark.parametrize("heads", [(4, 2), (8, 1)], ids=["2 share", "8 share"])
@pytest.mark.parametrize("window", [0, 70])
def test_a_tree_says_which_new_tokens_are_seen(
    window: int, heads: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    """Trees of up to 64 tokens, in several programs; a line and a single token beside them."""
    line = random_step(
        [130, 100, 20, 90],
        [6, 64, 1, 19],
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_size=64,
        dtype=dtype,
        device=device,
    )
    step = with_trees(line)
    out_THD = attend(step, device_batch(step, window=window), window=window)
    expected_THD = step.expected(window=window)
    assert relative_error(out_THD, expected_THD) < TOLERANCE[dtype]
    assert relative_error(line.expected(window=window), expected_THD) > 0.1, "these trees are no different from lines"
    assert torch.equal(line.expected(window=window)[70:], expected_THD[70:])


@pytest.mark.parametrize("plan_knows_it", [True, False], ids=["planned", "unplanned"])
@pytest.mark.parametrize("window", [1, 16, 50])
def test_a_window_hides_what_lies_before_it(
    window: int, plan_knows_it: bool, dtype: torch.dtype, device: torch.device
) -> None:
    step = random_step(
        [300, 40, 64, 5], [1, 3, 1, 5], num_heads=4, num_kv_heads=2, head_size=64, dtype=dtype, device=device
    )
    batch = device_batch(step, window=window if plan_knows_it else 0)
    out_THD = attend(step, batch, window=window)
    assert relative_error(out_THD, step.expected(window=window)) < TOLERANCE[dtype]


def test_padding_reads_nothing_and_leaves_its_rows_alone(dtype: torch.dtype, device: torch.device) -> None:
    step = random_step([70, 20], [1, 1], num_heads=4, num_kv_heads=2, head_size=64, dtype=dtype, device=device)
    batch = device_batch(step, num_sequences=8, max_queries=4)
    out_THD = attend(step, batch)
    assert relative_error(out_THD, step.expected()) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    "tile",
    [DecodeTile(32, 4, 4), DecodeTile(32, 2, 3), DecodeTile(64, 4, 3), DecodeTile(128, 8, 2)],
    ids=str,
)
def test_every_tile_gives_the_same_answer_launch_after_launch(
    tile: DecodeTile, dtype: torch.dtype, device: torch.device
) -> None:
    step = random_step(
        [190, 65, 640], [2, 1, 1], num_heads=8, num_kv_heads=2, head_size=128, dtype=dtype, device=device
    )
    out_THD = attend(step, device_batch(step), tile=tile, num_launches=3)
    assert relative_error(out_THD, step.expected()) < TOLERANCE[dtype]


@pytest.mark.parametrize("seed", range(8))
def test_a_kept_cut_covers_each_context_as_it_grows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_sequences = int(rng.integers(1, 60))
    lens = rng.integers(1, 1500, num_sequences).astype(np.int32)
    cut, spare_items = ItemCut(), full_load(num_kv_heads=8, num_processors=132)
    for step in range(150):
        if step == 100:  # somebody leaves
            lens = lens[: max(1, num_sequences // 2)]
        items_I8 = np.full((len(lens) + spare_items, 8), -77, np.int32)
        num_items = cut.write(items_I8, decoding_batch(lens).context_lens, spare_items)
        assert (items_I8[num_items:] == -77).all()
        for s, length in enumerate(lens):
            own = items_I8[:num_items][items_I8[:num_items, 0] == s]
            assert own[0, 1] == 0 and own[-1, 2] == length and (own[1:, 1] == own[:-1, 2]).all()
            assert (own[:, 2] > own[:, 1]).all() and (own[:, 4] == len(own)).all() and (own[:, 7] == length).all()
            assert (items_I8[own[:, 3], 0] == s).all() and (own[:, 5] == s).all() and (own[:, 6] == 1).all()
        lens = lens + np.int32(1)


@pytest.mark.parametrize(("num_sequences", "length"), [(8, 16384), (8, 16500), (4, 30_000), (16, 9000), (5, 12_345)])
@pytest.mark.parametrize("is_long", [False, True])
def test_equal_contexts_are_cut_into_one_even_load(num_sequences: int, length: int, is_long: bool) -> None:
    """A second round of programs, or a part much longer than the others, is time in which most of the device idles."""
    spare_items = full_load(num_kv_heads=8, num_processors=132, is_long=is_long)
    items_I8 = np.empty((num_sequences + spare_items, 8), np.int32)
    lens = np.full(num_sequences, length, np.int32)
    num_items = plan_items(items_I8, np.arange(num_sequences + 1, dtype=np.int32), lens, spare_items=spare_items)
    longest = int((items_I8[:num_items, 2] - items_I8[:num_items, 1]).max())
    assert num_items <= spare_items
    assert longest <= -(-length // (spare_items // num_sequences)) + 64


def test_a_kept_cut_is_not_used_where_there_is_another_room() -> None:
    lens, cut = np.full(8, 16384, np.int32), ItemCut()
    for is_long in (False, True, False):
        spare_items = full_load(num_kv_heads=8, num_processors=132, is_long=is_long)
        items_I8, planned_I8 = (np.full((8 + spare_items, 8), -1, np.int32) for _ in range(2))
        cut.write(items_I8, lens, spare_items)
        plan_items(planned_I8, np.arange(9, dtype=np.int32), lens, spare_items=spare_items)
        assert (items_I8 == planned_I8).all()


def decoding_batch(lens: np.ndarray[tuple[int], np.dtype[np.int32]]) -> StepBatch:
    """Everybody decodes; what the items do not depend on is empty."""
    none = np.zeros(0, np.int64)
    starts = np.arange(len(lens) + 1, dtype=np.int32)
    return StepBatch(
        none, lens - 1, none, starts, lens, np.zeros((len(lens), 0), np.int32), none, none.astype(np.int32)
    )


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("window", [0, 100])
def test_items_cover_each_context_once_within_their_room(seed: int, window: int) -> None:
    rng = np.random.default_rng(seed)
    num_sequences = int(rng.integers(1, 100))
    lens = (1 + rng.integers(0, 2, num_sequences) * rng.integers(0, 20_000, num_sequences)).astype(np.int32)
    queries = np.minimum(rng.integers(1, 17, num_sequences), lens)
    starts = np.concatenate(([0], queries.cumsum())).astype(np.int32)
    room = num_sequences + full_load(num_kv_heads=8, num_processors=132)
    items_I8 = np.empty((room, 8), np.int32)
    num_items = plan_items(items_I8, starts, lens, spare_items=room - num_sequences, window=window)
    assert num_items <= room
    for s in range(num_sequences):
        own = items_I8[:num_items][items_I8[:num_items, 0] == s]
        first_seen = max(0, int(lens[s] - queries[s]) + 1 - window) if window else 0
        assert own[0, 1] <= first_seen and own[0, 1] % 16 == 0 and own[0, 1] > first_seen - 16
        assert (own[1:, 1] == own[:-1, 2]).all() and own[-1, 2] == lens[s], "positions are missing or read twice"
        assert (own[:, 4] == len(own)).all() and (items_I8[own[:, 3], 0] == s).all()
        assert (items_I8[own[:, 3] - 1, 0] != s).all() or own[0, 3] == 0
        assert (own[:, 5] == starts[s]).all() and (own[:, 6] == queries[s]).all() and (own[:, 7] == lens[s]).all()
