"""Record a function's kernels once and replay them with one call. Knows CUDA graphs; knows nothing of models.

A decode step at batch 1 is some 200 short kernels. Launched one by one from Python they cost several times what they
compute; replayed, about a microsecond each. What a graph reads and writes is fixed when it is captured: addresses,
grids and scalar arguments. So everything that changes from step to step lives in the contents of its input tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Captured(Generic[Result]):
    graph: torch.cuda.CUDAGraph
    input_tensor: torch.Tensor
    result: Result


class CUDAGraphManager(Generic[Result]):
    """Captured functions by key, all in one memory pool.

    `warmup_steps` is how often a function runs before it is captured, so that compilation and the libraries' own set-up
    are over by then. Sharing a pool means that the result of one graph is valid until another one is replayed.
    """

    def __init__(self, warmup_steps: int = 3) -> None:
        if warmup_steps < 1:
            raise ValueError(f"warmup_steps={warmup_steps}: expected at least 1, or compilation would be captured")
        self.warmup_steps = warmup_steps
        self._captured: dict[Hashable, _Captured[Result]] = {}
        self._stream: torch.cuda.Stream | None = None
        self._pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    @property
    def keys(self) -> tuple[Hashable, ...]:
        return tuple(self._captured)

    def capture(
        self, key: Hashable, forward_fn: Callable[[torch.Tensor], Result], input_tensor: torch.Tensor
    ) -> Result:
        """Run `forward_fn(input_tensor)`: the first time for a key by capturing it, later by replaying the graph.

        The first call's tensor becomes the graph's input; another tensor of a later call is copied into it. The result
        is the captured one, rewritten by each replay. Raises ValueError for a tensor on another device than CUDA, or
        of another shape or dtype than the first.
        """
        captured = self._captured.get(key)
        if captured is None:
            captured = self._captured[key] = self._capture(forward_fn, input_tensor)
        elif input_tensor is not captured.input_tensor:
            expected = captured.input_tensor
            if input_tensor.shape != expected.shape or input_tensor.dtype != expected.dtype:
                raise ValueError(
                    f"graph {key!r} was captured for {tuple(expected.shape)} {expected.dtype}, "
                    f"and got {tuple(input_tensor.shape)} {input_tensor.dtype}"
                )
            expected.copy_(input_tensor)
        captured.graph.replay()
        return captured.result

    def clear(self, key: Hashable | None = None) -> None:
        """Forget one graph, or all; a key that was never captured is ignored. Waits for replays under way."""
        if not self._captured:
            return
        torch.cuda.synchronize()
        if key is None:
            self._captured.clear()
        else:
            self._captured.pop(key, None)
        if not self._captured:  # a pool ends with its last graph
            self._pool = torch.cuda.graph_pool_handle()

    def _stream_of(self, device: torch.device) -> torch.cuda.Stream:
        """Not the default one, which cannot be captured; one for all, since libraries keep memory for each stream."""
        if self._stream is None or self._stream.device != device:
            self._stream = torch.cuda.Stream(device)
        return self._stream

    def _capture(self, forward_fn: Callable[[torch.Tensor], Result], input_tensor: torch.Tensor) -> _Captured[Result]:
        if input_tensor.device.type != "cuda":
            raise ValueError(f"a CUDA graph's input must be on a CUDA device, and this one is on {input_tensor.device}")
        graph = torch.cuda.CUDAGraph()
        stream = self._stream_of(input_tensor.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.warmup_steps):
                forward_fn(input_tensor)
            # other threads of the program may use the device meanwhile
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = forward_fn(input_tensor)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return _Captured(graph, input_tensor, result)
