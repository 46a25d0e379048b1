"""Which model drafts for which, and whether it can. Knows names, folders and vocabularies; knows nothing of weights.

A draft's token ids are taken as they are, so each must stand for the same text in both models. Names do not tell:
TinyLlama has Llama 2's vocabulary, which is not Llama 3's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from autobot_llm.engine.tokenizer import Tokenizer
from autobot_llm.errors import ConfigurationError

TINY_LLAMA = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"


@dataclass(frozen=True, slots=True)
class DraftRecommendation:
    """A draft for a model. `expected_speedup` is what the pair is said to give on a GPU, not a measurement of ours."""

    draft_model: str
    expected_speedup: float


DRAFT_MODEL_RECOMMENDATIONS: dict[str, DraftRecommendation] = {
    "meta-llama/Llama-2-7b-chat-hf": DraftRecommendation(TINY_LLAMA, 1.5),
    "meta-llama/Llama-2-13b-chat-hf": DraftRecommendation(TINY_LLAMA, 1.7),
    "meta-llama/Llama-2-70b-chat-hf": DraftRecommendation("meta-llama/Llama-2-7b-chat-hf", 1.8),
    "mistralai/Mistral-7B-Instruct-v0.1": DraftRecommendation(TINY_LLAMA, 1.5),
    "Qwen/Qwen2-7B-Instruct": DraftRecommendation("Qwen/Qwen2-0.5B-Instruct", 1.6),
}
"""Pairs by the model's name. Whether a pair fits is found out from the two vocabularies, whoever recommends it."""

_BY_FAMILY = (
    ("qwen", "Qwen/Qwen2-0.5B-Instruct"),
    ("phi", "microsoft/phi-1_5"),
)


def recommended_draft(model: str) -> str:
    """The name of a draft for a model of that name: the table's, else its family's, else TinyLlama."""
    name = model.rstrip("/").rsplit("/", 1)[-1].lower()
    for known, recommendation in DRAFT_MODEL_RECOMMENDATIONS.items():
        known_name = known.rsplit("/", 1)[-1].lower()
        if name in (known_name, known_name.removesuffix("-hf").removesuffix("-chat").removesuffix("-instruct")):
            return recommendation.draft_model
    return next((draft for family, draft in _BY_FAMILY if family in name), TINY_LLAMA)


def find_draft(folder: Path) -> Path | None:
    """The folder of a draft for the model in `folder`, of those beside it: `<model>-draft`, else the recommended one
    under its name, with or without its owner's. None where there is none."""
    owner, name = recommended_draft(folder.name).split("/")
    places = (
        folder.with_name(f"{folder.name}-draft"),
        folder.with_name(name),
        folder.parent / owner / name,
        folder.parent.parent / owner / name,
        folder.with_name(f"{owner}--{name}"),
    )
    return next((place for place in places if (place / "config.json").is_file() and place != folder), None)


def why_no_draft(target: Tokenizer, draft: Tokenizer) -> str | None:
    """Why one model's tokens are no drafts for another's; None where they are.

    Every id that the draft has must be the same token in the target; the target may have more.
    """
    mine, its = target.vocabulary, draft.vocabulary
    differing = [token_id for token_id, token in its.items() if mine.get(token_id) != token]
    if not differing:
        return None
    first = min(differing)
    other = "does not have it" if first not in mine else f"has {mine[first]!r} there"
    return (
        f"its vocabulary is another one: {len(differing):,} of its {len(its):,} tokens differ, the first is {first} "
        f"({its[first]!r}), where the model {other}"
    )


def check_draft(target: Tokenizer, draft: Tokenizer, model: str) -> None:
    """Raise ConfigurationError, saying why, where a draft model's tokens are not those of `model`."""
    if (why := why_no_draft(target, draft)) is not None:
        raise ConfigurationError(f"it cannot draft for {model}: {why}; expected a model with the same tokenizer")
