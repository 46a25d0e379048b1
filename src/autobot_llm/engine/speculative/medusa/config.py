"""The sizes of Medusa's heads and of their tree, and where published heads are. Knows numbers; knows no tensor."""

from __future__ import annotations

from dataclasses import dataclass

from autobot_llm.errors import ConfigurationError

NUM_RANKS = 10
"""The candidates of each head that may enter the tree."""

TREE_CANDIDATES = 64
"""The rows of a tree's verification, unless told otherwise."""

MEDUSA_CHECKPOINTS = {
    "lmsys/vicuna-7b-v1.3": "FasterDecoding/medusa-vicuna-7b-v1.3",
    "lmsys/vicuna-13b-v1.3": "FasterDecoding/medusa-vicuna-13b-v1.3",
    "lmsys/vicuna-33b-v1.3": "FasterDecoding/medusa-vicuna-33b-v1.3",
    "meta-llama/Llama-2-7b-chat-hf": "FasterDecoding/medusa-llama-2-7b",
}
"""Published heads by the model that they were trained for."""


@dataclass(frozen=True, slots=True)
class MedusaConfig:
    """How many heads, for a model of which sizes, and how their candidates are verified.

    `tree_candidates` is the most rows of one verification, the known token at the root included. `max_steps` is the
    most verifications of one answer. `typical_acceptance_threshold` is the paper's epsilon, in (0, 1]; it has an effect
    where typical acceptance, which is lossy, is asked for. Raises ConfigurationError.
    """

    num_heads: int = 5
    hidden_size: int = 4096
    vocab_size: int = 32000
    tree_candidates: int = TREE_CANDIDATES
    max_steps: int = 512
    typical_acceptance_threshold: float = 0.3

    def __post_init__(self) -> None:
        for name, least in (
            ("num_heads", 1),
            ("hidden_size", 1),
            ("vocab_size", 2),
            ("tree_candidates", 2),
            ("max_steps", 1),
        ):
            if getattr(self, name) < least:
                raise ConfigurationError(f"{name}={getattr(self, name)}: expected {least} or more")
        if not 0.0 < self.typical_acceptance_threshold <= 1.0:
            raise ConfigurationError(
                f"typical_acceptance_threshold={self.typical_acceptance_threshold}: expected more than 0, at most 1"
            )
