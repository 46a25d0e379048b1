"""Find the stored tensors of a model folder: which file, which bytes, which shape. Knows safetensors, and no model.

Every header is checked against the shapes that the configuration asks for, so a truncated or foreign folder fails in
milliseconds, before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from autobot_llm.errors import ModelLoadError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# of quantized matrices and what belongs to them
PACKED_DTYPES = {"I8": torch.int8, "I32": torch.int32, "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn}
_LENGTH_BYTES = 8  # a file begins with the length of its header


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in a file: `num_bytes` bytes from byte `start`, little-endian, row-major."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The stored tensors that a model consists of, by name, and what each file was when its header was read."""

    tensors: Mapping[str, StoredTensor]
    identities: Mapping[Path, tuple[int, ...]]

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds every tensor exactly."""
        dtypes = iter({tensor.dtype for tensor in self.tensors.values()})
        common = next(dtypes)
        for dtype in dtypes:
            common = torch.promote_types(common, dtype)
        return common

    def read(self, name: str) -> torch.Tensor:
        """One tensor as it is stored; it may be mapped from its file. Raises ModelLoadError."""
        path = self.tensors[name].path
        try:
            with safe_open(str(path), framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor
        except (SafetensorError, OSError) as exc:
            raise ModelLoadError(f"{path}: tensor {name} cannot be read: {exc}") from exc

    def refuse_changed_files(self) -> None:
        """Raise ModelLoadError if a file is not what its header was read from: its tensors may be of two models."""
        for path, identity in self.identities.items():
            try:
                found = _identity(path)
            except OSError as exc:
                raise ModelLoadError(f"{path}: removed while it was read: {exc}") from exc
            if found != identity:
                raise ModelLoadError(f"{path}: changed while it was read; load the model again")


def open_checkpoint(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    model_type: str,
    may_ignore: frozenset[str] = frozenset(),
    packed: bool = False,
) -> Checkpoint:
    """Read the headers of a folder's safetensors, single or sharded, and find the tensors of `shapes` in them.

    `may_ignore` names tensors that may be stored although the model does not use them; `packed` accepts the dtypes of
    quantized folders, too. Raises ModelLoadError, naming file and tensor, for what is missing, truncated, of another
    shape or dtype, or not part of such a model.
    """
    headers, file_of = _read_headers(folder)
    _refuse_foreign_tensors(folder, set(file_of) - set(shapes) - may_ignore, model_type)
    tensors = {}
    for name, shape in shapes.items():
        if name not in file_of:
            raise ModelLoadError(f"{folder}: tensor {name} is missing from the safetensors files")
        tensors[name] = headers[file_of[name]].tensor(name, shape, STORED_DTYPES | (PACKED_DTYPES if packed else {}))
    identities = {header.path: header.identity for header in headers.values()}
    return Checkpoint(tensors, identities)


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that the folder stores, by name. Raises ModelLoadError."""
    headers, file_of = _read_headers(folder)
    return {name: headers[file_name].entries[name].shape for name, file_name in file_of.items()}


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Header:
    path: Path
    identity: tuple[int, ...]
    data_start: int
    entries: Mapping[str, _Entry]

    def tensor(self, name: str, shape: tuple[int, ...], dtypes: Mapping[str, torch.dtype]) -> StoredTensor:
        entry = self.entries[name]
        if entry.shape != shape:
            raise ModelLoadError(f"{self.path}: tensor {name} has shape {entry.shape}; config.json asks for {shape}")
        dtype = dtypes.get(entry.dtype)
        if dtype is None:
            accepted = ", ".join(dtypes)
            raise ModelLoadError(f"{self.path}: tensor {name} has dtype {entry.dtype}; expected one of {accepted}")
        start, stop = entry.data_offsets
        return StoredTensor(name, self.path, dtype, shape, self.data_start + start, stop - start)


def _read_headers(folder: Path) -> tuple[dict[str, _Header], dict[str, str]]:
    """The headers by file name, and the file name of every stored tensor."""
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).exists():
        header = _read_header(folder / SINGLE_FILE)
        return {SINGLE_FILE: header}, dict.fromkeys(header.entries, SINGLE_FILE)
    if not index.exists():
        raise ModelLoadError(f"{folder}: {_why_no_safetensors(folder)}")
    try:
        file_of = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
    except (OSError, msgspec.DecodeError, RecursionError) as exc:
        raise ModelLoadError(f"{index}: {exc}") from exc
    headers = {}
    for file_name in sorted(set(file_of.values())):
        if Path(file_name).name != file_name:
            raise ModelLoadError(f"{index}: weight_map: {file_name!r} is not the name of a file in the folder")
        headers[file_name] = _read_header(folder / file_name)
    for name, file_name in file_of.items():
        if name not in headers[file_name].entries:
            raise ModelLoadError(f"{folder / file_name}: tensor {name} is missing; {INDEX_FILE} lists it here")
    return headers, file_of


def _read_header(path: Path) -> _Header:
    """The header of one file. The library checks it, and does not tell where a tensor's bytes are."""
    try:
        identity = _identity(path)
        with safe_open(str(path), framework="np"):
            pass  # sizes, offsets without overlap or hole, and a file as long as they say
        with path.open("rb") as file:
            num_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            raw = msgspec.json.decode(file.read(num_bytes), type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in raw.items()}
    except FileNotFoundError as exc:
        raise ModelLoadError(f"{path}: no such file; {INDEX_FILE} lists it") from exc
    except (SafetensorError, OSError, msgspec.DecodeError) as exc:
        raise ModelLoadError(f"{path}: truncated, or not a safetensors file: {exc}") from exc
    return _Header(path, identity, _LENGTH_BYTES + num_bytes, entries)


def _identity(path: Path) -> tuple[int, ...]:
    """What changes when a file is written to, cut or replaced."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _refuse_foreign_tensors(folder: Path, unused: set[str], model_type: str) -> None:
    """A tensor that the decoder would not use means another model: computing without it would be wrong."""
    # old exports store the rotary frequencies
    foreign = sorted(name for name in unused if not name.endswith(".rotary_emb.inv_freq"))
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise ModelLoadError(
            f"{folder}: a {model_type} model of this config.json has no tensor {', '.join(foreign[:3])}{more}"
        )


def _why_no_safetensors(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    if any(folder.glob("pytorch_model*.bin")):
        return (
            "only pytorch_model.bin, which can run code when it is loaded; convert it: in transformers, "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
        )
    return f"neither {SINGLE_FILE} nor {INDEX_FILE}"
