"""The results of `benchmarks/gpu_training.sh` as a page of tables in Markdown.

python benchmarks/training_table.py OUT > docs/results/training.md
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autobot_llm.errors import ConfigurationError
from autobot_llm.training.trees import read_metrics, tree_yields

SIZES = (8, 16, 32, 64)
METHODS = ("medusa", "medusa-2", "eagle3", "draft")
INTRODUCTION = """\
# Heads and drafts of the embedded model

Made by `benchmarks/gpu_training.sh`, written by `benchmarks/training_table.py`. Accuracy: the share of positions of the
target's own greedy answers to held-out prompts at which its choice is the first (top-1) or among the first five (top-5)
that are proposed there, by the place in the draft. What goes before that place is the answer itself.
"""
ABOUT_TREES = """
## Trees for the Medusa heads

Tokens of a step, the model's own included, that the best tree of so many nodes (the root included) would yield if
accuracies at different places were independent: an estimate, not a measurement. The tree is chosen by the overall
accuracies.

"""


def page(out: Path) -> Iterator[str]:
    """Line by line. Raises ConfigurationError for a folder without results."""
    yield from INTRODUCTION.splitlines()
    for method in METHODS:
        folder = out / method
        if method == "medusa-2" and not folder.exists():
            continue
        accuracies = read_metrics(folder)
        about: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        yield ""
        yield f"## {method}"
        yield ""
        yield f"{about['num_parameters']:,} trained parameters; {about['steps']:,} steps in {about['seconds']:.0f} s"
        yield f"beside the other trainings on one {about['device']}; {about['num_answers']:,} answers of"
        yield f"{about['num_answer_tokens']:,} tokens; measured with {about['num_held_out']} prompts."
        if "lossy" in about:
            yield f"Lossy: {about['lossy']}; after the same text it chooses the same token at {about['agreement']:.1%}"
            yield "of the positions. The figures are its heads'."
        yield ""
        places = range(1, 1 + len(accuracies.overall))
        yield "| | " + " | ".join(f"{place}: top-1 / top-5" for place in places) + " |"
        yield "|---|" + "---|" * len(accuracies.overall)
        for category in accuracies.by_category:
            pairs = zip(accuracies.top(1, category), accuracies.top(5, category), strict=True)
            shares = (f"{100 * one:.1f} / {100 * five:.1f} %" for one, five in pairs)
            yield f"| {category} | " + " | ".join(shares) + " |"
    yield from ABOUT_TREES.splitlines()
    yields = tree_yields(read_metrics(out / "medusa"), SIZES)
    yield "| nodes | depth | " + " | ".join(yields[0].expected) + " |"
    yield "|---|---|" + "---|" * len(yields[0].expected)
    for tree in yields:
        figures = " | ".join(f"{tokens:.2f}" for tokens in tree.expected.values())
        yield f"| {tree.num_nodes} | {tree.max_depth} | {figures} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder with medusa, eagle3 and draft, and perhaps medusa-2")
    try:
        print("\n".join(page(parser.parse_args().out)))
    except ConfigurationError as error:
        sys.exit(f"training_table.py: {error.message}")


if __name__ == "__main__":
    main()
