"""Trees of guesses for the tests: what comes is on some path of them, and everything else is wrong."""

from __future__ import annotations

import random

from autobot_llm.engine.batching.draft_tree import MAX_TREE_TOKENS, ROOT
from autobot_llm.engine.sequence import Sequence
from autobot_llm.engine.speculative.proposer import Draft


def guessed_tree(rng: random.Random, truth: list[int], num_right: int, num_wrong: int, vocab_size: int) -> Draft:
    """A tree of any shape and order, with the first `num_right` tokens of `truth` on one path."""
    token_ids: list[int] = []
    parents: list[int] = []
    children: dict[int, set[int]] = {ROOT: set()}
    depth_of_right = {ROOT: 0}
    last_right = ROOT
    turns = [True] * min(num_right, len(truth)) + [False] * num_wrong
    rng.shuffle(turns)
    for node, is_right in enumerate(turns):
        if is_right:
            parent, depth = last_right, depth_of_right[last_right]
            token_id, last_right = truth[depth], node
            depth_of_right[node] = depth + 1
        else:
            parent = rng.choice(list(children))
            depth = depth_of_right.get(parent, len(truth))
            taken = children[parent] | ({truth[depth]} if depth < len(truth) else set())
            token_id = next(t for t in iter(lambda: rng.randrange(vocab_size), None) if t not in taken)
        token_ids.append(token_id)
        parents.append(parent)
        children[parent].add(token_id)
        children[node] = set()
    return Draft(token_ids, "", parents)


class TreeGuesser:
    """FreeProposer that knows some texts' outputs by their prompts, and makes trees, lines and nothing of them."""

    name = "trees"

    def __init__(
        self,
        outputs: dict[tuple[int, ...], list[int]],
        seed: int,
        vocab_size: int,
        num_tokens: int = MAX_TREE_TOKENS - 1,
    ) -> None:
        self.num_trees = self.num_lines = 0
        self._outputs = outputs
        self._rng = random.Random(seed)
        self._vocab_size = vocab_size
        self._num_tokens = num_tokens

    def read(self, sequence: Sequence, num_tokens: int) -> None:
        pass

    def propose(self, sequence: Sequence, num_tokens: int) -> Draft | None:
        rng = self._rng
        truth = self.output_of(sequence)[sequence.num_output_tokens :]
        num_right = min(rng.randint(0, 12), len(truth), num_tokens)
        match rng.randrange(5):
            case 0:
                return None
            case 1:
                self.num_lines += 1
                wrong = [rng.randrange(self._vocab_size) for _ in range(rng.randint(0, 3))]
                return Draft(truth[:num_right] + wrong) if num_right + len(wrong) else None
            case _:
                self.num_trees += 1
                num_wrong = rng.randint(0, max(0, min(num_tokens, self._num_tokens) - num_right))
                return guessed_tree(rng, truth, num_right, num_wrong, self._vocab_size)

    def output_of(self, sequence: Sequence) -> list[int]:
        return self._outputs[tuple(sequence.token_ids[: sequence.num_prompt_tokens])]

    def forget(self, sequence: Sequence) -> None:
        pass
