"""Bring stored tensors into memory that is there already, with several readers. Knows bytes; knows nothing of models.

The file is cut into spans of contiguous bytes, in file order. Each reader takes the next span, reads it and hands it to
its carrier: `InPlace` has it read straight into a host tensor; `Staged` has it read into one of a few buffers, and
copies from there while the reader fills another, so host memory stays at the buffers' size however large the model is.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from operator import attrgetter
from pathlib import Path
from typing import Protocol

import torch

from autobot_llm.engine.models.checkpoint import StoredTensor
from autobot_llm.errors import ModelLoadError

NUM_BUFFERS = 2  # per reader: one is filled while the other is copied


@dataclass(frozen=True, slots=True)
class Transfer:
    """A stored tensor, and the contiguous memory of as many elements that it fills."""

    stored: StoredTensor
    target: torch.Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """Some elements of one tensor: bytes [offset, offset + num_bytes) of a span, and the flat memory they fill."""

    stored: StoredTensor
    target: torch.Tensor
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Span:
    """Contiguous bytes of a file, from byte `start`, that pieces fill without a gap."""

    path: Path
    start: int
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        return self.pieces[-1].offset + self.pieces[-1].num_bytes


class Carrier(Protocol):
    """Takes spans where they belong, one at a time. Belongs to one reader."""

    def memory(self, span: Span) -> Iterable[memoryview]:
        """Where to read the span's bytes, in order; waits until that memory may be written."""
        ...

    def send(self, span: Span) -> None:
        """The bytes were read: copy them, now or later."""
        ...

    def finish(self) -> None:
        """Return when nothing is under way any more, after an error too."""
        ...


class Transport(Protocol):
    """What `Staged` needs of a device."""

    def buffer(self, num_bytes: int) -> torch.Tensor:
        """Host memory, uint8, that `copy` can read from."""
        ...

    def copy(self, stored: torch.Tensor, target: torch.Tensor) -> None:
        """Queue a copy, with a conversion where the dtypes differ."""
        ...

    def mark(self) -> Callable[[], object]:
        """A function that returns when every copy queued so far is done."""
        ...


class InPlace:
    """Host tensors of the stored dtype need no copy: their own memory is read into."""

    def memory(self, span: Span) -> Iterable[memoryview]:
        return (_bytes_of(piece.target) for piece in span.pieces)

    def send(self, span: Span) -> None:
        pass

    def finish(self) -> None:
        pass


class Staged:
    """Reads into buffers of `num_bytes` in turn, and copies out of them."""

    def __init__(self, transport: Transport, num_bytes: int) -> None:
        self._transport = transport
        self._num_bytes = num_bytes
        self._num_made = 0
        self._in_use: deque[tuple[torch.Tensor, Callable[[], object]]] = deque()  # the oldest copy first
        self._buffer: torch.Tensor | None = None

    def memory(self, span: Span) -> Iterable[memoryview]:
        self._buffer = self._free_buffer()
        return (_bytes_of(self._buffer[: span.num_bytes]),)

    def send(self, span: Span) -> None:
        assert self._buffer is not None, "a span is sent after it was read"
        for piece in span.pieces:
            stored = self._buffer[piece.offset : piece.offset + piece.num_bytes].view(piece.stored.dtype)
            self._transport.copy(stored, piece.target)
        self._in_use.append((self._buffer, self._transport.mark()))

    def finish(self) -> None:
        self._transport.mark()()

    def _free_buffer(self) -> torch.Tensor:
        if self._num_made < NUM_BUFFERS:
            self._num_made += 1
            return self._transport.buffer(self._num_bytes)
        buffer, wait = self._in_use.popleft()
        wait()
        return buffer


class HostTransport:
    """Copies at once, on the calling thread."""

    def buffer(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def copy(self, stored: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(stored)

    def mark(self) -> Callable[[], object]:
        return lambda: None


class CudaTransport:
    """Copies from pinned memory on a stream of its own, and converts on the device.

    Make it on the thread whose current stream the targets were allocated on: their memory may still be in use there.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._device: torch.device = self._stream.device  # with its index: "current" is another one on other threads
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def buffer(self, num_bytes: int) -> torch.Tensor:
        with torch.cuda.device(self._device):
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, stored: torch.Tensor, target: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            if stored.dtype != target.dtype:  # torch would convert on the host
                stored = stored.to(self._device, non_blocking=True)
            target.copy_(stored, non_blocking=True)

    def mark(self) -> Callable[[], object]:
        event = torch.cuda.Event(blocking=True)
        event.record(self._stream)
        return event.synchronize


def plan_spans(transfers: Iterable[Transfer], max_bytes: int) -> list[Span]:
    """Cut the transfers into spans of at most `max_bytes` (a multiple of 8), in file order.

    Tensors that follow each other in the file share spans, and large ones are cut between elements. Within a span
    every piece is aligned to its own elements, so that it can be viewed in its stored dtype.
    """
    assert max_bytes % 8 == 0, "no stored element is cut in two"
    spans: list[Span] = []
    pieces: list[Piece] = []
    path, start, num_bytes = Path(), 0, 0

    def close() -> None:
        if pieces:
            spans.append(Span(path, start, tuple(pieces)))
            pieces.clear()

    for transfer in sorted(transfers, key=attrgetter("stored.path", "stored.start")):
        stored, flat = transfer.stored, transfer.target.view(-1)
        assert flat.numel() == stored.num_bytes // stored.dtype.itemsize, f"{stored.name}: not its own memory"
        done = 0
        while done < stored.num_bytes:
            itemsize = stored.dtype.itemsize
            is_next = (stored.path, stored.start + done) == (path, start + num_bytes)
            if not is_next or num_bytes % itemsize or max_bytes - num_bytes < itemsize:
                close()
                path, start, num_bytes = stored.path, stored.start + done, 0
            size = min(stored.num_bytes - done, (max_bytes - num_bytes) // itemsize * itemsize)
            target = flat[done // itemsize : (done + size) // itemsize]
            pieces.append(Piece(stored, target, num_bytes, size))
            done, num_bytes = done + size, num_bytes + size
    close()
    return spans


def carry(
    spans: Sequence[Span], carriers: Sequence[Carrier], on_progress: Callable[[int, int], None] | None = None
) -> None:
    """Read all spans, with one thread for each carrier, and return when the last byte has arrived.

    `on_progress(num_bytes_done, num_bytes_total)` is called on this thread; an exception it raises, or an interrupt of
    this thread, ends the readers and passes on. Raises ModelLoadError, naming file and tensor, where a file ends early
    or cannot be read. When this returns or raises, no thread, file or copy is left.
    """
    remaining = _Remaining(spans)
    reports: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
    num_total, num_done, num_reading = sum(span.num_bytes for span in spans), 0, len(carriers)
    threads: list[threading.Thread] = []
    try:
        for carrier in carriers:
            thread = threading.Thread(target=_read_spans, args=(remaining, carrier, reports), name="autobot-reader")
            thread.start()
            threads.append(thread)
        while num_reading:
            report = reports.get()
            if isinstance(report, BaseException):
                raise report
            if report is None:
                num_reading -= 1
                continue
            num_done += report
            if on_progress is not None:
                on_progress(num_done, num_total)
    finally:
        remaining.stop()
        for thread in threads:
            thread.join()


class _Remaining:
    """The spans that nobody has taken yet; safe to iterate from several threads."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self._spans = iter(spans)
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Span]:
        return self

    def __next__(self) -> Span:
        with self._lock:
            return next(self._spans)

    def stop(self) -> None:
        with self._lock:
            self._spans = iter(())


def _read_spans(
    remaining: _Remaining, carrier: Carrier, reports: queue.SimpleQueue[int | BaseException | None]
) -> None:
    """One reader's life: how many bytes it read, span by span, then None, or what went wrong."""
    try:
        with ExitStack() as closing:
            closing.callback(carrier.finish)
            file: FileIO | None = None
            for span in remaining:
                if file is None or file.name != str(span.path):
                    if file is not None:
                        file.close()
                    file = closing.enter_context(_open(span))
                _read(file, span, carrier.memory(span))
                carrier.send(span)
                reports.put(span.num_bytes)
    except BaseException as error:
        reports.put(error)
    else:
        reports.put(None)


def _open(span: Span) -> FileIO:
    try:
        return FileIO(str(span.path), "rb")  # unbuffered: a span is read once, into memory of its own
    except OSError as exc:
        raise ModelLoadError(f"{span.path}: tensor {span.pieces[0].stored.name} cannot be read: {exc}") from exc


def _read(file: FileIO, span: Span, memory: Iterable[memoryview]) -> None:
    done = 0
    try:
        file.seek(span.start)
        for view in memory:
            while len(view):
                num_read = file.readinto(view)
                if not num_read:
                    raise EOFError("the file became shorter while it was read")
                view, done = view[num_read:], done + num_read
    except (OSError, EOFError) as exc:
        name = next(piece.stored.name for piece in reversed(span.pieces) if piece.offset <= done)
        raise ModelLoadError(f"{span.path}: tensor {name} cannot be read: {exc}") from exc


def _bytes_of(flat: torch.Tensor) -> memoryview:
    view: memoryview = flat.view(torch.uint8).numpy().data
    return view
