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
HEADERS = tuple(SOURCE.with_name(f"{name}.h") for name in ("attention", "cache", "linear", "threads", "vectors"))
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
    if _is_whole(path):
        return _open(path)
    try:
        with tempfile.TemporaryDirectory(prefix="autobot_llm-") as folder:
            built = Path(folder) / path.name
            _compile(built, flags)
            return _open(path if _keep(built, path) else built)
    except OSError as error:
        raise CannotCompileError(f"the compiled step cannot be written or loaded: {error}") from error


def library_path(cache_dir: Path, flags: tuple[str, ...] = FLAGS) -> Path:
    """Where the library for this source, compiler and processor is kept. Raises CannotCompileError."""
    return cache_dir / "kernels" / f"step-{_fingerprint(_compiler_or_raise(), flags)}.so"


def _is_whole(path: Path) -> bool:
    """Whether the cache holds what was built. Loading half a library would kill the process, not raise."""
    try:
        whole = _digest_path(path).read_text() == _digest(path)
    except OSError:
        return False
    if not whole:
        log.warning("%s is damaged: building it again", path)
    return whole


def _keep(built: Path, path: Path) -> bool:
    """Copy a library into the cache, whole or not at all, the digest first: processes that start together only ever
    find a library that they can check. A cache that cannot be written costs a build at each start, and no answer."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            copy = Path(shutil.copy(built, folder))
            digest = copy.with_suffix(".digest")
            digest.write_text(_digest(built))
            digest.replace(_digest_path(path))
            copy.replace(path)
    except OSError as error:
        log.warning("the compiled step cannot be kept at %s (%s): it is built for this process only", path, error)
        return False
    return True


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
    compiler_path = _compiler_or_raise()
    command = [compiler_path, *flags, str(SOURCE), "-o", str(library)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        raise CannotCompileError(f"{compiler_path} took more than {COMPILE_TIMEOUT:.0f} s on {SOURCE.name}") from error
    if done.returncode != 0:
        raise CannotCompileError(f"{compiler_path} failed on {SOURCE.name}: {done.stderr.strip()[-500:]}")


def _open(library: Path) -> ctypes.CDLL:
    opened = ctypes.CDLL(str(library))
    opened.autobot_panel_width.restype = ctypes.c_int64
    opened.autobot_create.restype = ctypes.c_void_p
    opened.autobot_create.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    opened.autobot_run.restype = ctypes.c_int32
    opened.autobot_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    opened.autobot_move.restype = None
    opened.autobot_move.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    opened.autobot_destroy.restype = None
    opened.autobot_destroy.argtypes = [ctypes.c_void_p]
    return opened
