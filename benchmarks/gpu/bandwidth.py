"""How fast this device reads its memory: the ceiling of whatever is bound by it. Measured, like all else here."""

from __future__ import annotations

import statistics

import torch
import triton
import triton.language as tl

NUM_BYTES = 2 << 30  # far more than any cache holds
NUM_ROUNDS = 15
_BLOCK = 8192


@triton.jit
def _sum_kernel(x_ptr, out_ptr, num_blocks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each program adds up every so many blocks, and writes one number."""
    sums = tl.zeros((BLOCK,), tl.float32)
    offsets = tl.arange(0, BLOCK)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        sums += tl.load(x_ptr + block.to(tl.int64) * BLOCK + offsets, eviction_policy="evict_first")
    tl.store(out_ptr + tl.program_id(0), tl.sum(sums))


def measured_read_bandwidth(device: torch.device) -> float:
    """Bytes per second that a kernel reads which does nothing else: the best of a few launch sizes, each a median.

    Takes 2 GiB of the device for a moment.
    """
    x = torch.randn(NUM_BYTES // 4, device=device)
    num_processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(NUM_BYTES / _seconds(x, num_each * num_processors) for num_each in (1, 2, 4, 8))


def _seconds(x: torch.Tensor, num_programs: int) -> float:
    out = torch.full((num_programs,), float("nan"), device=x.device)

    def read() -> None:
        _sum_kernel[(num_programs,)](x, out, x.numel() // _BLOCK, BLOCK=_BLOCK, num_warps=8)

    read()
    error = abs(float(out.double().sum()) - float(x.double().sum())) / x.numel()
    assert error < 1e-3, "not everything was read"
    times = []
    for _ in range(NUM_ROUNDS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        read()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)
