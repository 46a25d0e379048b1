"""Kernels in CUDA C++, compiled when they are first needed. Knows the compiler and the driver; knows no kernel.

Where Triton has no words for what a kernel must do (copies that a barrier counts, in front of a wait for the previous
kernel), it is written in CUDA C++. NVRTC, the compiler as a library, comes with torch: no toolkit is needed, and where
NVRTC is missing `find_nvrtc` says so, and where it refuses a kernel `CudaKernel.refusal` does: another one is taken.

Sources: NVRTC's manual; the CUDA driver API's `cuLaunchKernelEx`.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from threading import Lock

import torch

from autobot_llm.engine.kernels.gpu.launch import ahead_of_launches

_CLUSTER = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
_PROGRAMMATIC_LAUNCH = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_MAX_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_LOG_LENGTH = 2000
_MAP_ALIGNMENT = 64
_BYTES = 0  # CU_TENSOR_MAP_DATA_TYPE_UINT8
_SWIZZLES = {32: 0, 64: 2, 128: 3}  # CU_TENSOR_MAP_SWIZZLE_NONE, _64B and _128B
_FETCH_256_BYTES = 3  # CU_TENSOR_MAP_L2_PROMOTION_L2_256B
_HEADERS = ("hopper.cuh", "matrix_units.cuh", "numbers.cuh", "scale_x.cuh")

logger = logging.getLogger(__name__)


class CudaError(RuntimeError):
    """The compiler or the driver refused; the message has its words."""


class CompilationError(CudaError):
    """The compiler did. Nothing was launched, so another kernel can do the work."""


@lru_cache
def find_nvrtc() -> ctypes.CDLL | None:
    """The compiler that torch was installed with, or the system's; None, and a warning in the log, where there is none.

    Its second library is loaded by name and from nowhere else, so it must be there before it is asked for.
    """
    if torch.version.cuda is None:
        return None
    major = torch.version.cuda.split(".")[0]
    name = f"libnvrtc.so.{major}"
    folders = [
        *(Path(entry, "nvidia", part, "lib") for entry in sys.path for part in (f"cu{major}", "cuda_nvrtc")),
        Path("/usr/local/cuda/lib64"),
    ]
    for folder in (folder for folder in folders if (folder / name).is_file()):
        try:
            for builtins in folder.glob(f"libnvrtc-builtins.so.{major}*"):
                ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(folder / name))
        except OSError as exc:
            logger.debug("%s: %s", folder / name, exc)
    try:
        return ctypes.CDLL(name)
    except OSError as exc:
        logger.warning("no kernels in CUDA C++, slower ones are used: NVRTC was not found (%s)", exc)
        return None


class CudaKernel:
    """A kernel of a source file beside this one, compiled for each set of constants that it is launched with.

    `refusal` is what the compiler said, once it has refused any of them: from then on another kernel is to be taken.
    """

    def __init__(self, source: str, name: str) -> None:
        self.refusal: str | None = None
        self._refusing = Lock()
        self._source = source
        self._name = name
        self._compiled: dict[tuple[object, ...], bytes] = {}
        self._loaded: dict[tuple[object, ...], ctypes.c_void_p] = {}

    def launch(
        self,
        constants: Mapping[str, int],
        arguments: Sequence[ctypes.Structure | ctypes.c_uint],
        *,
        programs: int,
        threads: int,
        shared_bytes: int,
        device: torch.device,
        cluster: int = 1,
    ) -> None:
        """Queue it on the current stream, before the previous kernel has ended: it must wait for that itself.

        `cluster` programs in a row run side by side and may read each other's shared memory. Raises CompilationError,
        having queued nothing. Where kernels are compiled ahead only `refusal` says so.
        """
        architecture = architecture_of(device)
        key = (architecture, *constants.items())
        if (ahead := ahead_of_launches()) is not None:
            ahead.submit((self, key), self._compile, architecture, dict(constants), key)
            return
        function = self._loaded.get((device.index, shared_bytes, key))
        if function is None:
            cubin = self._compiled.get(key) or self._compile(architecture, constants, key)
            function = self._loaded[device.index, shared_bytes, key] = _load(cubin, self._name, shared_bytes)
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        attributes = (_Attribute * 2)(
            _attribute(_PROGRAMMATIC_LAUNCH, 1),
            _attribute(_CLUSTER, cluster, 1, 1),
        )
        stream = torch.cuda.current_stream(device).cuda_stream
        config = _Config(programs, 1, 1, threads, 1, 1, shared_bytes, stream, attributes, 2 if cluster > 1 else 1)
        _check(_driver().cuLaunchKernelEx(ctypes.byref(config), function, pointers, None), f"launching {self._name}")

    def _compile(self, architecture: str, constants: Mapping[str, int], key: tuple[object, ...]) -> bytes:
        try:
            cubin = self._compiled[key] = compile_source(_read(self._source), architecture, constants)
        except CompilationError as exc:
            with self._refusing:  # many are compiled side by side; one warning is enough
                if self.refusal is None:
                    logger.warning("%s does not compile, slower kernels are used: %s", self._source, exc)
                    self.refusal = str(exc)
            raise
        return cubin


def architecture_of(device: torch.device) -> str:
    """What the compiler calls it. Hopper's own instructions belong to "sm_90a" alone."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}{'a' if major == 9 else ''}"


def compile_source(source: str, architecture: str, constants: Mapping[str, int]) -> bytes:
    """Machine code for an architecture ("sm_90a"), with these constants defined. Needs no device.

    Raises CompilationError with what the compiler said.
    """
    nvrtc = find_nvrtc()
    if nvrtc is None:
        raise CompilationError("NVRTC was not found")
    program = ctypes.c_void_p()
    options = [f"--gpu-architecture={architecture}", "-std=c++17", *(f"-D{name}={n}" for name, n in constants.items())]
    encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    contents = (ctypes.c_char_p * len(_HEADERS))(*(_read(name).encode() for name in _HEADERS))
    names = (ctypes.c_char_p * len(_HEADERS))(*(name.encode() for name in _HEADERS))
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), None, len(_HEADERS), contents, names):
        raise CompilationError("NVRTC takes no program")
    try:
        if nvrtc.nvrtcCompileProgram(program, len(options), encoded):
            log = _bytes_of(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
            raise CompilationError(log.decode(errors="replace").rstrip("\0\n")[:_LOG_LENGTH])
        return _bytes_of(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _attribute(kind: int, *values: int) -> _Attribute:
    content = b"".join(value.to_bytes(4, sys.byteorder) for value in values)
    return _Attribute(kind, (ctypes.c_ubyte * 64)(*content))


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: an id, and a value of 64 bytes at the next multiple of 8."""

    _fields_ = (("id", ctypes.c_ulonglong), ("value", ctypes.c_ubyte * 64))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


@lru_cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _load(cubin: bytes, name: str, shared_bytes: int) -> ctypes.c_void_p:
    """Into the current context, where it stays."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    driver = _driver()
    _check(driver.cuModuleLoadData(ctypes.byref(module), cubin), f"loading {name}")
    _check(driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"finding {name}")
    _check(driver.cuFuncSetAttribute(function, _MAX_SHARED_BYTES, shared_bytes), f"{shared_bytes} bytes for {name}")
    return function


def _bytes_of(size_of, bytes_of, program: ctypes.c_void_p) -> bytes:  # type: ignore[no-untyped-def]
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    content = ctypes.create_string_buffer(size.value)
    bytes_of(program, content)
    return content.raw


def _check(code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise CudaError(f"{what}: {(text.value or b'an error').decode()} ({code})")


# --- tensor maps ----------------------------------------------------------------------------------------------------


class TensorMap(ctypes.Structure):
    """CUtensorMap: what a kernel's copies of parts of a matrix need to know of it."""

    _fields_ = (("opaque", ctypes.c_ulonglong * 16),)


@lru_cache(maxsize=4096)
def map_of_bytes(address: int, num_rows: int, row_bytes: int, stride: int, box_rows: int, box_bytes: int) -> TensorMap:
    """Of a matrix in global memory, copied `box_rows` rows by `box_bytes` (32, 64 or 128) at a time.

    Of 64 and 128 bytes a copied row's pieces of 16 change places with its number, so that the same piece of
    neighbouring rows lies in different banks of shared memory (the driver's swizzles of 64 and 128 bytes).
    """
    space = (ctypes.c_ubyte * (2 * ctypes.sizeof(TensorMap)))()
    start = -ctypes.addressof(space) % _MAP_ALIGNMENT
    sizes = (ctypes.c_ulonglong * 2)(row_bytes, num_rows)
    box = (ctypes.c_uint * 2)(box_bytes, box_rows)
    code = _driver().cuTensorMapEncodeTiled(
        *(ctypes.byref(space, start), _BYTES, 2, ctypes.c_void_p(address)),
        *(sizes, (ctypes.c_ulonglong * 1)(stride), box, (ctypes.c_uint * 2)(1, 1)),
        *(0, _SWIZZLES[box_bytes], _FETCH_256_BYTES, 0),
    )
    _check(code, f"a map of {num_rows} rows of {row_bytes} bytes")
    return TensorMap.from_buffer_copy(space, start)
