"""The command line: as a user runs it, in a process of its own, and its parts against a scripted provider."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from itertools import takewhile
from pathlib import Path

import click
import msgspec
import pytest

from autobot_llm.cli.answer import for_terminal, print_answer
from autobot_llm.cli.main import cli, main
from autobot_llm.cli.serve import curl_line, serve, start_lines
from autobot_llm.cli.session import Session
from autobot_llm.errors import ProviderError
from autobot_llm.interface import LLMInterface
from autobot_llm.providers.base import ModelInfo, ProviderStatus
from autobot_llm.providers.scripted import ScriptedProvider
from autobot_llm.settings import SETTINGS, load_settings
from autobot_llm.types import Event, LLMRequest, LLMResponse, Start, TextDelta

COMMAND = [sys.executable, "-c", "import sys; from autobot_llm.cli.main import main; sys.exit(main())"]
OPTIONS = LLMRequest()
# Nearly every token is as likely as any other, so the answer goes on until it is cut.
ENDLESS = ["--temperature", "100", "--max-tokens", "1900"]


def environment(cache: Path, **settings: str) -> dict[str, str]:
    """This process's environment with these settings and no others."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AUTOBOT_")}
    return {**inherited, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1", "COLUMNS": "100", **settings}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One user's cache for all of these tests: the CPU step is compiled once."""
    return tmp_path_factory.mktemp("cache")


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path, cache: Path) -> Run:
    """Run `autobot-llm` in an empty folder."""

    def run_in_empty_folder(*arguments: str, stdin: str = "", **settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *arguments], input=stdin, cwd=tmp_path, env=environment(cache, **settings),
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    return run_in_empty_folder


@contextlib.contextmanager
def started(arguments: list[str], cwd: Path, env: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """`autobot-llm` while it runs; it does not outlive a test that fails."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*COMMAND, *arguments], cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def assert_one_clear_error(done: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    assert done.returncode == status, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("Loading ")]
    assert all(line.startswith(("error: ", "Error: ", "Usage: ", "Try ")) or not line for line in lines), done.stderr
    for word in words:
        assert word in done.stderr


# --- help, version


def test_the_help_names_every_command_and_answers_at_once(run: Run) -> None:
    start = time.perf_counter()
    done = run("--help")
    assert time.perf_counter() - start < 2
    assert done.returncode == 0
    for command in ("serve", "chat", "config", "models"):
        assert re.search(rf"^  {command} ", done.stdout, re.MULTILINE)


def commands(group: click.Group, *before: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        yield (*before, name), command
        if isinstance(command, click.Group):
            yield from commands(command, *before, name)


COMMANDS = {" ".join(names): (names, command) for names, command in commands(cli)}


@pytest.mark.parametrize(("names", "command"), COMMANDS.values(), ids=COMMANDS)
def test_every_command_explains_itself_with_examples(
    names: tuple[str, ...], command: click.Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*names, "--help"]) == 0
    assert f"Examples:\n    autobot-llm {' '.join(names)}" in capsys.readouterr().out
    assert [p.name for p in command.params if isinstance(p, click.Option) and not p.help] == []


def test_the_help_loads_neither_the_engine_nor_the_server() -> None:
    code = "import sys; from autobot_llm.cli.main import main; main(['--help']); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert not {"torch", "uvicorn", "rich"} & set(loaded.split())


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"autobot-llm \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_an_unknown_option_is_refused_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--prot", "1"]) == 2
    assert "--port" in capsys.readouterr().err


# --- config


def test_config_prints_every_setting_with_its_value_and_source(run: Run, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("AUTOBOT_PORT=9001\nAUTOBOT_HOST=0.0.0.0\n", encoding="utf-8")
    done = run("config", AUTOBOT_PORT="9002")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if "AUTOBOT_" in line}
    assert lines["AUTOBOT_PORT"] == ["9002", "environment"]
    assert lines["AUTOBOT_HOST"] == ["0.0.0.0", ".env"]
    assert lines["AUTOBOT_LOG_LEVEL"][1] == "default"
    assert {setting.variable for setting in SETTINGS if setting.variable.startswith("AUTOBOT_")} <= set(lines)


def test_config_as_json_holds_the_same_settings(run: Run) -> None:
    done = run("config", "--json", AUTOBOT_PORT="9002", AUTOBOT_CACH_ENABLED="false")
    document = json.loads(done.stdout)
    rows = {row["variable"]: row for row in document["settings"]}
    assert set(rows) == {setting.variable for setting in SETTINGS}
    assert rows["AUTOBOT_PORT"]["value"] == "9002"
    assert rows["AUTOBOT_PORT"]["default"] == "8100"
    assert all(row["doc"] for row in rows.values())
    assert "AUTOBOT_CACHE_ENABLED" in document["warnings"][0]


def test_config_never_shows_a_secret(run: Run) -> None:
    for arguments in (("config",), ("config", "--json")):
        done = run(*arguments, AUTOBOT_API_KEYS="swordfish", OPENAI_API_KEY="swordfish")
        assert done.returncode == 0
        assert "swordfish" not in done.stdout + done.stderr


def test_config_refuses_bad_values_all_at_once(run: Run) -> None:
    done = run("config", AUTOBOT_KV_CACHE_DTYPE="int9", AUTOBOT_PORT="99999")
    assert_one_clear_error(done, 2, "AUTOBOT_KV_CACHE_DTYPE='int9'", "AUTOBOT_PORT='99999'")
    assert all(line.startswith("error: AUTOBOT_") for line in done.stderr.splitlines())


def test_config_says_what_an_unknown_name_might_have_meant(run: Run) -> None:
    done = run("config", AUTOBOT_CACH_ENABLED="false")
    assert done.returncode == 0
    assert "warning: unknown setting AUTOBOT_CACH_ENABLED; did you mean AUTOBOT_CACHE_ENABLED?" in done.stderr


def test_config_marks_what_has_no_effect(run: Run) -> None:
    line = next(line for line in run("config").stdout.splitlines() if "AUTOBOT_VLLM_ENDPOINTS" in line)
    assert "no effect" in line


def test_a_pipe_closed_by_its_reader_is_no_traceback(tmp_path: Path, cache: Path) -> None:
    writer = subprocess.Popen(
        [*COMMAND, "config"], cwd=tmp_path, env=environment(cache), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert writer.stdout is not None
    writer.stdout.close()  # long before the interpreter has started
    _, errors = writer.communicate(timeout=60)
    assert b"Traceback" not in errors
    assert b"Exception ignored" not in errors


# --- chat


def test_chat_streams_an_answer_of_the_embedded_model(run: Run) -> None:
    done = run("chat", "--temperature", "0", "--max-tokens", "20", "--stats", "Tell me a story about a fox.")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 5
    assert done.stdout.endswith("\n")
    assert re.search(
        r"\d+ prompt tokens \(0 cached\), 20 answer tokens, ended by length, .* ms, \d+ tokens/s", done.stderr
    )


def test_chat_reads_a_piped_prompt_and_prints_the_response_as_json(run: Run) -> None:
    done = run("chat", "--json", "--max-tokens", "8", "--seed", "7", stdin="What is a fox?\n")
    assert done.returncode == 0, done.stderr
    response = msgspec.json.decode(done.stdout, type=LLMResponse)
    assert response.model == "tiny"
    assert response.provider == "native"
    assert 1 <= response.usage.completion_tokens <= 8


def test_the_same_seed_gives_the_same_answer(run: Run) -> None:
    arguments = ("chat", "--temperature", "1", "--max-tokens", "20", "--seed", "11", "Tell me a story.")
    assert run(*arguments).stdout == run(*arguments).stdout


@pytest.mark.parametrize("arguments", [("chat", " "), ("chat",)])
def test_an_empty_prompt_is_refused(run: Run, arguments: tuple[str, ...]) -> None:
    assert_one_clear_error(run(*arguments), 2, "the prompt is empty")


def test_an_unknown_model_is_one_line_and_exit_code_2(run: Run) -> None:
    done = run("chat", "--model", "nowhere", "hello")
    assert_one_clear_error(done, 2, "nowhere", "tiny")


def test_a_provider_that_does_not_exist_is_refused(run: Run) -> None:
    assert_one_clear_error(run("chat", "--provider", "nobody", "hello"), 2, "AUTOBOT_LLM_PROVIDER='nobody'", "native")


def test_a_request_that_cannot_be_answered_is_exit_code_1(run: Run) -> None:
    done = run("chat", "--temperature", "-1", "hello")
    assert_one_clear_error(done, 1, "temperature")


def test_ctrl_c_ends_a_single_question_with_exit_code_130(tmp_path: Path, cache: Path) -> None:
    with started(["chat", *ENDLESS, "Tell me everything."], tmp_path, environment(cache)) as process:
        assert process.stdout is not None
        process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors


def test_a_models_text_cannot_control_the_terminal() -> None:
    assert for_terminal("a\x1b[2J\x9b2J\x07b\r\n\tc é 狐") == "a[2J2Jb\n\tc é 狐"


async def test_text_that_came_before_an_error_is_ended_by_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    provider = ScriptedProvider(["Once upon", ProviderError("the wire broke")])
    async with LLMInterface(load_settings(environ={}, env_file=None), providers={"native": provider}) as llm:
        with pytest.raises(ProviderError, match="the wire broke"):
            await print_answer(llm, LLMRequest(prompt="Tell"))
    assert capsys.readouterr().out == "Once upon\n"


# --- a conversation


class Typist:
    """Types these lines, one for each prompt; an exception in their place is raised. At the end, Ctrl-D."""

    def __init__(self, *lines: str | BaseException) -> None:
        self._lines = iter(lines)

    def __call__(self, prompt: str) -> str:
        line = next(self._lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line


class InterruptedProvider:
    """Begins an answer; then the user presses Ctrl-C. Later questions are answered in full."""

    name = "native"

    def __init__(self) -> None:
        self.requests: list[LLMRequest] = []
        self.num_cancelled = 0
        self._rest = ScriptedProvider(["Here I am."], name="native", models=["tiny"])

    async def start(self) -> None:
        await self._rest.start()

    async def close(self) -> None:
        await self._rest.close()

    async def models(self) -> list[ModelInfo]:
        return await self._rest.models()

    def status(self) -> ProviderStatus:
        return self._rest.status()

    def metrics(self) -> dict[str, float]:
        return {}

    async def stream(self, request: LLMRequest) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        if len(self.requests) > 1:
            async for event in self._rest.stream(request):
                yield event
            return
        try:
            yield Start(request_id="1", model="tiny", provider=self.name)
            yield TextDelta("Once upon a")
            signal.raise_signal(signal.SIGINT)
            await asyncio.sleep(60)
        finally:
            self.num_cancelled += 1


@contextlib.contextmanager
def conversation(provider: ScriptedProvider | InterruptedProvider) -> Iterator[tuple[asyncio.Runner, LLMInterface]]:
    settings = load_settings(environ={}, env_file=None)
    with asyncio.Runner() as runner:
        llm = LLMInterface(settings, providers={"native": provider})
        runner.run(llm.initialize())
        yield runner, llm
        runner.run(llm.aclose())


def said(request: LLMRequest) -> list[tuple[str, object]]:
    return [(turn.role, turn.content) for turn in request.messages or []]


def test_a_conversation_is_sent_whole_with_every_question() -> None:
    provider = ScriptedProvider(["A ", "fox."])
    with conversation(provider) as (runner, llm):
        Session(llm, OPTIONS, runner, system="Be brief.", read_line=Typist("Who?", "", "Why?")).run()
    assert said(provider.requests[1]) == [
        ("system", "Be brief."), ("user", "Who?"), ("assistant", "A fox."), ("user", "Why?"),
    ]  # fmt: skip


def test_reset_forgets_the_conversation_and_keeps_the_system_message(capsys: pytest.CaptureFixture[str]) -> None:
    provider = ScriptedProvider(["Yes."])
    with conversation(provider) as (runner, llm):
        typist = Typist("/system Be kind.", "One", "/reset", "Two", "/exit", "Three")
        Session(llm, OPTIONS, runner, read_line=typist).run()
    assert said(provider.requests[-1]) == [("system", "Be kind."), ("user", "Two")]
    assert "system: Be kind." in capsys.readouterr().err


def test_an_unknown_command_lists_the_known_ones_and_asks_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    provider = ScriptedProvider(["Yes."])
    with conversation(provider) as (runner, llm):
        Session(llm, OPTIONS, runner, read_line=Typist("/quit", KeyboardInterrupt())).run()
    assert provider.requests == []
    errors = capsys.readouterr().err
    assert "There is no /quit." in errors
    assert "/exit" in errors


def test_a_failed_question_is_forgotten_and_the_conversation_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    provider = ScriptedProvider(
        lambda request: [ProviderError("no")] if len(provider.requests) == 1 else ["Yes."], name="native"
    )
    with conversation(provider) as (runner, llm):
        Session(llm, OPTIONS, runner, read_line=Typist("One", "Two")).run()
    assert said(provider.requests[1]) == [("user", "Two")]
    assert "error: no\n" in capsys.readouterr().err


def test_ctrl_c_stops_the_answer_and_not_the_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    provider = InterruptedProvider()
    with conversation(provider) as (runner, llm):
        Session(llm, OPTIONS, runner, read_line=Typist("Tell", "Are you there?")).run()
    assert provider.num_cancelled == 1
    assert said(provider.requests[1])[1] == ("assistant", "Once upon a")
    captured = capsys.readouterr()
    assert "(stopped)" in captured.err
    assert "Here I am." in captured.out


class Terminal:
    """`autobot-llm` at a real terminal: what is typed, and what appears."""

    def __init__(self, arguments: list[str], cwd: Path, env: Mapping[str, str]) -> None:
        import fcntl
        import pty
        import termios

        self._screen, keyboard = pty.openpty()
        self.seen = ""
        self.process = subprocess.Popen(
            [*COMMAND, *arguments], cwd=cwd, env=env, stdin=keyboard, stdout=keyboard, stderr=keyboard,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(keyboard)

    def type(self, keys: str) -> None:
        os.write(self._screen, keys.encode())

    def wait_for(self, pattern: str, *, pressing: str = "") -> None:
        """Read on until `pattern` appears in what was not yet waited for, `pressing` these keys every second."""
        self.type(pressing)
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            if select.select([self._screen], [], [], 1.0)[0]:
                self.seen += os.read(self._screen, 4096).decode(errors="replace")
            else:
                self.type(pressing)
        self.seen = self.seen[found.end() :]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._screen)


def test_a_session_at_a_terminal_survives_ctrl_c_and_ends_with_ctrl_d(tmp_path: Path, cache: Path) -> None:
    terminal = Terminal(["chat", *ENDLESS], tmp_path, {**environment(cache), "TERM": "dumb"})
    try:
        terminal.wait_for("> ")
        terminal.type("Tell me everything.\n")
        terminal.wait_for(r"everything\.\r\n.{20}")
        terminal.type("\x03")
        terminal.wait_for(r"\(stopped\)\r\n> ")
        # Python notices a signal between the prompt and the wait for keys with the next key only.
        terminal.wait_for(r"\(Ctrl-D or /exit ends\)\r\n> ", pressing="\x03")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.close()


# --- models


def test_models_lists_the_embedded_model(run: Run) -> None:
    assert run("models").stdout == "native/tiny  2048 tokens\n"
    [model] = json.loads(run("models", "--json").stdout)
    assert model["id"] == "tiny"
    assert model["context_length"] == 2048


# --- serve


def test_serve_says_how_to_use_it_answers_and_stops_cleanly(tmp_path: Path, cache: Path) -> None:
    env = environment(cache, AUTOBOT_KV_HEAVY_HITTERS="0.5", AUTOBOT_VLLM_MULTI_STEP="4")
    start = time.perf_counter()
    with started(["serve", "--port", "0"], tmp_path, env) as process:
        assert process.stdout is not None
        lines = {}
        for line in process.stdout:
            name, _, text = line.strip().partition("  ")
            lines[name] = text.strip()
            if name == "stop":
                break
        assert lines["model"] == "tiny"
        assert lines["step"]
        assert lines["step reason"]
        assert "AUTOBOT_VLLM_MULTI_STEP (no effect on provider native, only on vllm)" in lines["no effect"]
        assert "1,024 tokens of a sequence, half of them the most attended ones, lossy" in lines["kv saving"]
        assert lines["API"].endswith("/v1")
        body = re.search(r"-d '(.*)'$", lines["try"])
        assert body is not None
        request = urllib.request.Request(
            f"{lines['API']}/chat/completions", body[1].encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            assert json.load(reply)["choices"][0]["message"]["content"]
        assert time.perf_counter() - start < 30  # 10 s where nothing else runs and the CPU step is compiled
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert rest == "stopped\n"
    assert "Traceback" not in errors
    assert process.returncode == 0


def test_serve_on_a_port_in_use_says_so(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_one_clear_error(run("serve", "--port", str(port)), 2, f"AUTOBOT_PORT={port}", "another program uses it")


def test_serve_with_a_bad_option_names_the_setting_and_what_it_accepts(run: Run) -> None:
    assert_one_clear_error(run("serve", "--port", "high"), 2, "AUTOBOT_PORT='high'", "from 0 to 65535")
    assert_one_clear_error(run("serve", "--log-level", "loud"), 2, "AUTOBOT_LOG_LEVEL='loud'", "debug, info")


# What serve is told to do, this time; the rest says how.
LAUNCHING = ("launch", "vllm_arguments")


def test_every_option_of_serve_is_a_setting_and_says_which(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    variables = {setting.field: setting.variable for setting in SETTINGS}
    for option in serve.params:
        if option.name not in LAUNCHING:
            assert option.name in variables
            assert variables[option.name] in text


def test_serve_checks_every_engine_option_before_it_loads_anything(run: Run) -> None:
    done = run("serve", "--workload", "fast", "--attention-backend", "magic", "--gpu-memory-utilization", "90%")
    assert_one_clear_error(
        done,
        2,
        "AUTOBOT_WORKLOAD='fast' (command line): expected interactive, batch or mixed",
        "AUTOBOT_ATTENTION_BACKEND='magic' (command line): expected auto, triton, flashinfer, flash_attention or sdpa",
        "AUTOBOT_GPU_MEMORY_UTILIZATION='90%' (command line): expected a number above 0 and at most 1",
    )


def test_serve_says_how_much_was_warmed(tmp_path: Path, cache: Path) -> None:
    prefixes = json.dumps(["You are a librarian who answers every question in one short and friendly sentence."])
    with started(["serve", "--port", "0", "--cached-prefixes", prefixes], tmp_path, environment(cache)) as process:
        assert process.stdout is not None
        lines = [line.strip() for line in takewhile(lambda line: not line.startswith("stop"), process.stdout)]
    assert any(re.fullmatch(r"warmed\s+16 tokens: 1 prefixes for 1 tenants", line) for line in lines), lines


def test_options_win_over_the_environment(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("serve", "--port", port, AUTOBOT_PORT="8123")
    assert_one_clear_error(done, 2, f"AUTOBOT_PORT={port}")


def test_the_start_lines_demand_a_key_without_showing_it() -> None:
    settings = load_settings(environ={"AUTOBOT_API_KEYS": "swordfish", "AUTOBOT_PROT": "1"}, env_file=None)
    lines = "\n".join(start_lines(settings, {}, "http://127.0.0.1:8100"))
    assert "swordfish" not in lines
    assert 'Bearer $AUTOBOT_API_KEY"' in lines
    assert "did you mean AUTOBOT_PORT?" in lines


@pytest.mark.parametrize(
    ("address", "reachable"),
    [
        ("http://0.0.0.0:8100", "http://127.0.0.1:8100/v1/"),
        ("http://[::]:8100", "http://[::1]:8100/v1/"),
        ("http://127.0.0.1:9000", "http://127.0.0.1:9000/v1/"),
    ],
)
def test_the_curl_line_names_an_address_that_can_be_reached(address: str, reachable: str) -> None:
    assert f"curl {reachable}" in curl_line(load_settings(environ={}, env_file=None), address)


def test_a_provider_without_figures_still_gets_its_line() -> None:
    status = ProviderStatus(name="native", state="failed", message="out of memory")
    lines = list(start_lines(load_settings(environ={}, env_file=None), {"native": status}, "http://127.0.0.1:1"))
    assert lines[0] == "provider    native: failed out of memory"
