"""How fast a model folder reaches the GPU, beside what limits it and what others take. Needs a CUDA device.

    python benchmarks/loading_gpu.py FOLDER

Rows, in GB of the files per second, medians of --repeats turns that the methods take one after another:
  pinned copy   one buffer of page-locked memory to the device, the limit of any loader
  read alone    our readers, into their buffers and no further
  load          autobot_llm's load_weights
  safetensors   safetensors.torch.load_file(device="cuda"), file by file, without fusing anything
`warm` is from the page cache, `cold` after the system was asked to drop the files from it; the share that was still
cached is shown, because a file in memory (tmpfs) has no other place. Prints a table, and one JSON line at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from autobot_llm.engine.models.checkpoint import open_checkpoint
from autobot_llm.engine.models.config import ModelConfig, load_config
from autobot_llm.engine.models.transfer import (
    CudaTransport,
    HostTransport,
    Staged,
    Transfer,
    Transport,
    carry,
    plan_spans,
)
from autobot_llm.engine.models.weights import MAX_READERS, SPAN_BYTES, expected_shapes, load_weights

PINNED_BYTES = 2**30
PAGE_BYTES = 4096
NUM_SAMPLES = 200  # pages per file that are looked up in the page cache
SWEEP = [(readers, mib) for readers in (1, 2, 4, 8, 16) for mib in (4, 8, 32)]


class ReadAlone(HostTransport):
    """A device that takes nothing."""

    def copy(self, stored: torch.Tensor, target: torch.Tensor) -> None:
        pass


def cuda_transport() -> CudaTransport:
    return CudaTransport(torch.device("cuda"))


class Folder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: ModelConfig = load_config(path)
        self.files = sorted(path.glob("*.safetensors"))
        self.num_bytes = sum(file.stat().st_size for file in self.files)

    def drop_from_page_cache(self) -> None:
        os.sync()  # what is not written yet cannot be dropped
        for file in self.files:
            with file.open("rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def share_in_page_cache(self) -> float | None:
        """By pages that can be read without waiting; None where the system does not say."""
        found = []
        for path in self.files:
            with path.open("rb") as file:
                step = max(1, path.stat().st_size // NUM_SAMPLES // PAGE_BYTES) * PAGE_BYTES
                for offset in range(0, path.stat().st_size, step):
                    try:
                        found.append(os.preadv(file.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT) == 1)
                    except BlockingIOError:
                        found.append(False)
                    except OSError:
                        return None
        return sum(found) / len(found)

    def read_with(self, make: Callable[[], Transport], num_readers: int, span_bytes: int) -> dict[str, torch.Tensor]:
        """Every stored tensor by itself, on the device."""
        shapes = expected_shapes(self.config)
        checkpoint = open_checkpoint(self.path, shapes, model_type=self.config.model_type)
        targets = {
            name: torch.empty(stored.shape, dtype=stored.dtype, device="cuda")
            for name, stored in checkpoint.tensors.items()
        }
        transfers = [Transfer(checkpoint.tensors[name], target) for name, target in targets.items()]
        carry(plan_spans(transfers, span_bytes), [Staged(make(), span_bytes) for _ in range(num_readers)])
        return targets


def seconds_of(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # each method allocates for itself
    start = time.perf_counter()
    kept = work()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    del kept
    return seconds


def pinned_copy_rate() -> float:
    source = torch.randint(0, 255, (PINNED_BYTES,), dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device="cuda")
    times = [seconds_of(lambda: target.copy_(source, non_blocking=True)) for _ in range(6)]
    return PINNED_BYTES / statistics.median(times[1:])


def methods(folder: Folder) -> dict[str, Callable[[], object]]:
    device = torch.device("cuda")
    num_readers = min(MAX_READERS, os.cpu_count() or 1)
    return {
        "read alone": lambda: folder.read_with(ReadAlone, num_readers, SPAN_BYTES),
        "load": lambda: load_weights(folder.path, folder.config, dtype=None, device=device),
        "safetensors": lambda: [safetensors.torch.load_file(file, device="cuda") for file in folder.files],
    }


def refuse_other_values(folder: Folder) -> None:
    """The two loaders agree on every tensor."""
    ours = folder.read_with(cuda_transport, MAX_READERS, SPAN_BYTES)
    for file in folder.files:
        for name, theirs in safetensors.torch.load_file(file, device="cuda").items():
            if name in ours and not torch.equal(ours[name].view(torch.uint8), theirs.view(torch.uint8)):
                raise SystemExit(f"{file}: {name} differs from what safetensors reads")


def measure(folder: Folder, repeats: int) -> dict[str, list[float]]:
    """Seconds by method and state of the page cache."""
    refuse_other_values(folder)  # and everything is compiled, allocated once and cached
    times: dict[str, list[float]] = {}
    for state in ("warm", "cold"):
        for _ in range(repeats):
            for name, work in methods(folder).items():
                if state == "cold":
                    folder.drop_from_page_cache()
                times.setdefault(f"{name}, {state}", []).append(seconds_of(work))
    return times


def sweep(folder: Folder) -> dict[str, float]:
    """Bytes per second by number of readers and size of a buffer, warm; the better of two."""
    rates = {}
    for num_readers, mib in SWEEP:
        work = partial(folder.read_with, cuda_transport, num_readers, mib * 2**20)
        rates[f"{num_readers} readers, {mib} MiB"] = folder.num_bytes / min(seconds_of(work), seconds_of(work))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a Hugging Face model folder; of some GB, to measure anything")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each method (default 3)")
    parser.add_argument("--sweep", action="store_true", help="also other numbers of readers and sizes of buffers")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this torch sees no GPU")
    folder = Folder(arguments.folder)
    limit = pinned_copy_rate()
    times = measure(folder, arguments.repeats)
    folder.drop_from_page_cache()
    still_cached = folder.share_in_page_cache()

    device = torch.cuda.get_device_name()
    print(f"{folder.path.name}: {folder.num_bytes / 1e9:.2f} GB in {len(folder.files)} files, {device}")
    print(f"{'':28}{'seconds':>9}{'GB/s':>9}{'of a pinned copy':>19}")
    print(f"{'pinned copy':28}{folder.num_bytes / limit:9.2f}{limit / 1e9:9.2f}{'100%':>19}")
    for name, seconds in times.items():
        rate = folder.num_bytes / statistics.median(seconds)
        print(f"{name:28}{statistics.median(seconds):9.2f}{rate / 1e9:9.2f}{rate / limit:19.0%}")
    cached = "unknown" if still_cached is None else f"{still_cached:.0%}"
    print(f"still in the page cache when cold: {cached}")
    rates = sweep(folder) if arguments.sweep else {}
    for name, rate in rates.items():
        print(f"{name:28}{folder.num_bytes / rate:9.2f}{rate / 1e9:9.2f}{rate / limit:19.0%}")
    result: dict[str, Any] = {
        "benchmark": "loading_gpu",
        "device": device,
        "num_cores": os.cpu_count(),
        "model": folder.path.name,
        "num_bytes": folder.num_bytes,
        "pinned_copy_bytes_per_second": limit,
        "seconds": times,
        "share_still_cached_when_cold": still_cached,
        "sweep_bytes_per_second": rates,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
