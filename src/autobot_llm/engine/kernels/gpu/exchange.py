"""A step's small arrays from page-locked host memory, and its tokens back to it, by kernels instead of copies. Knows
words and slots; knows nothing of their meaning.

A copy between two steps costs the device a pause several times as long as the copy: another engine has to be started
and waited for. A kernel of the step itself reads the same words over the bus. What it reads changes while its address
in a captured graph cannot, so the host fills the slots of a ring in turn, and the device counts along.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from autobot_llm.engine.kernels.gpu.launch import (
    launch_options,
    lean,
    let_next_kernel_start,
    wait_for_previous_kernel,
)

NUM_SLOTS = 3
"""One being filled, one on its way, one whose step may still be queued."""

_BLOCK = 4096  # words of a program


@lean
@triton.jit
def _fetch_kernel(  # type: ignore[no-untyped-def]
    ring_ptr, turn_ptr, out_ptr, slot_words, num_words, NUM_SLOTS: tl.constexpr, BLOCK: tl.constexpr
):
    # The next kernel may not start before this one has ended: later ones read their work lists before they wait.
    turn = tl.load(turn_ptr)
    words = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = words < num_words
    slot_ptr = ring_ptr + turn.to(tl.int64) * slot_words
    tl.store(out_ptr + words, tl.load(slot_ptr + words, inside, cache_modifier=".cv"), inside)
    tl.debug_barrier()
    if tl.atomic_add(turn_ptr + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(turn_ptr + 1, 0)
        tl.store(turn_ptr, (turn + 1) % NUM_SLOTS)


def fetch(ring: torch.Tensor, turn: torch.Tensor, out: torch.Tensor, num_words: int) -> None:
    """Copy the first words of the ring's slot turn[0] to `out`, and move on to the next slot.

    `ring` is [NUM_SLOTS, words] int32, page-locked; `turn` two int32 of the device, zeros at first.
    """
    assert ring.shape[0] == NUM_SLOTS and ring.is_contiguous() and num_words <= min(ring.shape[1], out.numel())
    _fetch_kernel[(triton.cdiv(num_words, _BLOCK),)](
        ring, turn, out, ring.shape[1], num_words, NUM_SLOTS=NUM_SLOTS, BLOCK=_BLOCK, num_warps=8
    )


@lean
@triton.jit(do_not_specialize=["num_rows"])
def _send_kernel(  # type: ignore[no-untyped-def]
    tokens_ptr, bests_ptr, tokens_out_ptr, bests_out_ptr, turn_ptr, slot_rows, num_rows,
    NUM_SLOTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_kernel_start(PDL)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < num_rows
    wait_for_previous_kernel(PDL)
    if turn_ptr is not None:  # it stands at the slot after the one that was fetched
        first_row = (tl.load(turn_ptr) + NUM_SLOTS - 1) % NUM_SLOTS * slot_rows
        tokens_out_ptr += first_row
        bests_out_ptr += first_row
    tl.store(tokens_out_ptr + rows, tl.load(tokens_ptr + rows, inside), inside)
    tl.store(bests_out_ptr + rows, tl.load(bests_ptr + rows, inside), inside)


def send(
    tokens_R: torch.Tensor,
    bests_R: torch.Tensor,
    tokens_out: torch.Tensor,
    bests_out: torch.Tensor,
    num_rows: int,
    *,
    turn: torch.Tensor | None = None,
) -> None:
    """Copy the first rows' tokens (int32) and best logits (float32) to page-locked memory, readable after an event.

    With the `turn` of `fetch`, the outputs are [NUM_SLOTS, rows], and what is written is the slot last fetched.
    """
    _send_kernel[(triton.cdiv(num_rows, 256),)](
        tokens_R,
        bests_R,
        tokens_out,
        bests_out,
        turn,
        tokens_out.shape[-1],
        num_rows,
        NUM_SLOTS=NUM_SLOTS,
        BLOCK=256,
        num_warps=4,
        **launch_options(tokens_R.device),
    )
