"""`autobot-llm pull` against a fake Ollama: it fetches what is asked for, and says plainly what went wrong."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from fake_ollama import FakeOllama, reserved, running_ollama, url_of

COMMAND = (sys.executable, "-c", "import sys; from autobot_llm.cli.main import main; sys.exit(main())", "pull")


async def pull(model: str, endpoint: str, folder: Path) -> tuple[int, str, str]:
    """The exit code of the command, and what it wrote."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AUTOBOT_")}
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        model,
        cwd=folder,
        env={**inherited, "AUTOBOT_OLLAMA_ENDPOINT": endpoint},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    stdout, stderr = await process.communicate()
    assert process.returncode is not None
    return process.returncode, stdout.decode(), stderr.decode()


async def test_a_model_that_is_pulled_is_there_afterwards(tmp_path: Path) -> None:
    async with running_ollama(FakeOllama(models={})) as fake:
        code, said, _ = await pull("ollama/new:1b", fake.url, tmp_path)
        assert (code, said) == (0, "new:1b is there\n")
        assert list(fake.models) == ["new:1b"]


async def test_a_model_that_does_not_exist_is_an_error_in_ollamas_words(tmp_path: Path) -> None:
    async with running_ollama() as fake:
        code, said, complaint = await pull("nowhere", fake.url, tmp_path)
    assert (code, said) == (1, "")
    assert "error: ollama: pull model manifest: file does not exist" in complaint


async def test_a_server_that_is_not_there_is_an_error_that_says_where(tmp_path: Path) -> None:
    endpoint = url_of(listener := reserved())
    code, _, complaint = await pull("m", endpoint, tmp_path)
    listener.close()
    assert code == 1
    assert f"ollama cannot be reached at {endpoint.removeprefix('http://')}" in complaint
