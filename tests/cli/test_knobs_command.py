"""`autobot-llm knobs`, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autobot_llm.cli.main import main


@pytest.fixture(autouse=True)
def an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def output(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    assert main(["knobs", *arguments]) == status
    printed = capsys.readouterr()
    return printed.err if status else printed.out


def row_of(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.split()[:1] == [name])


def test_the_table_tells_each_knobs_fate_and_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "--engine", "vllm", "--version", "0.33", "--config", "OPTIMIZED_VLLM_CONFIG")
    assert "removed in 0.10.1.1" in row_of(text, "num_scheduler_steps")
    assert "never existed" in row_of(text, "enable_async_output_proc")
    assert "speculative_config.method=ngram" in row_of(text, "speculative_model")
    assert "command line   vllm serve MODEL --enable-chunked-prefill" in text
    assert "by the facts of 0.33.0" in text


def test_without_a_config_the_settings_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOBOT_KV_CACHE_DTYPE", "int8")
    monkeypatch.setenv("AUTOBOT_DEFAULT_LLM_MODEL", "my/model")
    text = output(capsys, "--version", "0.33")
    assert "kv_cache_dtype=int8_per_token_head" in row_of(text, "AUTOBOT_KV_CACHE_DTYPE")
    assert "vllm serve my/model " in text
    text = output(capsys, "--engine", "ollama")
    assert "environment    OLLAMA_KV_CACHE_TYPE=q8_0" in text
    assert "environment    OLLAMA_FLASH_ATTENTION=1" in text


def test_what_our_engine_is_told_can_be_pasted_into_an_environment_file(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "--engine", "native", "--config", "OPTIMIZED_VLLM_CONFIG")
    assert "setting        AUTOBOT_PREFIX_CACHING=true" in text
    assert "setting        AUTOBOT_SWAP_MEMORY=4GiB" in text


def test_nothing_to_tell_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no setting that concerns ollama was changed" in output(capsys, "--engine", "ollama")


def test_configs_are_read_from_json_and_toml_and_a_later_one_counts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "one.json").write_text('{"max_num_seqs": 8, "block_size": 16}', encoding="utf-8")
    (tmp_path / "two.toml").write_text("max_num_seqs = 9\n[speculative_config]\nmethod = 'ngram'\n", encoding="utf-8")
    text = output(capsys, "--version", "0.33", "--config", "one.json", "--config", "two.toml")
    assert "vllm serve MODEL --max-num-seqs 9 --block-size 16" in text
    assert "left out" in row_of(text, "speculative_config.method")


def test_json_holds_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(output(capsys, "--version", "0.33", "--config", "KV_CACHE_CONFIG", "--json"))
    fates = {knob["name"]: knob["fate"] for knob in document["knobs"]}
    assert fates == {"sliding_window": "never existed", "kv_cache_dtype": "renamed", "block_size": "passed"}
    assert document["arguments"] == ["--kv-cache-dtype", "int8_per_token_head", "--block-size", "16"]
    assert document["facts_from"] == "0.33.0"
    assert document["read_versions"][0] == "0.8.5"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engine", "sglang"], ["engine 'sglang'", "vllm, ollama, native"]),
        (["--version", "0.7"], ["version '0.7'", "0.8 to 0.33"]),
        (["--version", "newest"], ["version 'newest'", "0.8 to 0.33"]),
        (["--config", "missing.json"], ["missing.json", "OPTIMIZED_VLLM_CONFIG"]),
        (["--config", "list.json"], ["list.json", "an object of knobs"]),
        (["--config", "broken.json"], ["broken.json cannot be read"]),
        (["--config", "unknown.json"], ["unknown knob 'max_num_seq'", "did you mean max_num_seqs?"]),
    ],
)
def test_a_mistake_is_named_with_what_is_accepted(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "list.json").write_text("[1]", encoding="utf-8")
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    (tmp_path / "unknown.json").write_text('{"max_num_seq": 1}', encoding="utf-8")
    error = output(capsys, *arguments, status=2)
    assert error.startswith("error: ")
    for word in words:
        assert word in error


def test_the_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Examples:\n    autobot-llm knobs" in output(capsys, "--help")
