"""What runs a step on a device. Knows a step's arrays, logits and sampled tokens; knows nothing of scheduling.

Two ways to use one: `execute` gives logits to a sampler on the host, and every executor has it. A device that works
beside the host also has `launch`: it samples by itself, and the host prepares the next step meanwhile, with tokens that
it does not know yet (`StepBatch.pending_rows_T`).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from autobot_llm.engine.batching.plan import Int32Array, Int64Array, StepBatch
from autobot_llm.engine.batching.preemption import BlockCopier

Float32Array = npt.NDArray[np.float32]


# R rows whose logits are wanted, V vocabulary
class Executor(Protocol):
    """Computes a batch, writing its keys and values into the paged cache, and returns the wanted rows' logits."""

    name: str
    reason: str
    """Why this executor was chosen, for the start-up line and the report."""

    def execute(self, batch: StepBatch) -> torch.Tensor:
        """Run one step. Returns float32 logits_RV, valid until the next call."""
        ...

    def discard(self, block_ids: list[int]) -> None:
        """See to it that nothing these blocks hold, be it NaN, reaches their next owner."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class HiddenExecutor(Executor, Protocol):
    """An executor that can also tell what a step's last layer made of its tokens, which embeddings are pooled from."""

    def hidden(self, batch: StepBatch) -> torch.Tensor:
        """Run one step as `execute` does. Returns, after the last norm, float32 hidden_RE (E hidden size) of the rows
        whose logits `execute` would compute, valid until the next call."""
        ...


@runtime_checkable
class TreeExecutor(Executor, Protocol):
    """An executor that computes trees of drafts (`StepBatch.tree_masks_T`), and can bring the right path into line.
    Others get lines only."""

    def move(self, slots_from_M: Int64Array, slots_to_M: Int64Array) -> None:
        """Copy the keys and values of M slots to others, in every layer, one after the other or all at once: no slot
        is written that is yet to be read."""
        ...


@dataclass(frozen=True, slots=True)
class FeatureKinds:
    """What a step is to keep of its work, for whoever guesses on from it. `layers`: i is the stream that layer i
    reads, and the number of layers what the last one leaves, before the norm."""

    hidden: bool = False
    layers: tuple[int, ...] = ()


NO_FEATURES = FeatureKinds()


class Features(NamedTuple):
    """What a step kept: `hidden_RE` as of `HiddenExecutor`, and `streams_TF` of every token of the batch, the streams
    of the wanted layers side by side (F their number times E). None: not wanted. New tensors each time: float32 on a
    CPU, and on a GPU of the model's dtype and queued on the stream of the steps."""

    hidden_RE: torch.Tensor | None = None
    streams_TF: torch.Tensor | None = None


@runtime_checkable
class FeatureExecutor(Executor, Protocol):
    """An executor that can also keep features of a step, at the cost of copying them."""

    def execute_with_features(self, batch: StepBatch, wanted: FeatureKinds) -> tuple[torch.Tensor, Features]:
        """Run one step: the logits of `execute`, to the bit, and the features."""
        ...


@dataclass(frozen=True, slots=True)
class SamplingArrays:
    """How each of R rows is sampled by the device. Where `any_drawn` is false all are greedy, and the arrays are empty.

    A row with `is_drawn_R` false takes the best of its logits, the lowest id among equals; its other entries are
    neutral. The others are restricted in the order temperature, top_k, top_p, min_p as in sampler.py, and drawn with
    the noise of `keys_R` (noise.py). top_k 0, top_p 1 and min_p 0 are off; temperatures are above 0; a top_k that
    the vocabulary does not exceed is 0. `any_restricted`: some drawn row has one of the three.
    """

    any_drawn: bool
    any_restricted: bool
    is_drawn_R: npt.NDArray[np.bool_]
    temperature_R: Float32Array
    top_k_R: Int32Array
    top_p_R: Float32Array
    min_p_R: Float32Array
    keys_R: npt.NDArray[np.uint64]


class SampledRows(NamedTuple):
    """What a step sampled. A row whose best logit (the maximum, NaN if any is NaN) is not finite has no valid token."""

    tokens: list[int]
    best_logits: list[float]


class LaunchedStep(Protocol):
    """A step that the device computes, or has computed. `features` are what its executor was made to keep: tensors that
    the device fills, and that stay as they are whatever is launched later."""

    features: Features

    def wait(self) -> SampledRows:
        """Block until its sampled tokens are on the host; called once. Raises what the device raised."""
        ...


@runtime_checkable
class PipelinedExecutor(Executor, Protocol):
    """An executor that computes and samples beside the host.

    Launched steps, `execute`, `discard` and block copies take effect in the order of their calls. At most one step
    is neither waited for nor the last one launched. `execute` is called only while every launched step was waited
    for.
    """

    def launch(self, batch: StepBatch, sampling: SamplingArrays) -> LaunchedStep:
        """Queue a step and return at once. The arrays are the callee's: nobody changes them afterwards."""
        ...

    def room_for_drafts(self, num_sequences: int) -> int:
        """Draft tokens that a step of so many decoding sequences may have beside their own."""
        ...


class Unverified(NamedTuple):
    """The drafts of the target's step that was launched last: the rows of it that hold each sequence's choice after its
    last known token, and the rows of the N drafts that the next N choices are compared with."""

    first_rows_S: npt.NDArray[np.int64]
    draft_rows_SN: npt.NDArray[np.int64]


class LaunchedChain(LaunchedStep, Protocol):
    """Passes one after the other: `wait` gives S rows for each of them, the first pass first. `rows` are the target's
    rows of the same tokens, for its steps; `seconds` is what the device took, and known once it was waited for."""

    rows: npt.NDArray[np.int64]
    seconds: float


@runtime_checkable
class ChainExecutor(PipelinedExecutor, Protocol):
    """An executor of a draft that can go on from its own tokens, and shares a device's queue with the target's: steps
    of that which are launched later find the tokens there before anybody else knows them."""

    def takes_chain(self, num_missing: SequenceABC[int], num_passes: int) -> bool:
        """Whether so many passes can be launched as one, the first of them over so many tokens of each sequence."""
        ...

    def launch_chain(
        self,
        batch: StepBatch,
        sampling: SamplingArrays,
        num_passes: int,
        after: Unverified | None = None,
        before: SequenceABC[StepBatch] = (),
    ) -> LaunchedChain:
        """Queue a step that samples for each of its S sequences, whose tokens are all known, and after it a pass over
        each token that was sampled, `num_passes` in all. The block tables hold what all of them write. `sampling` has S
        rows for each pass, the first pass first. `before`: steps that nobody samples from, to be computed first; their
        time is the chain's, too.

        With `after`, the batch holds two tokens of each sequence, its last known one and the one after that, which
        `first_rows_S` has: as if no draft were right. The device moves all of it on by as many as are. The tables hold
        what the passes write then, and `sampling` has rows for N passes more. Nobody has to wait for such a chain."""
        ...


@runtime_checkable
class SwappingExecutor(Executor, BlockCopier, Protocol):
    """An executor that can move blocks to host memory and back."""
