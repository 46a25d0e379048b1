"""A request for embeddings in the engine's terms, and its answer. Knows texts and token ids, no tensors."""

from __future__ import annotations

import asyncio
import contextlib
import secrets

from autobot_llm.engine.embedding import TextEmbedding
from autobot_llm.engine.engine import Engine
from autobot_llm.engine.service import EngineService
from autobot_llm.errors import ProviderUnavailable, UnsupportedError
from autobot_llm.providers.native.to_engine import LONG_TEXT, refuse_hopeless
from autobot_llm.types import EmbeddingRequest, EmbeddingResponse, Usage


async def embed_inputs(service: EngineService, request: EmbeddingRequest, *, model: str) -> EmbeddingResponse:
    """See `Embedder.embed`. Requests under way wait for a few hundred tokens at a time.

    A text gets the special tokens that the tokenizer puts around it; token ids are taken as they are.
    """
    engine = service.engine
    assert engine is not None, "a started service has an engine"
    size = engine.config.hidden_size
    if request.dimensions not in (None, size):
        raise UnsupportedError(
            f"dimensions={request.dimensions}: the vectors of model {model!r} have {size}", param="dimensions"
        )
    for field in request.extra_body:
        raise UnsupportedError(f"the native engine does not know the field {field!r}", param=field)
    for place, one in enumerate(request.inputs):
        if isinstance(one, str):
            refuse_hopeless(engine, one, f"input[{place}]")
    is_long = sum(map(len, request.inputs)) > LONG_TEXT
    texts = await asyncio.to_thread(_encoded, engine, request) if is_long else _encoded(engine, request)
    embedding = TextEmbedding(texts)
    try:
        while not await service.run(embedding.advance):
            pass
    finally:
        with contextlib.suppress(ProviderUnavailable):  # an engine that stopped has no blocks
            service.post(embedding.release)
    return EmbeddingResponse(
        vectors=tuple(embedding.vectors),
        model=model,
        provider="native",
        usage=Usage(prompt_tokens=sum(map(len, texts)), completion_tokens=0),
        request_id=request.request_id or secrets.token_hex(12),
    )


def _encoded(engine: Engine, request: EmbeddingRequest) -> list[list[int]]:
    return [engine.tokenizer.encode(one) if isinstance(one, str) else one for one in request.inputs]
