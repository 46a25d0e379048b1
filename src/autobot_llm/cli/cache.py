"""`autobot-llm cache`: look at and empty the stores of kept answers and vectors. Knows how to print them, no requests.

What a server has in its own memory besides, its metrics tell.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import click
import msgspec

from autobot_llm.cli.group import Group
from autobot_llm.errors import ProviderUnavailable
from autobot_llm.settings import load_settings
from autobot_llm.types import Finish, Start, TextDelta
from autobot_llm.universal.entries import Entry, unseal
from autobot_llm.universal.stores.base import Kept, SharedStore
from autobot_llm.universal.stores.choice import KINDS, Kind, open_store

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
    cls=Group,
    short_help="Look at and empty the stores of kept answers and vectors.",
    epilog="""\b
Examples:
  autobot-llm cache stats
  autobot-llm cache inspect
  autobot-llm cache inspect 3fa9 --json
  autobot-llm cache clear""",
)
def cache() -> None:
    """Look at and empty what is kept: in Redis where AUTOBOT_REDIS_URL is set, else in files."""


_as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@cache.command(short_help="Print how much is kept.")
@_as_json
def stats(as_json: bool) -> None:
    """Print how many answers and vectors are kept, and their size.

    Which questions the semantic cache knows is in the memory of a running server; its metrics tell.
    """
    told = {kind: _with_store(lambda store: store.stats(), kind) for kind in KINDS}
    if as_json:
        shown = {kind: {"store": where} | msgspec.structs.asdict(one) for kind, (where, one) in told.items()}
        _print_json(shown["answers"] | {"vectors": shown["vectors"]})
        return
    for kind, (where, one) in told.items():
        click.echo(f"{one.num_entries} {kind}, {one.num_bytes / 1e6:.1f} MB, in {where}")


@cache.command(short_help="Remove every kept answer and vector.")
@_as_json
def clear(as_json: bool) -> None:
    """Remove every kept answer and vector, of all tenants and models.

    Running servers keep what is in their own memory until it expires.
    """
    told = {kind: _with_store(lambda store: store.clear(), kind) for kind in KINDS}
    if as_json:
        shown = {kind: {"store": where, "num_removed": num_removed} for kind, (where, num_removed) in told.items()}
        _print_json(shown["answers"] | {"vectors": shown["vectors"]})
        return
    for kind, (where, num_removed) in told.items():
        click.echo(f"{num_removed} {kind} removed from {where}")


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


def _with_store(ask: Callable[[SharedStore], Awaitable[ResultT]], kind: Kind = "answers") -> tuple[str, ResultT]:
    """The name of a kind's store, and what it answers. Raises ProviderUnavailable where it does not."""
    store = open_store(load_settings(), kind)

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
