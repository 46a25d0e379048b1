"""The caches of one interface together: their figures, and emptying them. Knows which there are; knows no request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import msgspec

from autobot_llm.errors import NotCached
from autobot_llm.providers.base import Link
from autobot_llm.types import CacheControl
from autobot_llm.universal.embedding_cache import EmbeddingCache
from autobot_llm.universal.response_cache import ResponseCache
from autobot_llm.universal.semantic.cache import Embed, SemanticCache

LinkT = TypeVar("LinkT", bound=Link)


class Caches:
    """Those among `links`; `embed` makes the vectors by which the semantic one compares."""

    def __init__(self, links: Mapping[str, Link], embed: Embed) -> None:
        self.answers = _among(links, ResponseCache)
        self.vectors = _among(links, EmbeddingCache)
        self.semantic = _among(links, SemanticCache)
        if self.semantic is not None and self.answers is not None:
            self.semantic.connect(self.answers, embed)

    def refuse_if_off(self, control: CacheControl | None) -> None:
        """Raises NotCached for a request that wants what is kept only, where nothing is."""
        if self.answers is None and control is not None and control.mode == "only-if-cached":
            raise NotCached("AUTOBOT_CACHE_ENABLED is false: no answer is kept", param="cache")

    def figures(self) -> dict[str, bool | int | float | str]:
        """`CacheMetrics`, and those of vectors and of the semantic cache after `vectors_` and `semantic_`."""
        if self.answers is None:
            return {"enabled": False}
        figures: dict[str, bool | int | float | str] = msgspec.structs.asdict(self.answers.figures())
        for name, link in (("vectors", self.vectors), ("semantic", self.semantic)):
            if link is not None:
                figures |= {f"{name}_{figure}": value for figure, value in link.figures().items()}
        return figures

    async def clear(self, *, l1: bool, l2: bool) -> dict[str, int]:
        """Remove what each level asked for holds, of all tenants and models, and return the numbers.

        Raises ProviderUnavailable where the shared store cannot be cleared.
        """
        removed: dict[str, int] = {}
        for cache in (self.answers, self.vectors):
            if cache is not None:
                for level, num_removed in (await cache.clear(l1=l1, l2=l2)).items():
                    removed[level] = removed.get(level, 0) + num_removed
        if l1 and self.semantic is not None:
            self.semantic.questions.clear()
        return removed


def _among(links: Mapping[str, Link], kind: type[LinkT]) -> LinkT | None:
    return next((link for link in links.values() if isinstance(link, kind)), None)
