"""Decide with which context a request's model is asked for, and how long it stays. Knows the catalog; asks no work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from autobot_llm.dialects.ollama.bodies import parse_duration
from autobot_llm.dialects.ollama.models import Running, Shown
from autobot_llm.errors import UnsupportedError
from autobot_llm.providers.ollama.catalog import Catalog
from autobot_llm.providers.ollama.context import Pin
from autobot_llm.providers.ollama.variants import full_name
from autobot_llm.settings import Settings


@dataclass(frozen=True, slots=True)
class Placed:
    """A request's model: its pin, which counts the answers under way, and what the server tells of it."""

    pin: Pin
    shown: Shown


class Placement:
    """The contexts of one server's models."""

    def __init__(self, settings: Settings) -> None:
        self._keep_alive = settings.ollama_keep_alive
        self._max_model_len = settings.max_model_len
        self.pins: dict[str, Pin] = {}

    async def place(
        self,
        catalog: Catalog,
        body: dict[str, Any],
        *,
        sized: Mapping[str, Any],
        max_tokens: int | None,
        asked: int | None = None,
    ) -> Placed:
        """Write the context and the stay in memory into `body`; the prompt to make room for is in `sized`.

        `asked` is a context that the request wants at least. The caller counts the answer in the pin at once, without
        waiting for anything in between. Errors: UnsupportedError where it asks for more than there can be, the
        client's errors.
        """
        model = str(body["model"])
        shown, running = await catalog.about(model)
        pin = self._pin(model, shown)
        if asked is not None and pin.limit is not None and asked > pin.limit:
            raise UnsupportedError(f"num_ctx={asked}: {model} has at most {pin.limit} tokens here", param="num_ctx")
        before = pin.num_ctx
        num_tokens = max(pin.estimate(sized, max_tokens), asked or 0)
        num_ctx = pin.choose(num_tokens, loaded=running.context_length if running is not None else 0)
        body["options"] = body.get("options", {}) | {"num_ctx": num_ctx}
        if num_ctx != before:
            catalog.forget_processes()
        if (stay := self._stay(running)) is not None:
            body.setdefault("keep_alive", stay)
        return Placed(pin, shown)

    def _pin(self, model: str, shown: Shown) -> Pin:
        """The model's pin, within the limits of the model and of the settings; its own file's context is the least."""
        pin = self.pins.setdefault(full_name(model), Pin())
        limits = [limit for limit in (shown.context_length, self._max_model_len) if limit is not None]
        pin.limit = min(limits, default=None)
        if not pin.num_ctx and shown.num_ctx:
            pin.num_ctx = min([shown.num_ctx, *limits])
        return pin

    def _stay(self, running: Running | None) -> str | None:
        """`keep_alive` as the settings have it, unless the model stays longer already: nobody's stay is cut short."""
        expires = running.expires() if running is not None else None
        if self._keep_alive is None or expires is None or expires.tzinfo is None:
            return self._keep_alive
        left = (expires - datetime.now(UTC)) / timedelta(seconds=1)
        return None if parse_duration(self._keep_alive) < left else self._keep_alive
