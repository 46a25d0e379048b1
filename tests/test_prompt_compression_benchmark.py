"""The questions of the compression benchmark can be answered from their stories, and only from them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from prompt_compression import NUM_CHILDREN, PROSE, make_items, rules


def test_only_the_right_answer_is_in_the_story() -> None:
    for item in make_items(50):
        right, *wrong = item.answers
        assert f"{item.beginning}{right}" in item.story
        assert len(wrong) == NUM_CHILDREN - 1
        assert not any(answer in item.story for answer in wrong)
        assert item.beginning.split()[0] in item.question


def test_the_same_items_are_asked_every_time() -> None:
    assert make_items(20) == make_items(20)
    assert len(set(make_items(20))) == 20


def test_the_prompts_that_are_called_prose_hold_no_code() -> None:
    left = rules({"characters": len}, ratio=0.7)
    assert set(PROSE) < set(left)
    assert left["all prose together"]["characters"] < 0.8
    assert left["minimal"]["characters"] == 1.0
