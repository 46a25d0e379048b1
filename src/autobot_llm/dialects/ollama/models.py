"""Read what an Ollama server tells of its models and of itself. Knows its listings; knows nothing of connections."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any, TypeVar

import msgspec

from autobot_llm.errors import ProviderError

_NUM_CTX = re.compile(r"^num_ctx\s+(\d+)\s*$", re.MULTILINE)

KindT = TypeVar("KindT")


class Details(msgspec.Struct, frozen=True, omit_defaults=True):
    """What kind of model it is; `quantization_level` is such as "Q4_K_M" or "F16"."""

    format: str = ""
    family: str = ""
    families: list[str] | None = None
    parameter_size: str = ""
    quantization_level: str = ""
    parent_model: str = ""


class Tag(msgspec.Struct, frozen=True):
    """One entry of `/api/tags`: `size` is in bytes on disk."""

    name: str
    size: int = 0
    digest: str = ""
    modified_at: str = ""
    details: Details = Details()


class Running(msgspec.Struct, frozen=True):
    """One entry of `/api/ps`; `context_length` 0 is told by servers that do not tell."""

    name: str
    size: int = 0
    size_vram: int = 0
    expires_at: str = ""
    context_length: int = 0

    def expires(self) -> datetime | None:
        """When the model leaves the memory; None where that cannot be read."""
        try:
            return datetime.fromisoformat(self.expires_at)
        except ValueError:
            return None


class Shown(msgspec.Struct, frozen=True):
    """What `/api/show` tells of a model; `parameters` are its Modelfile's."""

    details: Details = Details()
    model_info: dict[str, Any] = msgspec.field(default_factory=dict)
    capabilities: list[str] = msgspec.field(default_factory=list)
    parameters: str = ""
    template: str = ""
    license: str | list[str] = ""
    modelfile: str = ""

    @property
    def context_length(self) -> int | None:
        """Tokens that the model was trained for."""
        found = self.model_info.get(f"{self.model_info.get('general.architecture')}.context_length")
        return found if isinstance(found, int) else None

    @property
    def num_parameters(self) -> int | None:
        found = self.model_info.get("general.parameter_count")
        return found if isinstance(found, int) else None

    @property
    def num_ctx(self) -> int | None:
        """The context that the model's own file asks for."""
        found = _NUM_CTX.search(self.parameters)
        return int(found[1]) if found else None


class _Tags(msgspec.Struct):
    models: list[Tag] | None = None


class _Processes(msgspec.Struct):
    models: list[Running] | None = None


class _Version(msgspec.Struct):
    version: str


class Progress(msgspec.Struct, frozen=True):
    """One line of a pull: what is being done, and how many bytes of how many of a layer have come."""

    status: str = ""
    digest: str = ""
    completed: int = 0
    total: int = 0
    error: str | None = None


def _decoded(data: bytes, kind: type[KindT], what: str) -> KindT:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.MsgspecError as exc:
        raise ProviderError(f"Ollama's {what} cannot be read: {exc}", code="bad_answer") from exc


def read_tags(data: bytes) -> list[Tag]:
    """Errors: ProviderError, as for all of these."""
    return _decoded(data, _Tags, "list of models").models or []


def read_processes(data: bytes) -> list[Running]:
    return _decoded(data, _Processes, "list of loaded models").models or []


def read_shown(data: bytes) -> Shown:
    return _decoded(data, Shown, "description of a model")


def read_progress(data: bytes) -> Progress:
    return _decoded(data, Progress, "progress of a pull")


def read_version(data: bytes) -> str:
    return _decoded(data, _Version, "version").version


def version_numbers(text: str) -> tuple[int, ...] | None:
    """The numbers of a version such as "0.12.11" or "0.40.0-rc6"; None for what has none, as a build of its own."""
    found = re.match(r"v?(\d+)\.(\d+)\.(\d+)", text)
    numbers = tuple(map(int, found.groups())) if found else None
    return None if numbers == (0, 0, 0) else numbers
