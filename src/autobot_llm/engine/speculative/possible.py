"""Leave out of a draft what its answer cannot become. Knows drafts, stop tokens and grammars, and not who drafts."""

from __future__ import annotations

from autobot_llm.engine.batching.draft_tree import ROOT, leaves, path_to
from autobot_llm.engine.grammar.matcher import Matcher
from autobot_llm.engine.sequence import Sequence
from autobot_llm.engine.speculative.proposer import Draft


def possible(draft: Draft, sequence: Sequence) -> Draft:
    """The draft without what comes after a stop token, and without what the answer's grammar forbids there; of a tree
    every token goes whose path is cut."""
    stop_ids, matcher = sequence.params.stop_token_ids, sequence.matcher
    if draft.parents is None:
        number = next((i + 1 for i, token_id in enumerate(draft.token_ids) if token_id in stop_ids), None)
        draft = draft if number is None else draft.first(number)
        return draft if matcher is None else draft.first(matcher.num_allowed(draft.token_ids))
    token_ids, parents = draft.token_ids, draft.parents
    kept: set[int] = set()
    for node, parent in enumerate(parents):
        if parent == ROOT or (parent in kept and token_ids[parent] not in stop_ids):
            kept.add(node)
    draft = draft.only(sorted(kept))
    return draft if matcher is None else draft.only(_allowed(draft, matcher))


def _allowed(draft: Draft, matcher: Matcher) -> list[int]:
    parents = draft.parents
    assert parents is not None
    found: set[int] = set()
    for leaf in leaves(parents):
        path = path_to(parents, leaf)
        found.update(path[: matcher.num_allowed([draft.token_ids[node] for node in path])])
    return sorted(found)
