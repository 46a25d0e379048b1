"""Write a model folder as Hugging Face does, one tensor at a time. Knows files; knows nothing of what is in a tensor.

Where each tensor goes is planned from the shapes alone, so no more than one of them needs to exist, in any order.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

STORED_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# of quantized matrices and what belongs to them
PACKED_NAMES = {torch.int8: "I8", torch.int32: "I32", torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3"}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True, slots=True)
class _Shard:
    file_name: str
    header: bytes
    offsets: Mapping[str, int]  # from the start of the file
    num_bytes: int


def write_folder(
    folder: Path,
    *,
    config: Mapping[str, Any],
    dtype: torch.dtype | Mapping[str, torch.dtype],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    copies: Iterable[Path],
    shard_bytes: int = SHARD_BYTES,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write config.json, the tensors and copies of those of `copies` that exist; return the bytes of all tensors.

    `tensors` are those of `shapes`, in any order, of `dtype` (or of that of each name) and on any device. The folder
    appears under its name when it is complete, and not at all after an error. `on_progress(num_bytes_done,
    num_bytes_total)` is called after each tensor. Raises FileExistsError where there is something already, OSError for
    a disk without room.
    Format: safetensors (a length, a JSON header, the bytes), with an index over the shards if there are several.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already")
    dtypes = dict.fromkeys(shapes, dtype) if isinstance(dtype, torch.dtype) else dtype
    shards = _plan(shapes, dtypes, shard_bytes)
    num_total = sum(shard.num_bytes for shard in shards)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (num_free := shutil.disk_usage(folder.parent).free) < num_total:
        raise OSError(f"{folder.parent}: {num_total / 1e9:.1f} GB are needed, {num_free / 1e9:.1f} GB are free")
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    partial.mkdir()
    try:
        _write_tensors(partial, shards, tensors, num_total, on_progress)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if len(shards) > 1:
            _write_index(partial, shards, num_total)
        for file in copies:
            if file.exists():
                shutil.copyfile(file, partial / file.name)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial)
        raise
    return num_total


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """An `on_progress` for bytes that draws a bar on stderr, if that is a terminal, until the context ends."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(title, total=None)
        yield lambda num_done, num_total: progress.update(task, completed=num_done, total=num_total)


def _plan(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], shard_bytes: int) -> list[_Shard]:
    sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
    groups: list[list[str]] = [[]]
    for name, size in sizes.items():
        if groups[-1] and sum(sizes[other] for other in groups[-1]) + size > shard_bytes:
            groups.append([])
        groups[-1].append(name)
    return [_plan_shard(names, i, len(groups), shapes, sizes, dtypes) for i, names in enumerate(groups, start=1)]


def _plan_shard(
    names: list[str],
    number: int,
    num_shards: int,
    shapes: Mapping[str, tuple[int, ...]],
    sizes: Mapping[str, int],
    dtypes: Mapping[str, torch.dtype],
) -> _Shard:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    starts, end = {}, 0
    for name in names:
        starts[name], end = end, end + sizes[name]
        stored_name = (STORED_NAMES | PACKED_NAMES)[dtypes[name]]
        entries[name] = {"dtype": stored_name, "shape": shapes[name], "data_offsets": (starts[name], end)}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned in a mapped file
    header = len(text).to_bytes(8, "little") + text
    file_name = "model.safetensors" if num_shards == 1 else f"model-{number:05}-of-{num_shards:05}.safetensors"
    return _Shard(file_name, header, {name: len(header) + start for name, start in starts.items()}, end)


def _write_tensors(
    folder: Path,
    shards: list[_Shard],
    tensors: Iterable[tuple[str, torch.Tensor]],
    num_total: int,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    places: dict[str, tuple[BinaryIO, int]] = {}
    num_done = 0
    with ExitStack() as stack:
        for shard in shards:
            opened = stack.enter_context((folder / shard.file_name).open("wb"))
            opened.write(shard.header)
            places |= {name: (opened, offset) for name, offset in shard.offsets.items()}
        for name, tensor in tensors:
            file, offset = places.pop(name)
            file.seek(offset)
            num_done += file.write(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
            if on_progress is not None:
                on_progress(num_done, num_total)
    assert not places and num_done == num_total, f"not written: {sorted(places)[:3]}"


def _write_index(folder: Path, shards: list[_Shard], num_total: int) -> None:
    weight_map = {name: shard.file_name for shard in shards for name in shard.offsets}
    index = {"metadata": {"total_size": num_total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
