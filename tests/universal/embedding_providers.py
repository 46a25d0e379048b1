"""A provider that answers and embeds as a test wants, for tests of what compares questions."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from autobot_llm.providers.scripted import Script, ScriptedProvider
from autobot_llm.types import EmbeddingRequest, EmbeddingResponse, Usage


class EmbeddingProvider(ScriptedProvider):
    """Plays `script`. A text's vector is the one that `vectors` has for it, else (1, 0); it can be slow, or fail."""

    def __init__(self, script: Script = ("the ", "answer"), *, name: str = "native", models: Sequence[str] = ("tiny",)):
        super().__init__(script, name=name, models=models)
        self.vectors: dict[str, list[float]] = {}
        self.embedded: list[list[str | list[int]]] = []
        self.tenants: list[str] = []
        self.failure: Exception | None = None
        self.patience = 0.0
        self.model = "vectors-1"

    async def embed(self, request: EmbeddingRequest) -> EmbeddingResponse:
        self.embedded.append(request.inputs)
        self.tenants.append(request.tenant)
        await asyncio.sleep(self.patience)
        if self.failure is not None:
            raise self.failure
        return EmbeddingResponse(
            vectors=tuple(self.vectors.get(str(one), [1.0, 0.0]) for one in request.inputs),
            model=self.model,
            provider=self.name,
            usage=Usage(prompt_tokens=len(request.inputs), completion_tokens=0),
            request_id=request.request_id or "",
        )
