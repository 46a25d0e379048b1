"""What fits: a model's memory from its config.json, on a card, at each quantization.

    plan = make_plan(folder, memory_bytes)
    plan.rows                     # one for each way to store weights and cache
    plan.recommendations          # settings for our engine, vLLM and Ollama

Knows sizes; reads no weights and imports no torch.
"""

from __future__ import annotations

from autobot_llm.tuning.plan.cards import CARDS, Card, card_named
from autobot_llm.tuning.plan.fit import CONTEXTS, Plan, Row, make_plan
from autobot_llm.tuning.plan.recommend import Recommendation, recommend

__all__ = ["CARDS", "CONTEXTS", "Card", "Plan", "Recommendation", "Row", "card_named", "make_plan", "recommend"]
