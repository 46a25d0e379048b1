"""How our Triton kernels follow each other on the device. Knows launches; knows nothing of what a kernel computes.

On Hopper and later, a kernel may be launched before the one it depends on has ended (programmatic dependent launch):
its programs start in the room that the last programs of the previous kernel leave, fetch what no kernel writes (the
weights), and only then wait. A step is a chain of 160 short kernels, so the gaps between them are worth closing.

The rule that makes it safe: every program of every kernel calls `wait_for_previous_kernel` before it reads anything
an earlier kernel wrote, and before it writes anything at all. So a kernel ends only after its predecessor has.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import Any

import torch
import triton
import triton.language as tl

_HOPPER = (9, 0)


class Ahead:
    """While kernels are compiled ahead: what was asked for so far, by (kernel, key)."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self._threads = threads
        self.kernels: dict[tuple[Any, ...], Any] = {}
        self._compilations: dict[tuple[Any, ...], Future[Any]] = {}

    def submit(self, key: tuple[Any, ...], compilation: Callable[..., object], *arguments: Any) -> None:
        """Have a kernel that is not Triton's compiled, once."""
        if key not in self._compilations:
            self._compilations[key] = self._threads.submit(compilation, *arguments)


_ahead: ContextVar[Ahead | None] = ContextVar("kernels compiled ahead", default=None)


@triton.jit
def wait_for_previous_kernel(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Block until every earlier kernel's writes are visible."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_kernel_start(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Allow the next kernel's programs onto multiprocessors with room; they wait for this kernel's end themselves."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


def launch_options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments of every launch on this device: the kernel's PDL constant and the launcher's option for it."""
    return _options(device.index or 0) if device.type == "cuda" else {"PDL": False}


def first_launch_options(device: torch.device) -> dict[str, Any]:
    """The same for a step's first kernel: it starts when everything queued before it has ended.

    So whatever brought the step's arrays to the device is over, and all later kernels may read them before they wait.
    """
    return {"PDL": launch_options(device)["PDL"]}


@lru_cache
def _options(device_index: int) -> dict[str, Any]:
    pdl = torch.version.hip is None and torch.cuda.get_device_capability(device_index) >= _HOPPER
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


@contextmanager
def compile_ahead(device: torch.device) -> Iterator[None]:
    """Compile what is launched inside, on all processors side by side, and run none of it.

    A kernel takes some 400 ms to compile, half of it for the C stub that launches it; a model needs about sixty, and
    launching them for the first time compiles one after the other. Inside, tensors that kernels would write hold
    whatever they held: go through steps whose outcome nobody wants. A kernel that cannot be compiled says so where it
    is launched in earnest.
    """
    with ThreadPoolExecutor(os.cpu_count(), "compile", torch.cuda.set_device, (device,)) as threads:
        ahead = Ahead(threads)
        token = _ahead.set(ahead)
        try:
            with triton.AsyncCompileMode(threads, ignore_errors=True):
                yield
            for _ in threads.map(_load, ahead.kernels.values()):
                pass
        finally:
            _ahead.reset(token)


def ahead_of_launches() -> Ahead | None:
    """Where kernels are only to be compiled now, not launched."""
    return _ahead.get()


def _load(kernel: Any) -> None:
    """Make a compiled kernel ready to be launched: Triton leaves that to the first launch."""
    with suppress(Exception):  # said again, and heard, at the first launch
        _ = (kernel.result() if isinstance(kernel, triton.FutureKernel) else kernel).run


def lean(kernel: Any) -> Any:
    """Decorate a kernel of `triton.jit` so that its launches cost the host a fraction; the interpreter's stay as they
    are."""
    return _LeanKernel(kernel) if isinstance(kernel, triton.JITFunction) else kernel


class _LeanKernel:
    """A kernel that remembers what it was compiled to for arguments like these.

    Triton examines every argument of every launch anew, some 50 µs for thirty of them, and a prompt's step is 160
    launches: as long as the device needs. What code an argument leads to depends on little of it, which is the key
    here; the rest is handed to the compiled kernel as it is.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._names: list[str] = [param.name for param in kernel.params]
        self._constants = frozenset(param.name for param in kernel.params if param.is_constexpr)
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, (*grid, 1, 1)[:3])

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
        constants, names = self._constants, self._names
        key = (
            *map(_trait, arguments),
            *(value if name in constants or name not in names else _trait(value) for name, value in named.items()),
        )
        compiled = self._compiled.get(key)
        if compiled is None:
            if (ahead := _ahead.get()) is None:
                self._compiled[key] = self._kernel[grid](*arguments, **named)
            elif (self, key) not in ahead.kernels:
                ahead.kernels[self, key] = self._kernel.warmup(*arguments, grid=grid, **named)
        elif _ahead.get() is None:
            compiled[grid](*arguments, *(named[name] for name in names[len(arguments) :]))


def _trait(value: Any) -> Any:
    """All of an argument that its kernel's code depends on: Triton's own rules, and a float's value beside them."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        return value == 1, value % 16 == 0, -(2**31) <= value < 2**31
    return value
