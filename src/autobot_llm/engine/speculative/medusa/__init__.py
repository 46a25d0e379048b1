"""Medusa: heads on the model's last hidden state propose a tree of tokens, and one step verifies it.

Source: Cai et al., "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads"
(arXiv 2401.10774).
"""

from autobot_llm.engine.speculative.medusa.acceptance import Accepted
from autobot_llm.engine.speculative.medusa.config import MEDUSA_CHECKPOINTS, MedusaConfig
from autobot_llm.engine.speculative.medusa.decoder import Candidates, MedusaDecoder
from autobot_llm.engine.speculative.medusa.heads import MedusaHead, MedusaHeads
from autobot_llm.engine.speculative.medusa.tree import CandidateTree, choose_tree, expected_tokens

__all__ = [
    "MEDUSA_CHECKPOINTS",
    "Accepted",
    "CandidateTree",
    "Candidates",
    "MedusaConfig",
    "MedusaDecoder",
    "MedusaHead",
    "MedusaHeads",
    "choose_tree",
    "expected_tokens",
]
