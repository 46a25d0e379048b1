"""Speculation as a caller sees it: the same answers, a line in the report, figures on the metrics page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autobot_llm import LLMInterface, LLMResponse, Settings, load_settings
from autobot_llm.errors import ConfigurationError
from autobot_llm.providers.native.provider import ASSETS, speculation_options

TEXT = (
    "The fox ran over the hill and the dog ran after the fox. The fox hid under the old oak tree, and the dog sat down."
)


def settings(cache_dir: Path, **overrides: Any) -> Settings:
    values = {"cpu_threads": 1, "max_model_len": 512, "cache_enabled": False, "cache_dir": cache_dir}
    return load_settings(environ={}, env_file=None, overrides=values | overrides)


async def answer(llm: LLMInterface, **fields: Any) -> LLMResponse:
    request = f"{TEXT}\n\nRepeat this text."
    return await llm.chat_completion([{"role": "user", "content": request}], max_tokens=80, **fields)


async def test_the_report_the_status_and_the_figures_say_what_drafts_did(tmp_path: Path) -> None:
    answers = {}
    for method in ("none", "ngram", "draft", "eagle3", "auto"):
        async with LLMInterface(settings(tmp_path, speculation_method=method)) as llm:
            answers[method] = [(await answer(llm, temperature=0.0)).content for _ in range(3)]
            answers[method].append((await answer(llm, temperature=0.8, seed=5)).content)
            last = await answer(llm, temperature=0.0)
            lines = {line.name: line for line in last.optimizations}
            line = lines["speculative_decoding"]
            details = llm.get_all_provider_status()["native"].details
            figures = llm.get_metrics()["native"]
            assert "speculation" in details
            if method == "none":
                assert not line.applied and "AUTOBOT_SPECULATION" in line.reason
                assert figures["num_draft_tokens"] == 0
            elif method == "ngram":
                assert line.applied and "drafted tokens accepted" in line.reason and "tokens per step" in line.reason
                assert line.milliseconds_saved is not None and not line.lossy
                assert figures["num_draft_tokens"] >= figures["num_accepted_tokens"] > 0
                assert 0 < figures["speculation_acceptance_rate"] <= 1
                assert "acceptance of ngram" in details
            elif method == "eagle3":
                assert details["speculation"].startswith(method)
    assert all(found == answers["none"] for found in answers.values())


@pytest.mark.parametrize(
    ("method", "runs", "why"),
    [
        ("medusa", True, "medusa, where measured"),
        ("ngram", False, "ngram drafts; AUTOBOT_SPECULATION_METHOD=medusa"),
        ("none", False, "switched off"),
    ],
)
async def test_it_is_told_whether_medusas_heads_draft(tmp_path: Path, method: str, runs: bool, why: str) -> None:
    async with LLMInterface(settings(tmp_path, speculation_method=method)) as llm:
        row = next(row for row in llm.get_optimizations() if row.provider == "native")
    heads = next(cell for cell in row.optimizations if cell.name == "medusa_heads")
    assert (heads.could_apply, heads.runs) == (True, runs)
    assert heads.reason.startswith(why)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"speculation_heads": "/no/such/folder"}, "AUTOBOT_SPECULATION_HEADS='/no/such/folder': expected"),
        (
            {"speculation_method": "medusa", "speculation_heads": str(ASSETS / "tiny-eagle3")},
            "AUTOBOT_SPECULATION_HEADS='.*tiny-eagle3': .*no tensor of Medusa heads",
        ),
        (
            {"speculation_method": "eagle3", "speculation_heads": str(ASSETS / "tiny-draft")},
            "AUTOBOT_SPECULATION_HEADS='.*tiny-draft': .*num_hidden_layers=2",
        ),
        ({"speculation_draft_model": "/no/such/folder"}, "AUTOBOT_SPECULATION_DRAFT_MODEL='/no/such/folder': expected"),
    ],
)
async def test_what_cannot_draft_is_refused_at_the_start(
    tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    llm = LLMInterface(settings(tmp_path, **overrides))
    with pytest.raises(ConfigurationError, match=message):
        await llm.initialize()
    await llm.aclose()


async def test_heads_that_lie_nowhere_are_asked_for_by_name(tmp_path: Path) -> None:
    """A model of one's own, without heads: by name it says what to do, and auto does without."""
    model = tmp_path / "model"
    model.mkdir()
    for file in (ASSETS / "tiny").iterdir():
        (model / file.name).symlink_to(file)
    named = LLMInterface(settings(tmp_path, default_model=str(model), speculation_method="eagle3"))
    with pytest.raises(ConfigurationError, match="no model-eagle3 lies beside .*autobot-llm train eagle3"):
        await named.initialize()
    await named.aclose()
    (tmp_path / "model-medusa").symlink_to(ASSETS / "tiny-medusa")
    for overrides, method in (({}, "medusa"), ({"speculation_heads": str(ASSETS / "tiny-eagle3")}, "eagle3")):
        async with LLMInterface(settings(tmp_path, default_model=str(model), **overrides)) as llm:
            await answer(llm, temperature=0.0)
            details = llm.get_all_provider_status()["native"].details
            assert f"ngram and {method}" in details["speculation"]


def test_every_setting_of_speculation_reaches_the_engine(tmp_path: Path) -> None:
    asked = settings(
        tmp_path,
        speculation_method="draft",
        speculation_draft_model="tiny-draft",
        speculation_heads=ASSETS / "tiny-medusa",
        speculation_num_tokens=7,
        speculation_use_ngram=False,
        speculation_min_acceptance_rate=0.4,
    )
    options = speculation_options(asked)
    assert (options.method, options.num_tokens, options.use_ngram, options.min_acceptance_rate) == (
        "draft",
        7,
        False,
        0.4,
    )
    assert options.draft_model == ASSETS / "tiny-draft" and options.heads == ASSETS / "tiny-medusa"
    assert speculation_options(settings(tmp_path, speculation_enabled=False)).method == "none"
    assert speculation_options(settings(tmp_path)).method == "auto"
