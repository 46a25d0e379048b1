"""The benchmark of stores that are out of order runs, has a row for each way, and ends with one JSON line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "cache_failures.py"


def test_every_way_to_be_out_of_order_is_measured() -> None:
    command = [sys.executable, str(BENCHMARK), "--requests", "10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])["milliseconds"]
    assert len(figures) == (10 if shutil.which("redis-server") else 5)
    assert all(row["first"] > 0 and row["p99"] >= row["p50"] > 0 for row in figures.values())
