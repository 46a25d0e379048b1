"""`autobot-llm quantize`: a folder, a report that does not flatter, and nothing left behind by a mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from quantized_folders import small_model

from autobot_llm.cli.main import cli
from autobot_llm.errors import ConfigurationError

TEXT = "Once upon a time there was a little girl who had a big red ball. She ran and ran all day. " * 80


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return small_model(tmp_path / "model")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def run(*arguments: object, cache: Path) -> Result:
    environ = {"AUTOBOT_CACHE_DIR": str(cache), "AUTOBOT_COMPILED_STEP": "off"}
    return CliRunner().invoke(cli, ["quantize", *map(str, arguments)], env=environ)


def test_the_report_holds_sizes_quality_and_a_verdict(tmp_path: Path, model: Path, text: Path) -> None:
    out = tmp_path / "out"
    done = run(model, "--type", "gptq", "--calibration", text, "--samples", 4, "--length", 64, "--windows", 2, "--out",
               out, "--json", cache=tmp_path / "cache")  # fmt: skip
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (out / "config.json").exists()
    assert told["folder"] == str(out) and told["by"] == "autobot_llm"
    assert told["scheme"] == "W4A16 group 128"
    assert told["num_linear_bytes"] < 0.28 * told["num_linear_bytes_before"]
    assert "last tenth of the calibration text" in told["measured_on"]
    quality = told["quality"]
    assert quality["perplexity"] > 0 and quality["kl"] > 0 and 0 <= quality["top1_agreement"] <= 1
    assert quality["perplexity_change"] == pytest.approx(quality["perplexity"] / quality["perplexity_before"] - 1)
    worse = quality["perplexity_change"] > 0.05
    assert told["verdict"][0].startswith("worse" if worse else "linear weights take 7")


def test_without_a_text_nothing_is_said_of_quality(tmp_path: Path, model: Path) -> None:
    done = run(model, "--type", "fp8", "--out", tmp_path / "out", cache=tmp_path / "cache")
    assert done.exit_code == 0, done.output
    assert "perplexity" not in done.stdout
    assert "its quality was not measured" in done.stdout


def test_what_is_worse_is_not_called_better(tmp_path: Path, model: Path, text: Path) -> None:
    from autobot_llm.engine.quantization.quality import Quality
    from autobot_llm.engine.quantization.quantize import QuantizedFolder
    from autobot_llm.engine.quantization.scheme import Scheme
    from autobot_llm.providers.native.quantizing import _verdict

    made = QuantizedFolder(tmp_path, Scheme("int", 4, "group", 128), "autobot_llm", 1.0, 0, 60, 100, 30, 100)
    quality = Quality(100, 20.0, 10.0, None, 0.5, 0.5, 0, 4, 50.0, 100.0, 0.5, "eager")
    worse, slower = _verdict("gptq", made, quality)
    assert worse == "worse: perplexity is 100.00 % higher, and 5.00 % is what gptq may cost"
    assert slower == "decoding here is slower: 0.50 times the speed"
    good, faster = _verdict("gptq", made, Quality(100, 10.1, 10.0, 0.001, 0.01, 0.9, 3, 4, 150.0, 100.0, 1.5, "eager"))
    assert good == "linear weights take 70 % less, for +1.00 % of perplexity (lossy; 5.00 % is the limit)"
    assert faster == "decoding here is 1.50 times as fast"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--type", "int3"), "int3"),
        (("--type", "awq"), "--type awq needs --calibration FILE"),
        (("--type", "w4", "--group-size", "100"), "100"),
        ((), "--type"),
    ],
)
def test_a_mistake_is_told_by_name_and_leaves_nothing(
    tmp_path: Path, model: Path, arguments: tuple[str, ...], complaint: str
) -> None:
    done = run(model, *arguments, "--out", tmp_path / "out", cache=tmp_path / "cache")
    assert done.exit_code != 0
    assert complaint in (str(done.exception) if isinstance(done.exception, ConfigurationError) else done.output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
