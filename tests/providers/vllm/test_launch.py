"""Launching vLLM: arguments, readiness, restarts, and nothing left behind, with a program that stands in for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from autobot_llm.errors import ConfigurationError, ProviderUnavailable
from autobot_llm.providers.vllm.launch import launched_vllm
from autobot_llm.providers.vllm.log_file import BoundedLog
from autobot_llm.providers.vllm.process import Patience
from autobot_llm.settings import Settings
from autobot_llm.transport.pool import HttpPool

FAKE = Path(__file__).with_name("fake_vllm.py")
TIME_LIMIT = 20.0  # seconds within which everything these tests wait for has happened
QUICK = Patience(start=TIME_LIMIT, look=0.02, stop=5.0, first_delay=0.02, longest_delay=0.05)


@dataclass(frozen=True)
class Plan:
    """The folder through which the program that stands in for vLLM is told what to do."""

    folder: Path
    settings: Settings

    def order(self, name: str, text: str = "") -> Path:
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        return path

    @property
    def starts(self) -> list[dict[str, Any]]:
        path = self.folder / "starts"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    @property
    def logs(self) -> list[Path]:
        return sorted((self.folder / "cache" / "logs").iterdir())


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plan]:
    """A `vllm` at the front of the PATH. Whatever a failing test leaves running is ended."""
    programs = tmp_path / "bin"
    programs.mkdir()
    program = programs / "vllm"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(FAKE))} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_VLLM", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", "a-secret")
    monkeypatch.setenv("AUTOBOT_API_KEYS", "another-secret")
    made = Plan(tmp_path, Settings(default_model="some/model", cache_dir=tmp_path / "cache"))
    yield made
    for start in made.starts:
        for pid in (start["pid"], start["worker"]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(TIME_LIMIT):
        while not condition():
            await asyncio.sleep(0.01)


async def assert_gone(start: dict[str, Any]) -> None:
    await until(lambda: not is_alive(start["pid"]) and not is_alive(start["worker"]))


async def answers(address: str) -> bool:
    pool = HttpPool(address, name="vllm")
    try:
        return (await pool.request("GET", "/health")).status == 200
    finally:
        await pool.close()


async def test_a_launched_server_gets_the_translators_arguments_and_is_ready_when_the_block_begins(plan: Plan) -> None:
    settings = Settings(
        default_model="vllm/some/model", cache_dir=plan.folder / "cache", workload="interactive", kv_cache_dtype="fp8"
    )
    async with launched_vllm(settings, patience=QUICK) as vllm:
        assert await answers(vllm.address)
        assert vllm.server.state == "ready"
        assert vllm.server.pid == plan.starts[0]["pid"]
    (start,) = plan.starts
    port = vllm.address.rpartition(":")[2]
    assert start["argv"] == [
        "serve", "some/model", "--host", "127.0.0.1", "--port", port, "--enable-prompt-tokens-details",
        "--performance-mode", "interactivity", "--max-num-seqs", "64", "--max-num-batched-tokens", "4096",
        "--gpu-memory-utilization", "0.9", "--kv-cache-dtype", "fp8", "--enable-prefix-caching",
    ]  # fmt: skip
    await assert_gone(start)
    assert vllm.server.state == "stopped"


async def test_the_arguments_are_those_of_the_installed_version(plan: Plan) -> None:
    plan.order("version", "INFO some warning\n0.10.0\n")
    settings = Settings(default_model="m", cache_dir=plan.folder / "cache", attention_backend="flashinfer")
    async with launched_vllm(settings, patience=QUICK) as vllm:
        assert vllm.translation.facts_from == "0.10.0"
    (start,) = plan.starts
    assert "--num-scheduler-steps" in start["argv"]
    assert "--performance-mode" not in start["argv"]
    assert start["environ"]["VLLM_ATTENTION_BACKEND"] == "FLASHINFER"


async def test_a_program_of_another_python_is_asked_by_that_python(plan: Plan) -> None:
    """The Python that this one names has no vllm, so that the program itself is asked in the end."""
    program = plan.folder / "bin" / "vllm"
    program.write_text(f"#!{sys.executable}\nimport runpy, sys\nrunpy.run_path({str(FAKE)!r}, run_name='__main__')\n")
    plan.order("version", "0.18.1")
    async with launched_vllm(plan.settings, patience=QUICK) as vllm:
        assert vllm.translation.version == "0.18.1"


async def test_a_program_that_cannot_tell_its_version_is_an_error_with_its_words(plan: Plan) -> None:
    program = plan.folder / "bin" / "vllm"
    program.write_text("#!/bin/sh\necho 'RuntimeError: no device' >&2\nexit 1\n")
    with pytest.raises(ConfigurationError, match="--version failed: RuntimeError: no device"):
        async with launched_vllm(plan.settings, patience=QUICK):
            pytest.fail("there is nothing to launch")


async def test_the_child_gets_no_key_of_ours(plan: Plan) -> None:
    async with launched_vllm(plan.settings, patience=QUICK):
        (start,) = plan.starts
    assert "secret" not in json.dumps(start["environ"])
    assert start["environ"]["FAKE_VLLM"] == str(plan.folder)


async def test_a_slow_start_is_waited_for_and_its_lines_are_heard(plan: Plan) -> None:
    gate = plan.order("gate")
    lines: list[str] = []

    async def open_gate_later() -> None:
        await until(lambda: lines)
        gate.unlink()

    opening = asyncio.create_task(open_gate_later())
    async with launched_vllm(plan.settings, patience=QUICK, on_line=lines.append) as vllm:
        assert opening.done()
        assert await answers(vllm.address)
    assert "INFO loading some/model" in lines


async def test_a_server_that_never_gets_ready_is_given_up_and_ended(plan: Plan) -> None:
    plan.order("gate")
    impatient = Patience(start=1.0, look=0.02, stop=5.0)
    with pytest.raises(
        ProviderUnavailable, match="(?s)vllm was not ready within 1 s.*INFO loading some/model"
    ) as failure:
        async with launched_vllm(plan.settings, patience=impatient):
            pytest.fail("it is not ready")
    assert str(plan.logs[0]) in failure.value.message
    assert "INFO loading some/model" in failure.value.message
    await assert_gone(plan.starts[0])


async def test_a_server_that_ends_at_its_start_is_an_error_with_its_last_words(plan: Plan) -> None:
    plan.order("crash")
    with pytest.raises(ProviderUnavailable, match=r"vllm ended \(exit code 3\) before it was ready") as failure:
        async with launched_vllm(plan.settings, patience=QUICK):
            pytest.fail("it is not ready")
    assert "ValueError: no such model" in failure.value.message
    assert len(plan.starts) == 1, "a start that fails is not repeated"
    await assert_gone(plan.starts[0])


async def test_a_killed_server_is_started_again_at_the_same_address(
    plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    async with launched_vllm(plan.settings, patience=QUICK) as vllm:
        os.kill(plan.starts[0]["pid"], signal.SIGKILL)
        await until(lambda: len(plan.starts) == 2 and vllm.server.state == "ready")
        assert await answers(vllm.address)
        assert vllm.server.num_restarts == 1
        await assert_gone(plan.starts[0])  # its worker too, though nobody told that
    assert "vllm ended (killed by SIGKILL); starting it again" in caplog.text
    await assert_gone(plan.starts[1])


async def test_a_server_that_keeps_crashing_is_tried_again_until_it_lives(plan: Plan) -> None:
    async with launched_vllm(plan.settings, patience=QUICK) as vllm:
        crash = plan.order("crash")
        os.kill(plan.starts[0]["pid"], signal.SIGKILL)
        await until(lambda: len(plan.starts) >= 4)
        assert vllm.server.state == "restarting"
        crash.unlink()
        await until(lambda: vllm.server.state == "ready")
        assert await answers(vllm.address)
    for start in plan.starts:
        await assert_gone(start)


async def test_a_server_that_ignores_the_polite_signal_is_ended_by_force(plan: Plan) -> None:
    plan.order("deaf")
    async with launched_vllm(plan.settings, patience=Patience(start=TIME_LIMIT, look=0.02, stop=0.2)):
        (start,) = plan.starts
    await assert_gone(start)


async def test_cancelling_a_start_leaves_no_process(plan: Plan) -> None:
    plan.order("gate")

    async def launch() -> None:
        async with launched_vllm(plan.settings, patience=QUICK):
            pytest.fail("it is not ready")

    task = asyncio.create_task(launch())
    await until(lambda: plan.starts)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await assert_gone(plan.starts[0])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
async def test_the_server_does_not_outlive_a_parent_that_was_killed(plan: Plan) -> None:
    program = f"""
import asyncio
from pathlib import Path
from autobot_llm.providers.vllm.launch import launched_vllm
from autobot_llm.settings import Settings

async def main():
    async with launched_vllm(Settings(default_model="m", cache_dir=Path({str(plan.folder / "cache")!r}))):
        await asyncio.sleep(300)

asyncio.run(main())
"""
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", program)
    try:
        await until(lambda: plan.starts)
        assert is_alive(plan.starts[0]["pid"])
    finally:
        parent.kill()
        await parent.wait()
    await until(lambda: not is_alive(plan.starts[0]["pid"]))


async def test_without_vllm_the_error_says_so(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(plan.folder / "nowhere"))
    with pytest.raises(ConfigurationError, match="vllm is not installed: there is no `vllm` on the PATH"):
        async with launched_vllm(plan.settings):
            pytest.fail("there is nothing to launch")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings(), "--launch needs a model"),
        (Settings(default_model="m", vllm_endpoints=("http://127.0.0.1:1",)), "AUTOBOT_VLLM_ENDPOINTS is set"),
    ],
)
async def test_what_cannot_be_launched_is_refused_before_anything_is_started(
    plan: Plan, settings: Settings, words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        async with launched_vllm(settings):
            pytest.fail("it must be refused")
    assert plan.starts == []


def test_the_log_is_bounded_and_its_last_lines_are_known(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "logs" / "vllm.log", max_bytes=2000)
    for number in range(500):
        log.write(f"line {number}: héllo\n".encode())
    log.write(b"10%\r20%\rhalf a li")
    log.close()
    sizes = [path.stat().st_size for path in (tmp_path / "logs").iterdir()]
    assert len(sizes) == 2
    assert sum(sizes) <= 2000
    assert log.tail(3) == ["10%", "20%", "half a li"]
    assert log.last_line == "20%"
    again = BoundedLog(tmp_path / "logs" / "vllm.log", max_bytes=2000)
    again.write(b"x" * 5000)
    again.close()
    assert again.path.stat().st_size == 1000
    assert "line 499" in (tmp_path / "logs" / "vllm.log.1").read_text(encoding="utf-8")
