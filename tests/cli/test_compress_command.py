"""`autobot-llm compress` shows a prompt before and after, from a file or a pipe, as text or as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from autobot_llm.cli.main import cli

PROMPT = "Please note that in order to answer, you read the page.\n\n```\nthe   code\n```\n"
SHORT = "To answer, you read the page.\n\n```\nthe   code\n```\n"


def run(*arguments: str, text: str | None = None, cache_dir: Path | None = None) -> Result:
    environ = {} if cache_dir is None else {"AUTOBOT_CACHE_DIR": str(cache_dir), "AUTOBOT_COMPILED_STEP": "off"}
    return CliRunner().invoke(cli, ["compress", *arguments], input=text, env=environ)


def test_a_file_is_shortened_and_the_figures_are_told(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT, encoding="utf-8")
    done = run(str(file), "--ratio", "0.99")
    assert done.exit_code == 0, done.output
    assert done.stdout == SHORT
    assert done.stderr == "19 -> 12 tokens, 63 % (estimated: a token for four characters)\n"


def test_a_pipe_is_read_and_json_holds_both_texts() -> None:
    done = run("-", "--json", text=PROMPT)
    told = json.loads(done.stdout)
    assert told["original_text"] == PROMPT
    assert told["compressed_tokens"] < told["original_tokens"]
    assert told["compression_ratio"] == told["compressed_tokens"] / told["original_tokens"]
    assert told["is_estimate"] is True and told["strategy"] == "rules" and told["target_ratio"] == 0.7


def test_the_context_of_a_question_is_chosen() -> None:
    text = "The dog sleeps in the garden all day.\n\nThe refund is paid within 5 days.\n\nBoats go up and down."
    done = run("-", "--strategy", "context", "--question", "When is the refund paid?", "--ratio", "0.5", text=text)
    assert done.stdout == "The refund is paid within 5 days.\n"


def test_the_embedded_model_prunes_and_counts(tmp_path: Path) -> None:
    text = "Once upon a time there was a little girl. She had 3 dogs and she did not like the big cat at all."
    done = run("-", "--strategy", "perplexity", "--ratio", "0.7", "--json", text=text, cache_dir=tmp_path)
    told = json.loads(done.stdout)
    assert not told["is_estimate"]
    assert 0.6 <= told["compression_ratio"] <= 0.7
    assert "3" in told["compressed_text"] and "not" in told["compressed_text"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("-", "--strategy", "context"), "needs a --question"),
        (("-", "--strategy", "zip"), "zip"),
        (("no-such-file",), "no-such-file"),
    ],
)
def test_a_wrong_argument_is_named(arguments: tuple[str, ...], complaint: str) -> None:
    done = run(*arguments, text=PROMPT)
    assert done.exit_code == 2
    assert complaint in done.stderr
