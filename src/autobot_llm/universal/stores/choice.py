"""Which store processes share, and where in it each cache keeps its entries. Knows settings; opens nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from autobot_llm.settings import Settings
from autobot_llm.universal.request_key import FORMAT
from autobot_llm.universal.stores.base import SharedStore

Kind = Literal["answers", "vectors"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def open_store(settings: Settings, kind: Kind = "answers") -> SharedStore:
    """The shared store that the settings choose: Redis where there is an address, else a file. Nothing is opened yet.

    Raises ConfigurationError where Redis' client is not installed.
    """
    if settings.redis_url is not None:
        from autobot_llm.universal.stores.redis import ANSWERS, VECTORS, RedisStore

        return RedisStore(settings.redis_url, prefix=ANSWERS if kind == "answers" else VECTORS)
    from autobot_llm.universal.stores.sqlite import SqliteStore

    return SqliteStore(store_path(settings, kind))


def store_path(settings: Settings, kind: Kind = "answers") -> Path:
    """Where the file of a kind of entries is, if there is no Redis."""
    return settings.cache_dir / f"{kind}-{FORMAT}.sqlite3"
