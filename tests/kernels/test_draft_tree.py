"""Trees that grow on the device: every node, parent and chance is that of the plain growth on the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autobot_llm.engine.attention.paged import ItemCut
from autobot_llm.engine.gpu.eagle_steps import draft_layout, fill_draft, levels_layout
from autobot_llm.engine.kernels.gpu.draft_levels import write_levels
from autobot_llm.engine.kernels.gpu.draft_tree import CHOICE_FIELDS, Draws, TreeGrower
from autobot_llm.engine.noise import noise_keys
from autobot_llm.engine.sequence import SamplingParams
from autobot_llm.engine.speculative.eagle.growth import Growth
from autobot_llm.engine.speculative.eagle.on_device import Roots, Taken
from autobot_llm.engine.speculative.guesses import rank_guesses

MAX_DEPTH = 4
GREEDY = SamplingParams(max_tokens=9, temperature=0.0)


def draws_of(params: list[SamplingParams], device: torch.device) -> Draws:
    """Of sequences whose next token has the index 5."""

    def tensor(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([getattr(each, name) for each in params], dtype=dtype, device=device)

    keys = [noise_keys([(each.seed, 5 + level) for level in range(MAX_DEPTH)])[:, 0].view(np.int64) for each in params]
    return Draws(
        torch.tensor([not each.is_greedy for each in params], dtype=torch.int32, device=device),
        torch.from_numpy(np.stack(keys)).to(device),
        tensor("temperature", torch.float32),
        tensor("top_k", torch.int32),
        tensor("top_p", torch.float32),
        tensor("min_p", torch.float32),
    )


def test_where_the_target_draws_its_noise_ranks_the_guesses(device: torch.device) -> None:
    """As speculative/guesses.py does, of as many tokens as are looked at; beside a request that is not drawn."""
    params = [
        GREEDY, SamplingParams(max_tokens=9, seed=3), SamplingParams(max_tokens=9, seed=4, temperature=0.6, top_p=0.8),
        SamplingParams(max_tokens=9, seed=5, temperature=1.5, top_k=6, min_p=0.05),
    ]  # fmt: skip
    rng = np.random.default_rng(1)
    target_ids = np.sort(rng.permutation(500)[:32]).astype(np.int32)
    grower = TreeGrower(torch.from_numpy(target_ids).to(device), max_sequences=4, num_branches=8, max_depth=MAX_DEPTH)
    draws = draws_of(params, device)
    for level in (0, 1):
        num_each = 8 if level else 1
        logits_RW = torch.from_numpy(2 * rng.standard_normal((4 * num_each, 32)).astype(np.float32))
        logits_RW[:, 8:] -= 9.0  # a chunk gives its eight best alone
        positions, rows_of = [5 + level] * 4 * num_each, [each for each in params for _ in range(num_each)]
        expected = rank_guesses(logits_RW, rows_of, positions, 8, ids_V=target_ids.astype(np.int64))
        tree_rows = torch.zeros((32, 4), dtype=torch.int32, device=device)
        grower.grow(level, logits_RW.to(device), draws, None if level else tree_rows)
        first, end = (8, 72) if level else (0, 8)
        found_ids = grower._tokens[:4, first:end].reshape(-1, 8).cpu().numpy()
        found = grower._chances[:4, first:end].reshape(-1, 8).cpu().numpy()
        is_likely = (expected.log_chances_RN > -8.0) & (found > -99.0)  # not after what is never taken
        if level:  # less the chances of their parents
            found = found - grower._frontier_chances[0, :32].cpu().numpy()[:, None]
        assert is_likely.sum() > 3 * len(found)
        assert (found_ids[is_likely] == expected.ids_RN[is_likely]).all()
        np.testing.assert_allclose(found[is_likely], expected.log_chances_RN[is_likely], atol=0.02)


@pytest.mark.parametrize(("vocab_size", "num_branches"), [(48, 8), (3000, 4)])
def test_a_tree_is_that_of_the_plain_growth(vocab_size: int, num_branches: int, device: torch.device) -> None:
    """Whatever the depth, the number of sequences and of nodes that are kept, one after the other in the same buffers;
    and what the next pass is told is what the plain growth says of its frontier."""
    rng = np.random.default_rng(vocab_size)
    target_ids = torch.from_numpy(rng.permutation(9000)[:vocab_size].astype(np.int32)).to(device)
    grower = TreeGrower(target_ids, max_sequences=3, num_branches=num_branches, max_depth=MAX_DEPTH)
    nobody = draws_of([GREEDY] * 3, device)
    for depth, num_sequences, num_chosen in ((4, 3, 31), (1, 2, 5), (3, 1, 63), (2, 3, 1)):
        twins = [Growth(7) for _ in range(num_sequences)]
        for level in range(depth):
            num_rows = num_sequences * (num_branches if level else 1)
            logits = (3 * rng.standard_normal((num_rows, vocab_size))).astype(np.float32)
            logits[0, :20] = logits[0, 0]  # equal ones: the first in the vocabulary come first
            has_next = level + 1 < depth
            tree_rows = torch.full((num_sequences * num_branches, 4), 77, dtype=torch.int32, device=device)
            frontier = grower.grow(level, torch.from_numpy(logits).to(device), nobody, tree_rows if has_next else None)
            log_shares = torch.from_numpy(logits).double().log_softmax(dim=-1).numpy()
            order = np.argsort(-logits, axis=-1, kind="stable")[:, :num_branches]
            parents: list[int] = []
            for s, (twin, rows) in enumerate(zip(twins, np.split(np.arange(num_rows), num_sequences), strict=True)):
                tokens = target_ids.cpu().numpy()[order[rows]].tolist()
                twin.add_level(tokens, np.take_along_axis(log_shares[rows], order[rows], axis=-1).tolist())
                if has_next:
                    num_before = len(twin.frontier)
                    parents += [s * num_before + place for place in twin.advance(num_branches, num_branches * level)]
            assert (frontier is not None) == has_next
            if frontier is not None:
                nodes = [(twin, node) for twin in twins for node in twin.frontier]
                assert frontier.ids_M.tolist() == [twin.nodes[node].token for twin, node in nodes]
                assert frontier.rows_M.tolist() == parents
                masks = [sum(1 << row for row in twin.rows_to(node)) for twin, node in nodes]
                found = frontier.tree_rows_M4.cpu().numpy()
                assert found[:, :2].copy().view(np.uint64).ravel().tolist() == masks
                assert (found[:, 2:] == 77).all(), "the caller's"
        out = torch.full((num_sequences, 70, CHOICE_FIELDS), -9, dtype=torch.int32, device=device)
        grower.choose(depth, torch.tensor([num_chosen], dtype=torch.int32, device=device), out)
        for found_N3, twin in zip(out.cpu().numpy(), twins, strict=True):
            kept = twin.best(num_chosen + 1)[1:]
            assert found_N3[: len(kept), 0].tolist() == [node.token for node in kept]
            assert found_N3[: len(kept), 1].tolist() == [node.parent - 1 for node in kept]
            chances = found_N3[: len(kept), 2].copy().view(np.float32)
            np.testing.assert_allclose(chances, [node.log_probability for node in kept], rtol=1e-5, atol=1e-5)
            assert (found_N3[len(kept) :] == -9).all()


def test_levels_see_the_context_and_the_levels_before_them(device: torch.device) -> None:
    """Whatever the contexts were cut into, and nothing is said of sequences that are not there."""
    lens, positions, branches, depth, spare_items = [700, 1, 130], [900, 0, 129], 8, 4, 9
    layout = draft_layout(4, table_width=60, spare_items=spare_items)
    buffer = np.zeros(layout.num_bytes, np.uint8)
    host = layout.on_host(buffer)
    tables = np.random.default_rng(0).permutation(180).astype(np.int32).reshape(3, 60)
    last_rows = np.arange(3, dtype=np.int32)
    taken = Taken([], np.ones(3, np.int32), np.array(positions, np.int32), last_rows)
    roots = Roots(last_rows, np.array(lens, np.int32), tables, [])
    fill_draft(host, taken, range(3), roots, 5, cut=ItemCut())
    level_layout = levels_layout(4, depth, spare_items=spare_items)
    levels = level_layout.on_device(torch.full((level_layout.num_bytes,), 113, dtype=torch.uint8, device=device))
    write_levels(layout.on_device(torch.from_numpy(buffer).to(device)), levels, branches)
    found = {name: array.cpu().numpy() for name, array in levels.items()}
    for level in range(depth - 1):
        items_I8 = found["items"][level]
        assert len(items_I8[items_I8[:, 0] >= 0]) > 3 and (items_I8[items_I8[:, 0] < 0] == -1).all()
        for s, (length, position) in enumerate(zip(lens, positions, strict=True)):
            own, nodes, context = (
                items_I8[items_I8[:, 0] == s],
                slice(8 * s, 8 * s + 8),
                length + branches * (level + 1),
            )
            assert own[0, 1] == 0 and own[-1, 2] == context and (own[1:, 1] == own[:-1, 2]).all()
            assert (own[:, 4:] == [len(own), 8 * s, 8, context]).all() and (items_I8[own[:, 3], 0] == s).all()
            places = length + branches * level + np.arange(branches)
            assert (found["slots"][level, nodes] == tables[s, places // 16] * 16 + places % 16).all()
            assert (found["positions"][level, nodes] == position + level + 1).all()
            assert (found["tree_rows"][level, nodes, 2:] == [length, length + level]).all()
        assert (found["slots"][level, 24:] == -1).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's own arithmetic
def test_bad_logits_give_no_chance(device: torch.device) -> None:
    target_ids = torch.arange(100, dtype=torch.int32, device=device)
    grower = TreeGrower(target_ids, max_sequences=2, num_branches=4, max_depth=1)
    logits = torch.randn(2, 100)
    logits[1, 30] = torch.nan
    grower.grow(0, logits.to(device), draws_of([GREEDY] * 2, device), None)
    out = torch.zeros((2, 4, CHOICE_FIELDS), dtype=torch.int32, device=device)
    grower.choose(1, torch.tensor([4], dtype=torch.int32, device=device), out)
    chances = out.cpu().numpy()[..., 2].copy().view(np.float32)
    assert np.isfinite(chances[0]).all() and not np.isfinite(chances[1]).all()
