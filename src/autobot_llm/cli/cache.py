"""`autobot-llm cache`: look at and empty the store of kept answers. Knows how to print it; knows nothing of requests.

What a server has in its own memory besides, its metrics tell.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import click
import msgspec

from autobot_llm.errors import ProviderUnavailable
from autobot_llm.settings import load_settings
from autobot_llm.types import Finish, Start, TextDelta
from autobot_llm.universal.entries import Entry, unseal
from autobot_llm.universal.stores.base import Kept, SharedStore
from autobot_llm.universal.stores.choice import open_store

MOST_SEARCHED = 100_000

ResultT = TypeVar("ResultT")


class Shown(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One kept answer. Times are in seconds."""

    key: str
    provider: str
    model: str
    age: float
    expires_in: float
    num_bytes: int
    total_tokens: int
    seconds_to_make: float
    text: str | None = None


@click.group(
    short_help="Look at and empty the store of kept answers.",
    epilog="""\b
Examples:
  autobot-llm cache stats
  autobot-llm cache inspect
  autobot-llm cache inspect 3fa9 --json
  autobot-llm cache clear""",
)
def cache() -> None:
    """Look at and empty the store of kept answers: Redis where AUTOBOT_REDIS_URL is set, else a file."""


_as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@cache.command(short_help="Print how much is kept.")
@_as_json
def stats(as_json: bool) -> None:
    """Print how many answers are kept, and their size."""
    where, told = _with_store(lambda store: store.stats())
    if as_json:
        _print_json({"store": where} | msgspec.structs.asdict(told))
        return
    click.echo(f"{told.num_entries} answers, {told.num_bytes / 1e6:.1f} MB, in {where}")


@cache.command(short_help="Remove every kept answer.")
@_as_json
def clear(as_json: bool) -> None:
    """Remove every kept answer, of all tenants and models.

    Running servers keep what is in their own memory until it expires.
    """
    where, num_removed = _with_store(lambda store: store.clear())
    if as_json:
        _print_json({"store": where, "num_removed": num_removed})
        return
    click.echo(f"{num_removed} answers removed from {where}")


@cache.command(short_help="List kept answers, or show one.")
@click.argument("key", required=False)
@click.option("--limit", default=20, type=click.IntRange(min=1), show_default=True, help="Most answers to list.")
@_as_json
def inspect(key: str | None, limit: int, as_json: bool) -> None:
    """List kept answers, the newest first in a file, or show those whose KEY begins so, with their text.

    Requests are not kept, only a hash of each: the key.
    """
    _, kept = _with_store(lambda store: store.some(limit if key is None else MOST_SEARCHED))
    wanted = [one for one in kept if key is None or one.key.hex().startswith(key.lower())]
    shown = [_shown(one, entry, key is not None) for one in wanted if (entry := unseal(one.key, one.data)) is not None]
    if as_json:
        _print_json(shown)
        return
    if key is not None and not shown:
        raise click.ClickException(f"no kept answer has a key that begins with {key}")
    for one in shown:
        click.echo(
            f"{one.key}  {one.provider}/{one.model}  {one.total_tokens} tokens, {one.num_bytes} bytes, "
            f"{one.age:.0f} s old, {one.expires_in:.0f} s left"
        )
        if one.text is not None:
            click.echo(one.text)


def _shown(kept: Kept, entry: Entry, with_text: bool) -> Shown:
    start, finish, now = entry.events[0], entry.events[-1], time.time()
    assert isinstance(start, Start) and isinstance(finish, Finish), "only whole answers are kept"
    text = "".join(event.text for event in entry.events if isinstance(event, TextDelta))
    return Shown(
        key=kept.key.hex(),
        provider=start.provider,
        model=start.model,
        age=now - entry.created,
        expires_in=kept.expires - now,
        num_bytes=len(kept.data),
        total_tokens=finish.usage.total_tokens,
        seconds_to_make=entry.milliseconds / 1000,
        text=text if with_text else None,
    )


def _with_store(ask: Callable[[SharedStore], Awaitable[ResultT]]) -> tuple[str, ResultT]:
    """The store's name, and what it answers. Raises ProviderUnavailable where it does not."""
    store = open_store(load_settings())

    async def asked() -> ResultT:
        try:
            await store.ping()
            return await ask(store)
        except Exception as exc:
            raise ProviderUnavailable(f"{store.name} does not answer: {exc}", code="cache_error") from exc
        finally:
            await store.close()

    return store.name, asyncio.run(asked())


def _print_json(document: Any) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(document), indent=2))
