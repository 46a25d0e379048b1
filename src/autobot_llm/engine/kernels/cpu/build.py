"""Compile step.cpp with the machine's C++ compiler, once. Knows compilers and the cache directory; knows no models."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("step.cpp")
HEADERS = tuple(SOURCE.with_name(f"{name}.h") for name in ("attention", "linear", "threads", "vectors"))
# -march=native, because the step is built where it runs. Never -ffast-math: the order of operations is a promise.
FLAGS = ("-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", "-pthread")
COMPILE_TIMEOUT = 120.0


class CannotCompileError(Exception):
    """There is no working compiler here; the message says what was tried."""


def compiler() -> str | None:
    """The C++ compiler: $CXX, else g++, else clang++; None where there is none."""
    candidates = (os.environ.get("CXX"), "g++", "clang++")
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


def load_library(cache_dir: Path, flags: tuple[str, ...] = FLAGS) -> ctypes.CDLL:
    """The compiled step, built now if `cache_dir` does not hold it for this source, compiler and processor."""
    path = library_path(cache_dir, flags)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not _is_whole(path):
            log.warning("%s is damaged: building it again", path)
            path.unlink()
        if not path.exists():
            _compile(path, flags)
            _digest_path(path).write_text(_digest(path))
        return _open(path)
    except OSError as error:
        # An unwritable cache costs a build at each start, not the speed of every answer.
        log.warning("the compiled step cannot be kept in %s (%s): building it for this process only", cache_dir, error)
    with tempfile.TemporaryDirectory(prefix="autobot_llm-") as temporary:
        path = Path(temporary) / path.name
        try:
            _compile(path, flags)
            return _open(path)
        except OSError as error:
            raise CannotCompileError(f"the compiled step cannot be written or loaded: {error}") from error


def library_path(cache_dir: Path, flags: tuple[str, ...] = FLAGS) -> Path:
    """Where the library for this source, compiler and processor is kept. Raises CannotCompileError."""
    return cache_dir / "kernels" / f"step-{_fingerprint(_compiler_or_raise(), flags)}.so"


def _is_whole(path: Path) -> bool:
    """Whether a kept library is what was built. Loading half of one would kill the process, not raise."""
    try:
        return _digest_path(path).read_text() == _digest(path)
    except FileNotFoundError:
        return False


def _digest_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _compiler_or_raise() -> str:
    path = compiler()
    if path is None:
        raise CannotCompileError("no C++ compiler found (install g++ for a faster step)")
    return path


def _fingerprint(compiler_path: str, flags: tuple[str, ...]) -> str:
    """Changes with anything that would make another library: source, flags, compiler version, processor features."""
    try:
        version = subprocess.run([compiler_path, "--version"], capture_output=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise CannotCompileError(f"{compiler_path} --version failed: {error}") from error
    digest = hashlib.sha256()
    sources = [path.read_bytes() for path in (SOURCE, *HEADERS)]
    for part in (*sources, " ".join(flags).encode(), version, _processor().encode()):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _compile(library: Path, flags: tuple[str, ...]) -> None:
    # Built beside its place and moved there, so that another process never loads half a file.
    handle, unfinished = tempfile.mkstemp(dir=library.parent, suffix=".tmp")
    os.close(handle)
    compiler_path = _compiler_or_raise()
    command = [compiler_path, *flags, str(SOURCE), "-o", unfinished]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT, check=False)
        if done.returncode != 0:
            raise CannotCompileError(f"{compiler_path} failed on {SOURCE.name}: {done.stderr.strip()[-500:]}")
        Path(unfinished).replace(library)
    except subprocess.TimeoutExpired as error:
        raise CannotCompileError(f"{compiler_path} took more than {COMPILE_TIMEOUT:.0f} s on {SOURCE.name}") from error
    finally:
        Path(unfinished).unlink(missing_ok=True)


def _open(library: Path) -> ctypes.CDLL:
    opened = ctypes.CDLL(str(library))
    opened.autobot_panel_width.restype = ctypes.c_int64
    opened.autobot_create.restype = ctypes.c_void_p
    opened.autobot_create.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    opened.autobot_run.restype = ctypes.c_int32
    opened.autobot_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    opened.autobot_destroy.restype = None
    opened.autobot_destroy.argtypes = [ctypes.c_void_p]
    return opened
