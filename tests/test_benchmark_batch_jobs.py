"""The benchmark of batch jobs runs, and checks what it measures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "batch_jobs.py"


def test_both_clients_are_measured_and_the_answers_are_checked() -> None:
    command = [sys.executable, str(BENCHMARK), "--requests", "150", "--characters", "50"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["requests"] == 150
    for client in ("ours", "openai"):
        assert told[client]["send_cpu_s"] > 0
        assert told[client]["peak_mib"] >= told[client]["start_mib"] > 0
