"""The compiled step beside its slow twin, and beside itself in other company."""

from __future__ import annotations

import platform
import random
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from guessed_trees import guessed_tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_folders import write_random_model

from autobot_llm.engine.attention.sdpa import SdpaAttention
from autobot_llm.engine.batching.draft_tree import leaves, path_to
from autobot_llm.engine.batching.drafts import straighten
from autobot_llm.engine.batching.plan import ScheduledSequence, StepPlan, build_batch
from autobot_llm.engine.eager import EagerExecutor
from autobot_llm.engine.executor import Executor
from autobot_llm.engine.kernels.cpu import build
from autobot_llm.engine.kernels.cpu.build import CannotCompileError, load_library
from autobot_llm.engine.kernels.cpu.compiled import CompiledExecutor, fastest_num_threads
from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.models.decoder import Decoder
from autobot_llm.engine.models.weights import load_weights
from autobot_llm.engine.sequence import SamplingParams, Sequence

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler on this machine")

BLOCK_SIZE = 16
NUM_BLOCKS = 64
MAX_TOKENS = 64
MAX_LEN = 256

FAMILIES = {
    "llama": {},
    "llama-biased": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "mistral": {"sliding_window": 20},
    "qwen2": {},
    "qwen3": {},
}


def compiled(
    folder: Path,
    cache_dir: Path,
    num_threads: int = 2,
    flags: tuple[str, ...] = build.FLAGS,
    max_tokens: int = MAX_TOKENS,
) -> CompiledExecutor:
    config = load_config(folder)
    weights = load_weights(folder, config, dtype=None, device="cpu")
    return CompiledExecutor(
        config,
        weights,
        load_library(cache_dir, flags),
        num_blocks=NUM_BLOCKS,
        max_tokens=max_tokens,
        max_model_len=MAX_LEN,
        num_threads=num_threads,
    )


def eager(folder: Path) -> EagerExecutor:
    config = load_config(folder)
    weights = load_weights(folder, config, dtype=torch.float32, device="cpu")
    attention = SdpaAttention(config, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, dtype=torch.float32, device="cpu")
    return EagerExecutor(Decoder(config, weights), attention, reason="the slow twin")


def sequence(token_ids: list[int], block_ids: list[int]) -> Sequence:
    made = Sequence(0, token_ids, SamplingParams(max_tokens=1))
    made.block_ids = block_ids
    return made


def run(executor: Executor, *parts: tuple[Sequence, int, int]) -> np.ndarray:
    """One step over (sequence, start, stop) parts; the logits of each part's last token."""
    scheduled = [ScheduledSequence(s, start, stop - start, True) for s, start, stop in parts]
    return executor.execute(build_batch(scheduled, BLOCK_SIZE)).numpy().copy()


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, kernels: Path) -> Iterator[CompiledExecutor]:
    folder = tmp_path_factory.mktemp("llama")
    write_random_model(folder, "llama")
    executor = compiled(folder, kernels)
    yield executor
    executor.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_compiled_step_computes_what_torch_computes(family: str, dtype: str, tmp_path: Path, kernels: Path) -> None:
    write_random_model(tmp_path, family.split("-")[0], dtype=dtype, **FAMILIES[family])
    fast, slow = compiled(tmp_path, kernels), eager(tmp_path)
    rng = np.random.default_rng(7)
    vocab_size = load_config(tmp_path).vocab_size
    blocks = rng.permutation(NUM_BLOCKS).tolist()
    one = sequence(rng.integers(0, vocab_size, 120).tolist(), blocks[:8])
    other = sequence(rng.integers(0, vocab_size, 90).tolist(), blocks[8:14])
    steps = [
        [(one, 0, 50)],
        [(one, 50, 51), (other, 0, 33)],
        [(one, 51, 52), (other, 33, 34)],
        [(one, 52, 90), (other, 34, 60)],
    ]
    for parts in steps:
        np.testing.assert_allclose(run(fast, *parts), run(slow, *parts), atol=1e-4, rtol=0)
    fast.close()


# A context of any length, a tree after it, and two others in the step: the path to each of its tokens is computed again
# as a line, in one piece.
@pytest.mark.parametrize("is_compiled", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_every_token_of_a_tree_gets_what_its_path_gets_as_a_line(
    family: str, is_compiled: bool, tmp_path: Path, kernels: Path
) -> None:
    """The same bits in the compiled step, within rounding in torch; positions and windows go by depth. Once the
    accepted path is moved into line, the cache is what a line leaves, too."""
    write_random_model(tmp_path, family, **FAMILIES[family])
    executor = compiled(tmp_path, kernels, max_tokens=128) if is_compiled else eager(tmp_path)
    rng = random.Random(11)

    def check(found: np.ndarray, wanted: np.ndarray) -> None:
        if is_compiled:
            assert np.array_equal(found, wanted)
        else:
            np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)

    for num_nodes in (1, 9, 30, 63) if is_compiled else (40,):
        blocks = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)
        num_before = rng.randint(1, 45)
        context = [rng.randrange(1000) for _ in range(num_before + 1)]
        draft = guessed_tree(rng, [], 0, num_nodes, 1000)
        assert draft.parents is not None
        grown, line, prompt = (sequence(ids, [blocks.pop() for _ in range(8)]) for ids in (context, [7] * 21, [3] * 40))
        run(executor, (grown, 0, num_before), (line, 0, 20))
        grown.draft_ids, grown.draft_parents = draft.token_ids, draft.parents
        line.draft_ids = [5, 6]
        scheduled = [
            ScheduledSequence(line, 20, 3, True, 0, 2),
            ScheduledSequence(grown, num_before, 1 + num_nodes, True, 0, num_nodes),
            ScheduledSequence(prompt, 0, 9, True),
        ]
        batch = build_batch(scheduled, BLOCK_SIZE)
        assert batch.tree_masks_T is not None
        logits_RV = executor.execute(batch).numpy()[3:-1].copy()
        spare = [blocks.pop() for _ in range(8)]

        def as_line(token_ids: list[int], num_rows: int, spare: list[int] = spare) -> np.ndarray:
            """The logits of the last rows of a text."""
            alone = sequence(token_ids[: len(token_ids) - num_rows + 1], spare)
            alone.draft_ids = token_ids[len(token_ids) - num_rows + 1 :]
            item = ScheduledSequence(alone, 0, len(token_ids), True, 0, num_rows - 1)
            return executor.execute(build_batch([item], BLOCK_SIZE)).numpy().copy()

        for leaf in leaves(draft.parents):
            path = path_to(draft.parents, leaf)
            expected = as_line(context + [draft.token_ids[node] for node in path], 1 + len(path))
            check(logits_RV[[0, *(node + 1 for node in path)]], expected)

        path = max((path_to(draft.parents, leaf) for leaf in leaves(draft.parents)), key=len)
        plan = StepPlan(tuple(scheduled), batch.num_tokens, 9, num_nodes + 2)
        executor.move(*straighten(plan, batch, [[0, 1], path, []]))
        grown.token_ids += [*grown.draft_ids[: len(path)], 77]
        start = len(grown.token_ids) - 1
        check(run(executor, (grown, start, start + 1)), as_line(grown.token_ids, 1))
    executor.close()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 processors")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3"])
def test_a_processor_with_narrower_vectors_computes_the_same(processor: str, tmp_path: Path, kernels: Path) -> None:
    flags = tuple(f"-march={processor}" if flag.startswith("-march") else flag for flag in build.FLAGS)
    write_random_model(tmp_path, "llama", dtype="bfloat16")
    narrow, slow = compiled(tmp_path, kernels, flags=flags), eager(tmp_path)
    one = sequence(np.random.default_rng(1).integers(0, 1000, 40).tolist(), [5, 6, 7])
    for start, stop in ((0, 30), (30, 31), (31, 40)):
        np.testing.assert_allclose(run(narrow, (one, start, stop)), run(slow, (one, start, stop)), atol=1e-4, rtol=0)
    narrow.close()


# Lengths and cuts of up to six sequences, computed together in chunks, then each of them alone in one piece.
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    cuts=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_sequence_gets_the_same_bits_alone_and_in_any_company(
    llama: CompiledExecutor, lengths: list[int], cuts: list[int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    token_ids = [rng.integers(0, 1000, length).tolist() for length in lengths]

    def fresh() -> list[Sequence]:
        blocks = rng.permutation(NUM_BLOCKS).tolist()
        return [sequence(ids, [blocks.pop() for _ in range(-(-len(ids) // BLOCK_SIZE))]) for ids in token_ids]

    together: dict[int, np.ndarray] = {}
    waiting = [(s, 0) for s in fresh()]
    order = {id(s): i for i, (s, _) in enumerate(waiting)}
    turn = 0
    while waiting:
        budget, parts, rest = MAX_TOKENS, [], []
        for one, start in waiting:
            stop = min(len(one.token_ids), start + min(budget, cuts[turn % len(cuts)]))
            turn += 1
            if stop > start:
                parts.append((one, start, stop))
                budget -= stop - start
            if stop < len(one.token_ids):
                rest.append((one, stop))
        for (one, _, stop), logits in zip(parts, run(llama, *parts), strict=True):
            if stop == len(one.token_ids):
                together[order[id(one)]] = logits
        waiting = rest
    for i, one in enumerate(fresh()):
        alone = run(llama, (one, 0, len(one.token_ids)))[0]
        assert np.array_equal(alone, together[i])


def test_the_number_of_threads_changes_no_bit(tmp_path: Path, kernels: Path) -> None:
    write_random_model(tmp_path, "qwen3")
    token_ids = np.random.default_rng(3).integers(0, 1000, 40).tolist()
    results = []
    for num_threads in (1, 2, 3):
        executor = compiled(tmp_path, kernels, num_threads)
        one = sequence(token_ids, [3, 1, 2])
        results.append((run(executor, (one, 0, 39)), run(executor, (one, 39, 40))))
        executor.close()
    for first, second in results[1:]:
        assert np.array_equal(first, results[0][0])
        assert np.array_equal(second, results[0][1])


def test_a_nan_left_in_a_freed_block_reaches_nobody(llama: CompiledExecutor) -> None:
    """The new owner's masked positions must not multiply what an earlier owner left behind."""
    token_ids = np.random.default_rng(5).integers(0, 1000, 5).tolist()
    clean = run(llama, (sequence(token_ids, [0]), 0, 5))
    llama.cache.keys_LBKDP.fill_(np.nan)
    llama.cache.values_LBKPD.fill_(np.nan)
    try:
        assert np.array_equal(run(llama, (sequence(token_ids, [0]), 0, 5)), clean)
    finally:
        llama.cache.keys_LBKDP.zero_()
        llama.cache.values_LBKPD.zero_()


def test_a_head_size_the_kernel_does_not_cover_is_refused_with_its_reason(tmp_path: Path, kernels: Path) -> None:
    write_random_model(tmp_path, "llama", head_dim=24)
    with pytest.raises(CannotCompileError, match="head size 24 is not a multiple of 16"):
        compiled(tmp_path, kernels)


def test_the_library_is_built_once_and_kept(tmp_path: Path) -> None:
    load_library(tmp_path)
    built = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kernels").iterdir()}
    load_library(tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kernels").iterdir()} == built
    assert len(built) == 2, "the library and its digest"


def test_a_cache_that_cannot_be_written_costs_a_build_and_no_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "a file where the folder should be"
    blocked.write_text("")
    assert load_library(blocked).autobot_panel_width() > 0
    assert "cannot be kept" in caplog.text


def test_a_damaged_library_in_the_cache_is_built_again(
    tmp_path: Path, kernels: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_library(kernels)
    shutil.copytree(build.library_path(kernels).parent, tmp_path / "kernels")
    path = build.library_path(tmp_path)
    path.write_bytes(path.read_bytes()[:20_000])
    assert load_library(tmp_path).autobot_panel_width() > 0
    assert "is damaged: building it again" in caplog.text


def test_processes_that_start_together_on_an_empty_cache_disturb_nobody(tmp_path: Path) -> None:
    program = (
        "import sys, logging, pathlib; logging.basicConfig(); "
        "from autobot_llm.engine.kernels.cpu.build import load_library; "
        "print(load_library(pathlib.Path(sys.argv[1])).autobot_panel_width())"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in started:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, "")
        assert int(out) > 0
    assert sorted(path.suffix for path in (tmp_path / "kernels").iterdir()) == [".sha256", ".so"]


@pytest.mark.parametrize("body", ["exit 1", "echo broken >&2; exit 1"])
def test_a_compiler_that_fails_is_named(body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo 1; exit 0; fi\n{body}\n')
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(CannotCompileError, match="broken-c\\+\\+ failed on step.cpp"):
        load_library(tmp_path)


@pytest.mark.parametrize(
    ("trials", "chosen", "num_tried"),
    [
        ({1: 10.0, 2: 6.0, 4: 5.9, 8: 9.0, 16: 1.0}, 2, 4),  # 4 hardly better than 2; 8 so bad that 16 is not tried
        ({1: 10.0, 2: 11.0, 4: 4.0, 6: 3.0}, 6, 4),  # one bad trial does not end the search; the limit is tried
        ({1: 1.0}, 1, 1),
    ],
)
def test_the_fewest_threads_that_are_as_quick_as_any_are_chosen(
    trials: dict[int, float], chosen: int, num_tried: int
) -> None:
    asked = []

    def seconds_with(num_threads: int) -> float:
        asked.append(num_threads)
        return trials[num_threads]

    assert fastest_num_threads(seconds_with, limit=max(trials)) == chosen
    assert asked == sorted(trials)[:num_tried]
