"""Run llm-compressor, which cannot live beside other libraries, in an environment of its own.

Knows how to make that environment and what to say to its Python; knows nothing of our own quantizers. Its recipes are
those of its documentation (0.14). Its AWQ pins memory and so needs a GPU; it is refused without one.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from autobot_llm.engine.quantization.folders import COPIED_FILES, locked
from autobot_llm.engine.quantization.scheme import QuantizationConfig, QuantizationType
from autobot_llm.errors import ConfigurationError, LLMError

log = logging.getLogger(__name__)

REQUIREMENTS = ("torch==2.13.0", "llmcompressor==0.14.0")
INSTALL_TIMEOUT = 1800.0
_READY = ".ready"

SCRIPT = """
import json, sys
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from transformers import AutoModelForCausalLM

job = json.load(sys.stdin)
kind, common = job["type"], {"targets": "Linear", "ignore": ["lm_head"]}
if kind == "w8a8":
    recipe = [SmoothQuantModifier(smoothing_strength=job["alpha"]), GPTQModifier(scheme="W8A8", **common)]
elif kind == "gptq":
    recipe = [GPTQModifier(scheme="W4A16", actorder="weight" if job["desc_act"] else None, **common)]
elif kind == "awq":
    from llmcompressor.modifiers.transform.awq import AWQModifier
    recipe = [AWQModifier(), QuantizationModifier(scheme="W4A16_ASYM", **common)]
elif kind == "w8":  # its own W8A16 has groups of 128
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    recipe = [QuantizationModifier(config_groups=groups, ignore=common["ignore"])]
else:
    recipe = [QuantizationModifier(scheme={"fp8": "FP8_DYNAMIC", "w4": "W4A16"}[kind], **common)]
model = AutoModelForCausalLM.from_pretrained(job["source"], dtype="auto")
more = {}
if job["sequences"]:
    masks = [[1] * len(sequence) for sequence in job["sequences"]]
    data = Dataset.from_dict({"input_ids": job["sequences"], "attention_mask": masks})
    more = {"dataset": data, "max_seq_length": len(job["sequences"][0]), "num_calibration_samples": len(data)}
oneshot(model=model, recipe=recipe, **more)
model.save_pretrained(job["folder"], save_compressed=True)
"""


class CompressorError(LLMError):
    """llm-compressor could not be installed, or failed; the message ends with what it said."""


def why_not(config: QuantizationConfig) -> str | None:
    """Why llm-compressor cannot do this; None: it can."""
    if config.type is QuantizationType.AWQ and not Path("/dev/nvidiactl").exists():
        return "llm-compressor's AWQ pins memory, which needs a GPU"
    if config.group_size != 128 and config.type in (QuantizationType.W4, QuantizationType.GPTQ, QuantizationType.AWQ):
        return f"llm-compressor's schemes have groups of 128, not {config.group_size}"
    return None


def environment(
    cache_dir: Path,
    *,
    may_install: bool,
    requirements: Sequence[str] = REQUIREMENTS,
    environ: Mapping[str, str] | None = None,
) -> Path:
    """The Python of the environment under `cache_dir`, which is made now if it is not there (1.5 GB, a minute or more).

    Raises CompressorError where it is not there and may not, or cannot, be made; half an environment is never used.
    One process makes it, others wait for it.
    """
    folder = _folder(cache_dir)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if is_installed(cache_dir):
        return python
    if not may_install:
        raise CompressorError(f"llm-compressor is not installed in {folder}")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f"{folder.name}.lock"), wait=True) as lock:
            if not is_installed(cache_dir):  # nobody did while we waited
                log.info("installing llm-compressor into %s: 1.5 GB, once", folder)
                _install(folder, python, requirements, environ, lock)
    except OSError as error:
        raise CompressorError(f"llm-compressor cannot be installed in {folder}: {error}") from error
    return python


def is_installed(cache_dir: Path) -> bool:
    """Whether `environment` finds one that was made to the end."""
    return (_folder(cache_dir) / _READY).exists()


def _folder(cache_dir: Path) -> Path:
    return cache_dir / "llmcompressor-0.14.0"


def _install(
    folder: Path, python: Path, requirements: Sequence[str], environ: Mapping[str, str] | None, lock: int
) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    pip = [str(python), "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]
    try:
        _run([sys.executable, "-m", "venv", str(folder)], INSTALL_TIMEOUT, environ=environ, lock=lock)
        _run(pip, INSTALL_TIMEOUT, environ=environ, lock=lock)
        (folder / _READY).touch()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def compress(
    python: Path,
    source: Path,
    folder: Path,
    config: QuantizationConfig,
    sequences: Sequence[Sequence[int]],
    environ: Mapping[str, str] | None = None,
) -> None:
    """Have llm-compressor quantize `source` into `folder`, which appears when it is whole.

    `environ` is what the child sees; None: all that this process does. Raises CompressorError, and ConfigurationError
    where another process is making the same folder.
    """
    partial = folder.parent / f".{folder.name}.llm-compressor"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with locked(partial / "lock", wait=False) as lock:
            try:
                if folder.exists():  # made by another process while this one waited for the environment
                    raise ConfigurationError(f"{folder} exists already: name another folder, or remove it")
                _compress(python, source, folder, partial / "model", config, sequences, environ, lock)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except BlockingIOError as error:
        raise ConfigurationError(f"{folder} is being written by another process") from error
    except OSError as error:
        raise CompressorError(f"llm-compressor: {folder} cannot be written: {error}") from error


def _compress(
    python: Path,
    source: Path,
    folder: Path,
    partial: Path,
    config: QuantizationConfig,
    sequences: Sequence[Sequence[int]],
    environ: Mapping[str, str] | None,
    lock: int,
) -> None:
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    job = {
        "type": config.type.value,
        "alpha": config.smooth_quant_alpha,
        "desc_act": config.desc_act,
        "source": str(source.resolve()),
        "folder": str(partial.resolve()),
        "sequences": [list(sequence) for sequence in sequences],
    }
    _run([str(python), "-I", "-c", SCRIPT], None, json.dumps(job), environ, lock)
    for name in COPIED_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, partial / name)
    partial.rename(folder)


def _run(
    command: list[str],
    timeout: float | None,
    text: str = "",
    environ: Mapping[str, str] | None = None,
    lock: int | None = None,
) -> None:
    """Run to the end. The child inherits `lock`, so that what it writes is nobody else's even if we are killed."""
    inherited = (lock,) if lock is not None and os.name == "posix" else ()
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=timeout, check=False, env=environ,
            pass_fds=inherited,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompressorError(f"llm-compressor: {error}") from error
    if done.returncode != 0:
        last = " ".join(done.stderr.strip().splitlines()[-3:])
        how = f"was killed by signal {-done.returncode}" if done.returncode < 0 else f"ended with {done.returncode}"
        raise CompressorError(f"llm-compressor: {Path(command[0]).name} {how}: {last}")
