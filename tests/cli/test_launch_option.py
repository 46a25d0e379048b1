"""`autobot-llm serve --provider vllm --launch`, as a user runs it, with a program that stands in for vLLM."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FAKE = Path(__file__).parents[1] / "providers" / "vllm" / "fake_vllm.py"
COMMAND = [sys.executable, "-c", "import sys; from autobot_llm.cli.main import main; sys.exit(main())", "serve"]
LAUNCH = ["--provider", "vllm", "--launch", "--port", "0"]
TIME_LIMIT = 60.0  # seconds within which everything here has happened


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with a `vllm` in bin/; whatever a failing test leaves running is ended."""
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(FAKE))} "$@"\n')
    program.chmod(0o755)
    yield tmp_path
    for start in starts(tmp_path):
        for pid in (start["pid"], start["worker"]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def environment(folder: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AUTOBOT_")}
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**inherited, "PATH": path, "FAKE_VLLM": str(folder), "AUTOBOT_CACHE_DIR": str(folder / "cache")}


def starts(folder: Path) -> list[dict[str, Any]]:
    path = folder / "starts"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def lines_until(process: subprocess.Popen[str], beginning: str) -> str:
    assert process.stdout is not None
    read = ""
    for line in process.stdout:
        read += line
        if line.startswith(beginning):
            return read
    raise AssertionError(f"it ended after {read!r}")


@contextlib.contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*COMMAND, *LAUNCH, *arguments], cwd=folder, env=environment(folder), stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_the_launched_vllm_answers_through_the_server_and_is_gone_after_ctrl_c(folder: Path) -> None:
    with serving(folder, "--model", "some/model") as process:
        text = lines_until(process, "stop ")
        api = re.search(r"^API +(\S+)", text, re.MULTILINE)
        assert api is not None
        assert re.search(r"^vllm +0\.33\.0 at http://127\.0\.0\.1:\d+, process \d+, log ", text, re.MULTILINE)
        assert "told          --performance-mode balanced --max-num-seqs 128" in text
        assert "not told      AUTOBOT_VLLM_MULTI_STEP: removed in 0.10.1.1; async_scheduling" in text
        assert "vLLM 0.33.0: some/model" in text
        with urllib.request.urlopen(f"{api[1]}/models", timeout=10) as reply:
            assert [model["id"] for model in json.load(reply)["data"]] == ["some/model"]
        process.send_signal(signal.SIGINT)
        assert process.wait(TIME_LIMIT) == 0
    (start,) = starts(folder)
    deadline = time.monotonic() + TIME_LIMIT
    while is_alive(start["pid"]) or is_alive(start["worker"]):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_folder_is_served_under_the_name_given_and_what_follows_the_dashes_is_passed_on(
    folder: Path,
) -> None:
    (folder / "m").mkdir()
    with serving(folder, "--model", "./m", "--", "--tensor-parallel-size", "2") as process:
        text = lines_until(process, "stop ")
        process.send_signal(signal.SIGINT)
        process.wait(TIME_LIMIT)
    argv = starts(folder)[0]["argv"]
    assert argv[:2] == ["serve", "m"]
    assert argv[argv.index("--served-model-name") + 1] == "./m"
    assert argv[-2:] == ["--tensor-parallel-size", "2"]
    assert "ready" in text


def test_a_vllm_that_ends_at_once_is_an_error_with_its_last_words(folder: Path) -> None:
    (folder / "crash").touch()
    done = subprocess.run(
        [*COMMAND, *LAUNCH, "--model", "some/model"], cwd=folder, env=environment(folder), capture_output=True,
        text=True, timeout=TIME_LIMIT, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "error: vllm ended (exit code 3) before it was ready" in done.stderr
    assert "ValueError: no such model" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--launch", "--model", "m"], "the provider is native: add --provider vllm"),
        ([*LAUNCH], "--launch needs a model"),
        (["--", "--tensor-parallel-size", "2"], "only --launch takes arguments for vLLM, after --"),
    ],
)
def test_what_cannot_be_launched_is_refused(folder: Path, arguments: list[str], words: str) -> None:
    done = subprocess.run(
        [*COMMAND, *arguments], cwd=folder, env=environment(folder), capture_output=True, text=True,
        timeout=TIME_LIMIT, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert words in done.stderr
    assert starts(folder) == []


def test_without_vllm_the_error_says_how_to_get_it(folder: Path) -> None:
    done = subprocess.run(
        [*COMMAND, *LAUNCH, "--model", "m"], cwd=folder, env=environment(folder) | {"PATH": str(folder)},
        capture_output=True, text=True, timeout=TIME_LIMIT, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "error: vllm is not installed: there is no `vllm` on the PATH" in done.stderr
