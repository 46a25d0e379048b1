"""Arrays that kernels carry between page-locked memory and the device."""

from __future__ import annotations

import torch

from autobot_llm.engine.kernels.gpu.exchange import NUM_SLOTS, fetch, send


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.pin_memory() if device.type == "cuda" else tensor


def test_each_fetch_reads_the_next_slot_of_the_ring(device: torch.device) -> None:
    ring = pinned(torch.randint(-(2**31), 2**31 - 1, (NUM_SLOTS, 10_000), dtype=torch.int32), device)
    turn = torch.zeros(2, dtype=torch.int32, device=device)
    for step, num_words in enumerate((10_000, 1, 4096, 4097, 9_999, 10_000, 77)):
        out = torch.full((10_000,), -1, dtype=torch.int32, device=device)
        fetch(ring, turn, out, num_words)
        assert torch.equal(out[:num_words].cpu(), ring[step % NUM_SLOTS, :num_words].cpu())
        assert bool((out[num_words:] == -1).all()), "words past the wanted ones were written"
    assert turn.tolist() == [7 % NUM_SLOTS, 0]


def test_a_slot_that_was_filled_again_is_read_again(device: torch.device) -> None:
    ring = pinned(torch.zeros((NUM_SLOTS, 16), dtype=torch.int32), device)
    turn = torch.zeros(2, dtype=torch.int32, device=device)
    out = torch.empty(16, dtype=torch.int32, device=device)
    for step in range(3 * NUM_SLOTS):
        ring[step % NUM_SLOTS] = step
        fetch(ring, turn, out, 16)
        assert out.tolist() == [step] * 16


def test_tokens_arrive_in_host_memory(device: torch.device) -> None:
    tokens, bests = torch.arange(300, dtype=torch.int32, device=device), torch.randn(300, device=device)
    tokens_out = pinned(torch.full((300,), -1, dtype=torch.int32), device)
    bests_out = pinned(torch.zeros(300), device)
    send(tokens, bests, tokens_out, bests_out, 290)
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(tokens_out[:290], tokens[:290].cpu()) and torch.equal(bests_out[:290], bests[:290].cpu())
    assert bool((tokens_out[290:] == -1).all())
