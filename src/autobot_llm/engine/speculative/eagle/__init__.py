"""EAGLE-3: one decoder layer that continues the target's own features drafts the next tokens.

Source: Li et al., "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time Test"
(arXiv 2503.01840).
"""

from autobot_llm.engine.speculative.eagle.checkpoint import load_eagle, save_eagle
from autobot_llm.engine.speculative.eagle.config import EagleConfig, default_feature_layers
from autobot_llm.engine.speculative.eagle.drafting import EagleDrafter, EagleTree
from autobot_llm.engine.speculative.eagle.model import EagleDraft

__all__ = [
    "EagleConfig",
    "EagleDraft",
    "EagleDrafter",
    "EagleTree",
    "default_feature_layers",
    "load_eagle",
    "save_eagle",
]
