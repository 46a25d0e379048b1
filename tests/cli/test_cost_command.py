"""`autobot-llm cost` shows the account that requests have left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from autobot_llm.cli.main import cli, main
from autobot_llm.cloud.ledger import FILE_NAME, Ledger
from autobot_llm.types import Usage

USAGE = Usage(prompt_tokens=1500, completion_tokens=20, cached_tokens=1000)


def run(cache_dir: Path, *arguments: str, **environ: str) -> Result:
    return CliRunner().invoke(cli, ["cost", *arguments], env={"AUTOBOT_CACHE_DIR": str(cache_dir), **environ})


async def spend(cache_dir: Path) -> None:
    ledger = Ledger(cache_dir / FILE_NAME)
    await ledger.start()
    ledger.add("openai", "gpt-4o", "team", USAGE, spent=1.25, saved=0.5)
    ledger.add("anthropic", "claude-sonnet-5", "", USAGE, spent=2.0, saved=0.0)
    await ledger.close()


async def test_each_model_has_a_line_and_the_sum_is_told(tmp_path: Path) -> None:
    await spend(tmp_path)
    done = run(tmp_path, AUTOBOT_CLOUD_BUDGET_PER_DAY="5")
    assert done.exit_code == 0, done.output
    (line,) = (one for one in done.output.splitlines() if "openai/gpt-4o" in one)
    assert line.split()[1:] == ["openai/gpt-4o", "team", "1", "1,500", "1,000", "20", "1.2500", "0.5000"]
    assert "3.2500 dollars since" in done.output
    assert "3.2500 of 5 dollars of today's budget" in done.output


async def test_json_holds_every_line_as_it_is(tmp_path: Path) -> None:
    await spend(tmp_path)
    told = json.loads(run(tmp_path, "--json", "--days", "1").output)
    assert told["dollars_spent"] == 3.25
    assert [line["model"] for line in told["lines"]] == ["claude-sonnet-5", "gpt-4o"]
    assert told["lines"][1]["tenant"] == "team"


def test_nothing_spent_is_no_error(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.exit_code == 0
    assert done.output.startswith("0.0000 dollars since")


def test_a_file_that_is_no_account_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"not a database" * 50)
    monkeypatch.setenv("AUTOBOT_CACHE_DIR", str(tmp_path))
    assert main(["cost"]) == 2
    assert FILE_NAME in capsys.readouterr().err
