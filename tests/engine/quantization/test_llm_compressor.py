"""llm-compressor in an environment of its own: what is left when it fails, is stopped or is not there.

Its Python is a program here that reads the job as the real one does and misbehaves. The real one is used where
LLM_COMPRESSOR_CACHE names the cache directory into which `autobot-llm quantize --llm-compressor install` put it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from quantized_folders import small_model

from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.quantization.compressor import CompressorError, compress, environment, is_installed
from autobot_llm.engine.quantization.loader import QuantizedModelLoader
from autobot_llm.engine.quantization.scheme import QuantizationConfig, QuantizationType
from autobot_llm.errors import ConfigurationError

W8 = QuantizationConfig(type=QuantizationType.W8)
TEXT = "Once upon a time there was a little girl who had a big red ball. " * 40
pytestmark = pytest.mark.skipif(os.name != "posix", reason="the stand-ins are shell scripts")


def installed(cache: Path, script: str) -> Path:
    """An environment whose Python is a shell script: it finds the job on its input, as the real one does."""
    python = cache / "llmcompressor-0.14.0" / "bin" / "python"
    python.parent.mkdir(parents=True)
    find = 'folder=$(sed \'s/.*"folder": "\\([^"]*\\)".*/\\1/\')'
    python.write_text(f"#!/bin/sh\n{find}\n{script}\n")
    python.chmod(0o755)
    (python.parents[1] / ".ready").touch()
    return python


HALF = 'mkdir "$folder"; echo {} > "$folder/config.json"'


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (f"{HALF}; echo 'no space left' >&2; exit 3", "python ended with 3: no space left"),
        (f"{HALF}; kill -9 $$", "python was killed by signal 9"),
        ("exit 0", "cannot be written"),  # says that all is well, and wrote nothing
    ],
)
def test_a_failure_leaves_nothing_and_tells_what_was_said(tmp_path: Path, script: str, words: str) -> None:
    python = installed(tmp_path / "cache", script)
    with pytest.raises(CompressorError, match=words):
        compress(python, small_model(tmp_path / "model"), tmp_path / "out", W8, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "model"]


def test_where_it_fails_our_quantizers_do_it_and_the_result_says_why(tmp_path: Path) -> None:
    installed(tmp_path / "cache", f"{HALF}; echo 'no space left' >&2; exit 3")
    config = QuantizationConfig(type=QuantizationType.GPTQ, calibration_samples=2, calibration_sequence_length=64)
    loader = QuantizedModelLoader(config, calibration_text=TEXT, compressor_mode="installed")
    found = loader.load_or_quantize(small_model(tmp_path / "model"), tmp_path / "cache")
    assert found.by == "autobot_llm (llm-compressor: python ended with 3: no space left)"
    assert load_config(found.folder).quantization is not None


def test_an_environment_that_cannot_be_made_leaves_the_work_to_us(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "llmcompressor-0.14.0.lock").mkdir()  # where a file should be
    loader = QuantizedModelLoader(W8, compressor_mode="install")
    found = loader.load_or_quantize(small_model(tmp_path / "model"), tmp_path / "cache")
    assert found.by.startswith("autobot_llm (llm-compressor cannot be installed in")


PROGRAM = """
import sys
from pathlib import Path
from autobot_llm.engine.quantization.compressor import compress
from autobot_llm.engine.quantization.scheme import QuantizationConfig, QuantizationType
compress(Path({python!r}), Path({source!r}), Path({out!r}), QuantizationConfig(type=QuantizationType.W8), [])
"""


def stopped_run(python: Path, source: Path, out: Path, with_signal: int) -> None:
    """Stop a process while the child has half a folder."""
    code = PROGRAM.format(python=str(python), source=str(source), out=str(out))
    partial = out.parent / f".{out.name}.llm-compressor" / "model" / "config.json"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as process:
        while not partial.exists():
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, with_signal)
        assert process.wait(60) != 0


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    source = small_model(tmp_path / "model")
    python = installed(tmp_path / "cache", f"{HALF}; exec sleep 30")
    stopped_run(python, source, tmp_path / "out", signal.SIGINT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "model"]


def test_after_a_kill_the_folder_is_the_childs_until_it_ends_and_then_anybodys(tmp_path: Path) -> None:
    source = small_model(tmp_path / "model")
    pid = tmp_path / "cache" / "pid"
    python = installed(tmp_path / "cache", f'{HALF}; echo $$ > "{pid}"; exec sleep 60')
    stopped_run(python, source, tmp_path / "out", signal.SIGKILL)
    with pytest.raises(ConfigurationError, match="is being written by another process"):
        compress(python, source, tmp_path / "out", W8, [])
    assert not (tmp_path / "out").exists()
    os.kill(int(pid.read_text()), signal.SIGKILL)
    python.write_text(python.read_text().replace("exec sleep 60", "exit 0"))
    deadline = time.monotonic() + 20
    while not (tmp_path / "out").exists():
        assert time.monotonic() < deadline
        try:
            compress(python, source, tmp_path / "out", W8, [])
        except ConfigurationError:
            time.sleep(0.05)  # the system has not closed its files yet
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "model", "out"]


def test_the_real_one_writes_a_folder_that_we_read(tmp_path: Path) -> None:
    cache = Path(os.environ.get("LLM_COMPRESSOR_CACHE", "."))
    if not is_installed(cache):
        pytest.skip("LLM_COMPRESSOR_CACHE names no directory with llm-compressor (1.5 GB, half a minute)")
    compress(environment(cache, may_install=False), small_model(tmp_path / "model"), tmp_path / "out", W8, [])
    found = load_config(tmp_path / "out").quantization
    assert found is not None
    assert found.scheme.name == "W8A16, one scale a channel"
    assert not list(tmp_path.glob(".*"))
