"""Cut requests into parts that a provider takes, on disk. Knows limits and files; sends nothing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import msgspec

from autobot_llm.cloud.batch_jobs.job import Part
from autobot_llm.cloud.batch_jobs.reading import Line, RequestWriter, at_line
from autobot_llm.cloud.batch_jobs.service import BatchService, Kind, Limits, WireItem
from autobot_llm.cloud.pricing import PriceTable, cost_of
from autobot_llm.errors import InvalidRequestError, RequestTooLarge
from autobot_llm.types import Usage

_MOST_DIGITS = 12
_FRAME_BYTES = 1024  # for what goes around the requests


class Staged(msgspec.Struct, frozen=True, kw_only=True):
    """What was cut: the parts, (position, part, custom_id) of each request, a digest of everything that is asked, and
    what it may cost at most in US dollars, as far as prices and `max_tokens` tell; `unpriced` are the other models.
    """

    parts: tuple[Part, ...]
    items: list[tuple[int, int, str]]
    digest: str
    dollars: float
    unpriced: tuple[str, ...]


class _Open:
    """A part that still has room."""

    def __init__(self, number: int, path: Path) -> None:
        self.number = number
        self.file: BinaryIO = path.open("wb")
        self.num_items = 0
        self.weight = 0
        self.num_bytes = 0

    def takes(self, item: WireItem, limits: Limits) -> bool:
        num_bytes = self.num_bytes + len(item.data) + 2 + _FRAME_BYTES
        return self.weight + item.weight <= limits.max_requests and num_bytes <= limits.max_bytes

    def add(self, item: WireItem, separator: bytes) -> None:
        self.num_bytes += self.file.write((separator if self.num_items else b"") + item.data)
        self.num_items += 1
        self.weight += item.weight

    def close(self) -> None:
        if not self.file.closed:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()


def wire_id(job: str, position: int) -> str:
    """The id of a request at the provider: the caller's may be anything, and this one names the job."""
    return f"{job}-{position}"


def position_of(job: str, custom_id: str) -> int | None:
    """The position that `wire_id` was given; None for an id that is none of the job's."""
    rest = custom_id.removeprefix(f"{job}-")
    is_position = rest != custom_id and rest.isascii() and rest.isdecimal() and len(rest) <= _MOST_DIGITS
    return int(rest) if is_position else None


def stage(
    job: str,
    lines: Iterable[Line],
    writer: RequestWriter,
    service: BatchService,
    prices: PriceTable,
    part_path: Callable[[int], Path],
    on_line: Callable[[int], None] | None = None,
) -> Staged:
    """Write the parts of `job` to the files that `part_path` names.

    Requests are spread over as few parts as their kinds and the provider's limits allow. `on_line` hears how many
    requests are written. Errors: InvalidRequestError, which begins with the line's number.
    """
    digest = hashlib.sha256(f"{service.name} {service.address}".encode())
    open_parts: dict[Kind, _Open] = {}
    all_parts: list[tuple[Kind, _Open]] = []
    items: list[tuple[int, int, str]] = []
    unpriced: dict[str, None] = {}
    dollars = 0.0
    try:
        for position, line in enumerate(lines):
            written = writer.write(wire_id(job, position), line)
            item = written.item
            part = open_parts.get(item.kind)
            if part is None or not part.takes(item, service.limits):
                if part is not None:
                    part.close()
                number = len(all_parts)
                part = open_parts[item.kind] = _Open(number, part_path(number))
                all_parts.append((item.kind, part))
                if not part.takes(item, service.limits):
                    raise at_line(line.number, _too_large(item, service))
            part.add(item, service.separator)
            items.append((position, part.number, line.custom_id))
            digest.update(msgspec.json.encode((line.custom_id, line.url, item.kind, line.body)))
            dollars += _most(prices, service.name, written.model, written.most, unpriced)
            if on_line is not None:
                on_line(position + 1)
    finally:
        for _, part in all_parts:
            part.close()
    parts = tuple(
        Part(
            job=job,
            number=part.number,
            url=kind.url,
            model=kind.model,
            headers=dict(kind.headers),
            num_items=part.num_items,
            num_bytes=part.num_bytes,
        )
        for kind, part in all_parts
    )
    return Staged(parts=parts, items=items, digest=digest.hexdigest(), dollars=dollars, unpriced=tuple(unpriced))


def _most(prices: PriceTable, provider: str, model: str, most: Usage, unpriced: dict[str, None]) -> float:
    price = prices.of(provider, model)
    if price is None:
        unpriced[model] = None
        return 0.0
    return cost_of(price, most, is_batch=True).spent


def _too_large(item: WireItem, service: BatchService) -> InvalidRequestError:
    limits = service.limits
    return RequestTooLarge(
        f"the request has {len(item.data):,} bytes and {item.weight:,} inputs; {service.name} takes batches of at most "
        f"{limits.max_bytes:,} bytes and {limits.max_requests:,} inputs"
    )
