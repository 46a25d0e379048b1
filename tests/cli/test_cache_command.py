"""`autobot-llm cache`: what is kept can be counted, looked at and removed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autobot_llm.cli.main import main
from autobot_llm.interface import LLMInterface
from autobot_llm.providers.scripted import ScriptedProvider
from autobot_llm.settings import load_settings


async def kept(*texts: str) -> None:
    provider = ScriptedProvider(["Good ", "day"], name="native", models=("tiny",))
    async with LLMInterface(load_settings(env_file=None), providers={"native": provider}) as llm:
        for text in texts:
            await llm.generate_response(text, temperature=0)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["cache", *arguments]) == 0
    return capsys.readouterr().out


def test_answers_can_be_counted_looked_at_and_removed(capsys: pytest.CaptureFixture[str]) -> None:
    import asyncio

    asyncio.run(kept("a", "b"))
    assert printed(capsys, "stats").startswith("2 answers, ")
    assert json.loads(printed(capsys, "stats", "--json"))["num_entries"] == 2
    listed = json.loads(printed(capsys, "inspect", "--json"))
    assert [(one["provider"], one["model"]) for one in listed] == [("native", "tiny")] * 2
    assert len(printed(capsys, "inspect", "--limit", "1").splitlines()) == 1
    (shown,) = json.loads(printed(capsys, "inspect", listed[0]["key"], "--json"))
    assert shown["text"] == "Good day"
    assert "Good day" in printed(capsys, "inspect", listed[1]["key"][:8])
    assert json.loads(printed(capsys, "clear", "--json"))["num_removed"] == 2
    assert printed(capsys, "stats").startswith("0 answers, ")


def test_what_is_not_there_and_what_cannot_be_reached_are_errors(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert main(["cache", "inspect", "abcd"]) == 1
    assert "begins with abcd" in capsys.readouterr().err
    monkeypatch.setenv("AUTOBOT_REDIS_URL", "redis://:hunter2@127.0.0.1:1")
    assert main(["cache", "stats"]) == 1
    told = capsys.readouterr().err
    assert "127.0.0.1:1 does not answer" in told
    assert "hunter2" not in told
