"""A text's tokens with their log probabilities, window by window. Knows texts and the engine's context, no tensors."""

from __future__ import annotations

import asyncio
import contextlib

from autobot_llm.engine.scoring import PromptScoring
from autobot_llm.engine.service import EngineService
from autobot_llm.errors import ProviderUnavailable
from autobot_llm.providers.base import ScoredToken


async def score_text(service: EngineService, text: str, before: str) -> tuple[ScoredToken, ...]:
    """See `TextScorer.score`. Requests under way wait for a few hundred tokens at a time."""
    engine = service.engine
    assert engine is not None, "a started service has an engine"
    tokenizer = engine.tokenizer
    ids, places = await asyncio.to_thread(tokenizer.encode_with_places, text)
    earlier = tokenizer.encode(before, add_special_tokens=False) if before else []
    if tokenizer.bos_token_id is not None:
        earlier = [tokenizer.bos_token_id, *earlier]
    size = engine.scheduler.max_model_len
    if len(earlier) + len(ids) > size:
        earlier = earlier[-(size // 2) :]
    everything = earlier + ids
    known: list[float | None] = [None] if ids and not earlier else []
    while len(known) < len(ids):
        done = len(earlier) + len(known)
        # A further window begins with what went before: half of the context.
        start = 0 if done + len(ids) - len(known) <= size else max(0, done - size // 2)
        known += (await _logprobs(service, everything[start : start + size]))[done - start - 1 :]
    return tuple(ScoredToken(*place, logprob) for place, logprob in zip(places, known, strict=True))


async def _logprobs(service: EngineService, token_ids: list[int]) -> list[float]:
    scoring = PromptScoring(token_ids)
    try:
        while not await service.run(scoring.advance):
            pass
    finally:
        with contextlib.suppress(ProviderUnavailable):  # an engine that stopped has no blocks
            service.post(scoring.release)
    return scoring.logprobs
