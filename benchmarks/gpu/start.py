"""From starting a process to the first token of its first answer, with a cold and with a warm kernel cache.

Each start is a fresh Python process that uses the public interface. "Cold" has empty folders for compiled kernels
(ours, Triton's and the driver's); "warm" is the same again. The weights are in the operating system's file cache if an
earlier section has read them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu.bench import Bench
from gpu.report import Clock, Report

TIMEOUT = 300.0  # seconds for one start
PARTS = ("imports", "weights", "preparation", "first_token")


def start(bench: Bench, clock: Clock, report: Report) -> None:
    bench.release()  # the other process needs the device's memory
    folder = bench.widened_model if bench.has_widened_model else bench.random_model
    table = report.table(
        f"Start to first answer, {folder.name} (s)",
        *("kernel cache", "imports", "weights", "profiling, kernels, graphs", "first token", "in all"),
    )
    with tempfile.TemporaryDirectory(prefix="kernel-caches-") as caches:
        for temperature in ("cold", "warm"):
            figures = start_once(folder, bench.device, Path(caches))
            report.figures[temperature] = figures
            table.add(temperature, *(figures[part] for part in PARTS), figures["total"])
    table.notes.append("through LLMInterface, in a process of its own; imports include Python's own start")


def start_once(folder: Path, device: str, caches: Path) -> dict[str, Any]:
    """Seconds of each part of one start. Raises RuntimeError with the process's last words where it fails."""
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "CUDA_CACHE_PATH": str(caches / "cuda"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
    }
    probe = Path(__file__).with_name("start_probe.py")
    command = [sys.executable, str(probe), repr(time.time()), str(folder), device, str(caches / "autobot")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    if done.returncode:
        raise RuntimeError(f"the process ended with status {done.returncode}: {done.stderr.strip()[-2000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures
