"""Carrying tensors from files: the same bytes by every route, however the file is cut, and nothing left behind."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autobot_llm.engine.models.checkpoint import StoredTensor
from autobot_llm.engine.models.transfer import (
    NUM_BUFFERS,
    Carrier,
    HostTransport,
    InPlace,
    Span,
    Staged,
    Transfer,
    carry,
    plan_spans,
)
from autobot_llm.errors import ModelLoadError

BF16, F32 = torch.bfloat16, torch.float32


class LateDevice:
    """A device that copies nothing until it is waited for, as a busy one may."""

    def __init__(self) -> None:
        self.num_buffers = 0
        self._num_done = 0
        self._queued: deque[tuple[torch.Tensor, torch.Tensor]] = deque()

    def buffer(self, num_bytes: int) -> torch.Tensor:
        self.num_buffers += 1
        return torch.full((num_bytes,), 0xFF, dtype=torch.uint8)

    def copy(self, stored: torch.Tensor, target: torch.Tensor) -> None:
        self._queued.append((stored, target))

    def mark(self) -> Callable[[], object]:
        num_queued = self._num_done + len(self._queued)

        def wait() -> None:
            while self._num_done < num_queued:
                stored, target = self._queued.popleft()
                target.copy_(stored)
                self._num_done += 1

        return wait


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    open_files, threads = num_open_files(), threading.active_count()
    yield
    assert num_open_files() == open_files
    assert threading.active_count() == threads


def num_open_files() -> int:
    descriptors = Path("/proc/self/fd")  # where the system has it
    return len(list(descriptors.iterdir())) if descriptors.exists() else 0


def write_file(path: Path, tensors: Iterable[torch.Tensor], gaps: Iterable[int] | None = None) -> list[StoredTensor]:
    """The tensors one after another, each behind a gap of some bytes."""
    tensors = list(tensors)
    content, stored = b"", []
    for i, (tensor, gap) in enumerate(zip(tensors, gaps or [0] * len(tensors), strict=True)):
        content += bytes(gap)
        num_bytes = tensor.numel() * tensor.element_size()
        stored.append(
            StoredTensor(f"{path.name}.{i}", path, tensor.dtype, tuple(tensor.shape), len(content), num_bytes)
        )
        content += tensor.view(torch.uint8).numpy().tobytes()
    path.write_bytes(content)
    return stored


def targets(stored: Iterable[StoredTensor], dtype: torch.dtype | None = None) -> list[Transfer]:
    return [Transfer(one, torch.full(one.shape, float("nan"), dtype=dtype or one.dtype)) for one in stored]


def random_tensors(shapes: Iterable[tuple[int, torch.dtype]]) -> list[torch.Tensor]:
    return [torch.randn(count).to(dtype) for count, dtype in shapes]


ROUTES: dict[str, Callable[[int], Carrier]] = {
    "in place": lambda _: InPlace(),
    "staged": lambda num_bytes: Staged(HostTransport(), num_bytes),
    "a late device": lambda num_bytes: Staged(LateDevice(), num_bytes),
}
SHAPES = st.lists(st.tuples(st.integers(1, 70), st.sampled_from([BF16, F32])), min_size=1, max_size=12)


@pytest.mark.parametrize("route", ROUTES)
@given(data=st.data(), files=st.lists(SHAPES, min_size=1, max_size=3), num_readers=st.integers(1, 4))
def test_every_route_brings_the_same_values(
    route: str,
    data: st.DataObject,
    files: list[list[tuple[int, torch.dtype]]],
    num_readers: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("files")
    max_bytes = data.draw(st.sampled_from([8, 16, 64, 256]))
    written, stored = [], []
    for i, shapes in enumerate(files):
        tensors = random_tensors(shapes)
        gaps = data.draw(st.lists(st.integers(0, 5), min_size=len(shapes), max_size=len(shapes)))
        written += tensors
        stored += write_file(folder / str(i), tensors, gaps)
    dtype = None if route == "in place" else data.draw(st.sampled_from([None, BF16, F32]))
    transfers = targets(stored, dtype)
    spans = plan_spans(data.draw(st.permutations(transfers)), max_bytes)
    assert max(span.num_bytes for span in spans) <= max_bytes
    carry(spans, [ROUTES[route](max_bytes) for _ in range(num_readers)])
    for transfer, tensor in zip(transfers, written, strict=True):
        assert torch.equal(transfer.target, tensor.to(transfer.target.dtype))


def test_small_tensors_share_a_span_and_large_ones_are_cut(tmp_path: Path) -> None:
    stored = write_file(tmp_path / "f", random_tensors([(4, BF16), (4, BF16), (100, F32), (2, BF16)]))
    spans = plan_spans(targets(stored), 128)
    assert [span.num_bytes for span in spans] == [128, 128, 128, 36]
    assert [piece.stored.name for piece in spans[0].pieces] == ["f.0", "f.1", "f.2"]


def test_host_memory_stays_at_two_buffers(tmp_path: Path) -> None:
    device = LateDevice()
    transfers = targets(write_file(tmp_path / "f", random_tensors([(1000, F32)])))
    carry(plan_spans(transfers, 64), [Staged(device, 64)])
    assert device.num_buffers == NUM_BUFFERS


def test_progress_counts_bytes_up_to_the_last_one(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    transfers = targets(write_file(tmp_path / "f", random_tensors([(100, F32)])))
    carry(plan_spans(transfers, 128), [InPlace(), InPlace()], lambda *call: calls.append(call))
    assert len(calls) == 4
    assert calls == sorted(calls)
    assert calls[-1] == (400, 400)


class Interrupted(BaseException):
    """As KeyboardInterrupt, which would end the test run if a test failed to catch it."""


@pytest.mark.parametrize("route", ROUTES)
def test_an_interrupt_ends_the_readers_at_once(route: str, tmp_path: Path) -> None:
    transfers = targets(write_file(tmp_path / "f", random_tensors([(100_000, F32)])))
    spans = plan_spans(transfers, 64)

    def interrupt(num_done: int, num_total: int) -> None:
        raise Interrupted

    counting = Counting(ROUTES[route](64))
    with pytest.raises(Interrupted):
        carry(spans, [counting], interrupt)
    assert 0 < counting.num_spans < len(spans)
    assert counting.is_finished


class Counting:
    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier
        self.num_spans = 0
        self.is_finished = False

    def memory(self, span: Span) -> Iterable[memoryview]:
        return self._carrier.memory(span)

    def send(self, span: Span) -> None:
        self.num_spans += 1
        self._carrier.send(span)

    def finish(self) -> None:
        self.is_finished = True
        self._carrier.finish()


@pytest.mark.parametrize("route", ROUTES)
def test_a_file_that_shrinks_is_told_by_file_and_tensor(route: str, tmp_path: Path) -> None:
    path = tmp_path / "f"
    transfers = targets(write_file(path, random_tensors([(30, F32), (30, F32), (30, F32)])))
    os.truncate(path, 200)  # in the middle of the second
    with pytest.raises(ModelLoadError, match=r"/f: tensor f\.1 cannot be read: the file became shorter"):
        carry(plan_spans(transfers, 1024), [ROUTES[route](1024) for _ in range(3)])


def test_a_file_that_is_gone_is_told_by_file_and_tensor(tmp_path: Path) -> None:
    transfers = targets(write_file(tmp_path / "f", random_tensors([(30, F32)])))
    (tmp_path / "f").unlink()
    with pytest.raises(ModelLoadError, match=r"/f: tensor f\.0 cannot be read: .*No such file"):
        carry(plan_spans(transfers, 64), [InPlace()])


class Failing(LateDevice):
    def copy(self, stored: torch.Tensor, target: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("no room")


def test_what_a_device_raises_reaches_the_caller(tmp_path: Path) -> None:
    transfers = targets(write_file(tmp_path / "f", random_tensors([(1000, F32)])))
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        carry(plan_spans(transfers, 64), [Staged(Failing(), 64), Staged(Failing(), 64)])
