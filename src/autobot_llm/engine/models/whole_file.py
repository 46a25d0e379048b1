"""Write files of tensors and of JSON, each there whole or not at all. Knows files; knows nothing of what is in them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file; the tensors may be on any device. Raises OSError for a disk without room."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(partial: Path) -> None:
        partial.touch()
        mode = partial.stat().st_mode  # as any new file's; the library would let its owner alone read it
        safetensors.torch.save_file(stored, str(partial), dict(metadata or {"format": "pt"}))
        partial.chmod(mode)

    write_whole(path, write)


def write_json(path: Path, document: Any) -> None:
    write_whole(path, lambda partial: partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8"))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file beside `path`, then put it there. What was there stays after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
