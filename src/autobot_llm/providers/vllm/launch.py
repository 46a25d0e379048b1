"""Start a `vllm serve` of our own: which program, which arguments, where it listens. Knows vLLM; knows no processes."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import shutil
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from autobot_llm.errors import ConfigurationError, LLMError
from autobot_llm.providers.vllm.log_file import BoundedLog
from autobot_llm.providers.vllm.process import PATIENCE, ManagedServer, Patience
from autobot_llm.settings import Settings
from autobot_llm.settings.child import child_environment
from autobot_llm.transport.pool import HttpPool
from autobot_llm.tuning.knobs import Translation, installed_version, translate_settings

HOST = "127.0.0.1"
PROGRAM = "vllm"
VERSION_PATIENCE = 120.0  # seconds; vLLM imports all of torch before it says its version, its Python need not
ASK_VERSION = "import importlib.metadata; print(importlib.metadata.version('vllm'))"
EMBEDDED_MODEL = "tiny"
TELL_CACHED = "--enable-prompt-tokens-details"  # usage then tells the cached tokens; every release has it


class LaunchedVllm:
    """A running vLLM of our own: its address, what it was told, and the process."""

    def __init__(self, address: str, translation: Translation, server: ManagedServer) -> None:
        self.address = address
        self.translation = translation
        self.server = server


@contextlib.asynccontextmanager
async def launched_vllm(
    settings: Settings,
    further: Sequence[str] = (),
    *,
    on_line: Callable[[str], None] | None = None,
    patience: Patience = PATIENCE,
) -> AsyncIterator[LaunchedVllm]:
    """A vLLM that serves the settings' default model, ready, while the block runs; it is stopped at the block's end.

    `further` arguments come last on its command line, so that vLLM obeys them where the settings say something else.

    Raises ConfigurationError where vllm is not installed, no model is named or endpoints are set too, and
    ProviderUnavailable where it does not become ready.
    """
    model = _model(settings)
    program = _program()
    version = await _version_of(program)
    translation = translate_settings("vllm", version, settings)
    port = _free_port()
    address = f"http://{HOST}:{port}"
    pool = HttpPool(address, name="vllm")
    arguments = [TELL_CACHED, *_name_for(model, settings), *translation.arguments, *further]
    server = ManagedServer(
        [program, "serve", model, "--host", HOST, "--port", str(port), *arguments],
        environment=child_environment(translation.environment),
        is_ready=lambda: _answers(pool),
        # Named after our own port, which stays, so that starts do not pile up files.
        log=BoundedLog(settings.cache_dir / "logs" / f"vllm-{settings.port}.log"),
        patience=patience,
        on_line=on_line,
    )
    try:
        await server.start()
        yield LaunchedVllm(address, translation, server)
    finally:
        await server.close()
        await pool.close()


def _model(settings: Settings) -> str:
    if settings.vllm_endpoints:
        raise ConfigurationError(
            "AUTOBOT_VLLM_ENDPOINTS is set, and --launch starts a server of its own: leave one of them out"
        )
    model = settings.default_model.removeprefix("vllm/")
    if model == EMBEDDED_MODEL:
        raise ConfigurationError("--launch needs a model for vLLM: name one with --model, a folder or a hub's name")
    path = Path(model).expanduser()
    return str(path) if path.is_dir() else model


def _name_for(model: str, settings: Settings) -> list[str]:
    """A folder is served under the name that the settings have for it."""
    name = settings.default_model.removeprefix("vllm/")
    return [] if name == model else ["--served-model-name", name]


def _program() -> str:
    program = shutil.which(PROGRAM)
    if program is None:
        raise ConfigurationError(
            "vllm is not installed: there is no `vllm` on the PATH. Install it in an environment of its own "
            "(pip install vllm) and put that environment's bin folder on the PATH"
        )
    return program


async def _version_of(program: str) -> str:
    """The program's version: that of the package beside us if it is ours, else what its Python or it itself says."""
    installed = installed_version("vllm")
    if installed is not None and Path(program).parent == Path(sys.executable).parent:
        return installed
    if (python := _python_of(program)) is not None:
        status, said, _ = await _output_of(python, "-I", "-c", ASK_VERSION)
        if status == 0 and said:
            return said[-1]
    status, said, errors = await _output_of(program, "--version")
    if status or not said:
        raise ConfigurationError(f"{program} --version failed: {errors[-1] if errors else 'it said nothing'}")
    return said[-1]


def _python_of(program: str) -> str | None:
    """The interpreter that a script names in its first line, if that is a Python."""
    with Path(program).open("rb") as file:
        first = file.readline(1024).decode("utf-8", "replace")
    interpreter = first.removeprefix("#!").strip()
    is_python = first.startswith("#!/") and Path(interpreter).name.startswith("python")
    return interpreter if is_python and Path(interpreter).is_file() else None


async def _output_of(*command: str) -> tuple[int, list[str], list[str]]:
    """The exit status and the lines that a short command prints, on its output and as errors."""
    process = await asyncio.create_subprocess_exec(
        *command, env=child_environment({}), stdin=DEVNULL, stdout=PIPE, stderr=PIPE
    )
    try:
        async with asyncio.timeout(VERSION_PATIENCE):
            output, errors = await process.communicate()
    except BaseException as exc:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if isinstance(exc, TimeoutError):
            raise ConfigurationError(f"{shlex.join(command)} did not answer within {VERSION_PATIENCE:g} s") from exc
        raise
    lines = [part.decode("utf-8", "replace").strip().splitlines() for part in (output, errors)]
    return process.returncode or 0, lines[0], lines[1]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


async def _answers(pool: HttpPool) -> bool:
    try:
        await pool.request("GET", "/health", timeout=5.0)
    except LLMError:
        return False
    return True
