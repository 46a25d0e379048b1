"""A device that computes beside the host, in plain Python: a stand-in for a GPU where timing is what is tested.

Its model is a function of the whole context as it finds it in the paged cache, so a token that was sampled from wrong,
missing or overwritten content is another one. A `lazy` device computes as late as it may, when somebody waits:
whatever the host changes after a launch, it would see. The other computes at once: whatever comes late, it misses.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from autobot_llm.engine.batching.plan import Int64Array, StepBatch
from autobot_llm.engine.executor import Features, LaunchedStep, SampledRows, SamplingArrays, Unverified
from autobot_llm.engine.kv_cache.block_pool import BlockPool
from autobot_llm.engine.noise import exponential_noise

VOCAB_SIZE = 40
NOTHING = -7  # what a blank cache holds
FIRST_DRAFT_ROW = 1000  # from there on, pending rows are those of a chain


@lru_cache(maxsize=100_000)
def logits_of(context: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The model: logits_V after these tokens."""
    seed = hash(context) & 0xFFFFFFFF
    return np.random.default_rng(seed).standard_normal(VOCAB_SIZE).astype(np.float32) * 2


class FakeDevice:
    """Executor and BlockCopier. Steps and copies take effect in the order of their calls."""

    name = "fake"
    reason = "a test"

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.cache = [NOTHING] * (num_blocks * block_size)
        self.block_size = block_size
        self.pool: BlockPool | None = None
        """Where given, every write is checked against it: one owner, and nothing that others may find."""
        self.window = 0
        """So many tokens its model looks back; 0: it sees everything."""
        self.is_closed = False

    def execute(self, batch: StepBatch) -> torch.Tensor:
        self.check_writes(batch)
        assert (batch.pending_rows_T == -1).all(), "every token is known to a step whose logits are wanted"
        return torch.from_numpy(self.compute(batch, []))

    def discard(self, block_ids: list[int]) -> None:
        for block_id in block_ids:
            self.cache[self.slots(block_id)] = [NOTHING] * self.block_size

    def close(self) -> None:
        self.is_closed = True

    def copy_out(self, block_ids: Sequence[int]) -> HostBlocks:
        copied = HostBlocks()
        self.do(copied.fill, self, list(block_ids))
        return copied

    def copy_in(self, swapped: Any, block_ids: Sequence[int]) -> None:
        self.do(swapped.write, self, list(block_ids))

    def do(self, act: Callable[..., None], *arguments: Any) -> None:
        act(*arguments)

    def slots(self, block_id: int) -> slice:
        return slice(block_id * self.block_size, (block_id + 1) * self.block_size)

    def check_writes(self, batch: StepBatch) -> None:
        if self.pool is None:
            return
        blocks = set((batch.slots_T // self.block_size).tolist())
        for block_id in blocks:
            assert self.pool.num_references(block_id) == 1, "a block that is written has one owner"
            assert self.pool._entry_of[block_id] is None, "a published block is never written"

    # S sequences, T packed tokens, R rows whose logits are wanted, V vocabulary
    def compute(self, batch: StepBatch, last_tokens: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Write the step's tokens into the cache, and look at every position of every context."""
        logits_TV: dict[int, Any] = {}
        for s, (first, end) in enumerate(itertools.pairwise(batch.query_starts.tolist())):
            num_positions = int(batch.context_lens[s])
            num_evicted = int(batch.positions_T[first]) - (num_positions - (end - first))
            assert num_evicted == 0 or (self.window and num_evicted > 0)
            for t in range(first, end):
                pending = int(batch.pending_rows_T[t])
                token = self.pending_token(pending, last_tokens) if pending >= 0 else int(batch.ids_T[t])
                assert (pending >= 0) == (batch.ids_T[t] == -1)
                self.cache[batch.slots_T[t]] = token
            table = batch.block_tables_SB[s]
            context = [self.cache[table[p // self.block_size] * self.block_size + p % self.block_size]
                       for p in range(num_positions)]  # fmt: skip
            for t in range(first, end):
                seen = self.seen_by(batch, t, first, num_positions - (end - first))
                assert batch.positions_T[t] == len(seen) - 1 + num_evicted
                logits_TV[t] = logits_of(tuple([context[i] for i in seen][-self.window :]))
        return np.array([logits_TV[row] for row in batch.logit_rows_R.tolist()], np.float32).reshape(-1, VOCAB_SIZE)

    def pending_token(self, row: int, last_tokens: list[int]) -> int:
        return last_tokens[row]

    def seen_by(self, batch: StepBatch, token: int, first: int, num_before: int) -> Sequence[int]:
        """Which of its sequence's cached tokens a token of the step sees; `num_before` of them lie before `first`."""
        assert batch.tree_masks_T is None, "a tree for a device that knows none"
        return range(num_before + token - first + 1)


class FakeTreeDevice(FakeDevice):
    """TreeExecutor over the same model."""

    num_moves = 0

    def seen_by(self, batch: StepBatch, token: int, first: int, num_before: int) -> Sequence[int]:
        mask = 0 if batch.tree_masks_T is None else int(batch.tree_masks_T[token])
        if mask == 0:
            return range(num_before + token - first + 1)
        assert mask >> (token - first) == 1, "a token sees itself, and none that comes later"
        return [*range(num_before), *(num_before + j for j in range(64) if mask >> j & 1)]

    def move(self, slots_from_M: Int64Array, slots_to_M: Int64Array) -> None:
        for slot_to in slots_to_M.tolist():
            assert self.pool is None or self.pool.num_references(slot_to // self.block_size) == 1
            assert self.pool is None or self.pool._entry_of[slot_to // self.block_size] is None
        self.num_moves += len(slots_to_M)
        self.do(self._move, slots_from_M.tolist(), slots_to_M.tolist())

    def _move(self, slots_from: list[int], slots_to: list[int]) -> None:
        for slot_from, slot_to in zip(slots_from, slots_to, strict=True):
            self.cache[slot_to] = self.cache[slot_from]


class HostBlocks:
    """Copied blocks, once the device has come to it."""

    def __init__(self) -> None:
        self.content: list[list[int]] | None = None

    def fill(self, device: FakeDevice, block_ids: list[int]) -> None:
        self.content = [device.cache[device.slots(block_id)] for block_id in block_ids]

    def write(self, device: FakeDevice, block_ids: list[int]) -> None:
        assert self.content is not None and len(block_ids) == len(self.content)
        for block_id, content in zip(block_ids, self.content, strict=True):
            device.cache[device.slots(block_id)] = content


@dataclass(eq=False)
class _Launched:
    device: FakePipelinedDevice
    num_rows: int
    features = Features()
    sampled: SampledRows | None = None
    error: Exception | None = None
    is_waited_for: bool = False

    def wait(self) -> SampledRows:
        assert not self.is_waited_for, "a step is waited for once"
        self.is_waited_for = True
        while self.sampled is None and self.error is None:
            self.device.work()
        self.device.num_unwaited -= 1
        if self.error is not None:
            raise self.error
        assert self.sampled is not None
        return self.sampled


@dataclass(eq=False)
class _LaunchedChain(_Launched):
    rows: Any = None
    seconds: float = 0.0

    def wait(self) -> SampledRows:
        self.device.num_unwaited += 1  # nobody has to wait for a chain
        return super().wait()


class FakePipelinedDevice(FakeDevice):
    """PipelinedExecutor over the same model. `fault(step number, logits_RV)` may raise or spoil the logits."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        lazy: bool = True,
        fault: Callable[[int, Any], None] | None = None,
    ) -> None:
        super().__init__(num_blocks, block_size)
        self.lazy = lazy
        self.fault = fault
        self.num_launched = 0
        self.num_unwaited = 0
        self.most_unwaited = 0
        self.last_tokens: list[int] = []
        self.draft_tokens: list[int] = []
        """What a chain of a draft has left here."""
        self._queue: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()

    def launch(self, batch: StepBatch, sampling: SamplingArrays) -> LaunchedStep:
        self.check_writes(batch)
        assert not sampling.any_drawn or len(sampling.is_drawn_R) == len(batch.logit_rows_R)
        step = _Launched(self, len(batch.logit_rows_R))
        self.num_unwaited += 1
        self.most_unwaited = max(self.most_unwaited, self.num_unwaited)
        self.do(self._run, step, batch, sampling, self.num_launched)
        self.num_launched += 1
        return step

    def pending_token(self, row: int, last_tokens: list[int]) -> int:
        return self.draft_tokens[row - FIRST_DRAFT_ROW] if row >= FIRST_DRAFT_ROW else last_tokens[row]

    def room_for_drafts(self, num_sequences: int) -> int:
        return max(0, 12 - num_sequences)

    def execute(self, batch: StepBatch) -> torch.Tensor:
        assert self.num_unwaited == 0, "logits are asked for while a step is under way"
        self.drain()
        return super().execute(batch)

    def discard(self, block_ids: list[int]) -> None:
        self.do(super().discard, block_ids)

    def close(self) -> None:
        assert self.num_unwaited == 0, "closed while a step is under way"
        super().close()

    def do(self, act: Callable[..., None], *arguments: Any) -> None:
        self._queue.append((act, arguments))
        if not self.lazy:
            self.drain()

    def work(self) -> None:
        act, arguments = self._queue.popleft()
        act(*arguments)

    def drain(self) -> None:
        while self._queue:
            self.work()

    def _run(self, step: _Launched, batch: StepBatch, sampling: SamplingArrays, number: int) -> None:
        logits_RV = self.compute(batch, self.last_tokens)
        try:
            if self.fault is not None:
                self.fault(number, logits_RV)
        except Exception as error:
            step.error = error
            self.last_tokens = [0] * step.num_rows
            return
        tokens = [sample(logits_V, sampling, r) for r, logits_V in enumerate(logits_RV)]
        self.last_tokens = tokens
        step.sampled = SampledRows(tokens, [float(logits_V.max()) for logits_V in logits_RV])


class FakeChainDevice(FakePipelinedDevice):
    """ChainExecutor over the same model, in the queue of its target. Its passes are plain steps, in a row."""

    def __init__(self, num_blocks: int, block_size: int, target: FakePipelinedDevice, most_missing: int = 4) -> None:
        super().__init__(num_blocks, block_size, lazy=target.lazy)
        self._target = target
        self._queue = target._queue
        self._most_missing = most_missing
        self.num_chains = self.num_behind = self.num_before = 0

    def takes_chain(self, num_missing: Sequence[int], num_passes: int) -> bool:
        return max(num_missing) <= self._most_missing

    def launch_chain(
        self,
        batch: StepBatch,
        sampling: SamplingArrays,
        num_passes: int,
        after: Unverified | None = None,
        before: Sequence[StepBatch] = (),
    ) -> _LaunchedChain:
        for one in (*before, batch):
            assert (one.pending_rows_T == -1).all()
            self.check_writes(one)
            if one is not batch:
                assert not len(one.logit_rows_R), "nobody samples from it"
                self.do(self.compute, one, [])
        num_sequences = batch.num_sequences
        step = _LaunchedChain(self, num_passes * num_sequences)
        step.rows = FIRST_DRAFT_ROW + np.arange(step.num_rows)
        self.num_chains += 1
        self.num_before += len(before)
        self.num_behind += after is not None
        self.do(self._run_chain, step, batch, sampling, num_passes, after)
        return step

    def _run_chain(
        self,
        step: _Launched,
        batch: StepBatch,
        sampling: SamplingArrays,
        num_passes: int,
        after: Unverified | None,
    ) -> None:
        found: list[int] = []
        bests: list[float] = []
        num_right_S = np.zeros(batch.num_sequences, np.int32)
        if after is not None:
            batch, num_right_S = self._moved_on(batch, after)
        for number in range(num_passes):
            logits_RV = self.compute(batch, [])
            if self.fault is not None:
                self.fault(number, logits_RV)
            rows = [(number + num_right) * len(num_right_S) + s for s, num_right in enumerate(num_right_S.tolist())]
            tokens = [sample(logits_V, sampling, row) for row, logits_V in zip(rows, logits_RV, strict=True)]
            found += tokens
            bests += [float(logits_V.max()) for logits_V in logits_RV]
            batch = _one_later(batch, tokens, self.block_size)
        self._target.draft_tokens = found
        step.sampled = SampledRows(found, bests)

    def _moved_on(self, batch: StepBatch, after: Unverified) -> tuple[StepBatch, np.ndarray[Any, Any]]:
        """The batch as the verdict of the target's last step leaves it, and how many drafts were right."""
        ids_T = batch.ids_T.copy()
        num_right_S = np.zeros(batch.num_sequences, np.int32)
        for s, (first, rows) in enumerate(zip(after.first_rows_S.tolist(), after.draft_rows_SN.tolist(), strict=True)):
            drafts = [self._target.draft_tokens[row - FIRST_DRAFT_ROW] for row in rows]
            chosen = self._target.last_tokens[first : first + len(drafts) + 1]
            pairs = zip(drafts, chosen, strict=False)
            number = num_right_S[s] = next((i for i, (one, other) in enumerate(pairs) if one != other), len(drafts))
            assert ids_T[2 * s + 1] == -1
            ids_T[2 * s : 2 * s + 2] = [drafts[number - 1] if number else ids_T[2 * s], chosen[number]]
        positions_T = batch.positions_T + num_right_S.repeat(2)
        tables_SB, size = batch.block_tables_SB, self.block_size
        blocks_T = tables_SB[np.arange(batch.num_sequences).repeat(2), positions_T // size].astype(np.int64)
        moved = dataclasses.replace(
            batch,
            ids_T=ids_T,
            positions_T=positions_T,
            slots_T=blocks_T * size + positions_T % size,
            context_lens=batch.context_lens + num_right_S,
        )
        return moved, num_right_S


def _one_later(batch: StepBatch, tokens: list[int], block_size: int) -> StepBatch:
    """The pass over the tokens that a pass has sampled."""
    places, num_sequences = batch.context_lens, batch.num_sequences
    blocks = np.array([batch.block_tables_SB[s, place // block_size] if place // block_size
                       < batch.block_tables_SB.shape[1] else 0 for s, place in enumerate(places)])  # fmt: skip
    return StepBatch(
        ids_T=np.array(tokens, np.int64),
        positions_T=places.astype(np.int32),
        slots_T=blocks.astype(np.int64) * block_size + places % block_size,
        query_starts=np.arange(num_sequences + 1, dtype=np.int32),
        context_lens=places + np.int32(1),
        block_tables_SB=batch.block_tables_SB,
        logit_rows_R=np.arange(num_sequences),
        pending_rows_T=np.full(num_sequences, -1, np.int32),
    )


def sample(logits_V: Any, sampling: SamplingArrays, row: int) -> int:
    """One row as a device would, unrestricted."""
    if not sampling.any_drawn or not sampling.is_drawn_R[row]:
        return int(logits_V.argmax())
    weights_V = np.exp((logits_V - logits_V.max()) / sampling.temperature_R[row])
    noise_V = exponential_noise(sampling.keys_R[row : row + 1, None], np.arange(len(logits_V)))[0]
    return int((weights_V / noise_V).argmax())
