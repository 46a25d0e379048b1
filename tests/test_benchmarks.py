"""What the GPU benchmark's figures mean: definitions, tables and the running of sections. No GPU is needed."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import engine_gpu  # noqa: E402
from gpu.batching import LENGTHS  # noqa: E402
from gpu.bench import EMBEDDED, Bench, stored_weight_bytes, weight_bytes_read_per_step  # noqa: E402
from gpu.correctness import Departure, first_difference, gaps_in_ulps, ulp_of_bfloat16  # noqa: E402
from gpu.graphs import idle_per_step  # noqa: E402
from gpu.latency import Case, inter_token_seconds, step_bytes  # noqa: E402
from gpu.published import BARS, VLLM_BF16  # noqa: E402
from gpu.queue_delay import saturated_rate  # noqa: E402
from gpu.report import Clock, Report, Table, percentiles  # noqa: E402


def a_bench() -> Bench:
    return Bench(random_model=None, widened_model=None, device="cpu", quick=True)


class Hours:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds

    def work(self, seconds: float) -> float:
        self.seconds += seconds
        return seconds


# --- figures ----------------------------------------------------------------------------------------------------------


def test_the_time_between_tokens_leaves_out_the_first() -> None:
    assert inter_token_seconds(first=0.5, whole=0.5 + 128 * 0.004, num_new_tokens=128) == pytest.approx(0.004)


def test_a_step_reads_the_weights_once_and_each_sequences_cache_at_its_mean_length() -> None:
    assert step_bytes(1_000, 10.0, Case(1, 100, num_new_tokens=20)) == 1_000 + 110 * 10
    assert step_bytes(1_000, 10.0, Case(8, 100, num_new_tokens=20)) == 1_000 + 8 * 110 * 10


def test_the_weights_of_a_folder_are_counted_as_stored() -> None:
    sizes = stored_weight_bytes(EMBEDDED)
    assert sizes["model.embed_tokens.weight"] == 8192 * 384 * 2
    # Its embedding is its head as well, so a step reads all of it.
    assert weight_bytes_read_per_step(EMBEDDED) == sum(sizes.values())


def test_an_embedding_that_is_not_the_head_is_not_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    config = json.loads((EMBEDDED / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"model.embed_tokens.weight": torch.zeros(10, 4)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"lm_head.weight": torch.zeros(3, 4)}, tmp_path / "model-00002-of-00002.safetensors")
    assert weight_bytes_read_per_step(tmp_path) == 3 * 4 * 4


@given(st.integers(0, 2**32), st.sampled_from(sorted(LENGTHS)), st.integers(1, 512))
def test_answers_are_as_long_as_announced(seed: int, name: str, most: int) -> None:
    assert 1 <= LENGTHS[name](random.Random(seed), most) <= most


def test_log_uniform_lengths_reach_both_ends() -> None:
    rng = random.Random(0)
    drawn = [LENGTHS["log_uniform"](rng, 512) for _ in range(20_000)]
    assert min(drawn) == 1 and max(drawn) > 500
    assert sum(length < 23 for length in drawn) / len(drawn) == pytest.approx(0.5, abs=0.02)


def test_the_saturated_rate_ignores_how_seats_fill_and_empty() -> None:
    slow_start = [10.0, 10.5]
    steady = [11.0 + i / 4 for i in range(5)]  # four a second
    slow_end = [20.0]
    assert saturated_rate([*slow_start, *steady, *slow_end], num_seats=2) == pytest.approx(4.0)
    with pytest.raises(ValueError, match="expected at least 5"):
        saturated_rate([1.0, 2.0, 3.0, 4.0], num_seats=2)


def test_idle_time_is_what_no_kernel_covers() -> None:
    #          overlapping kernels        a gap of 2   one step later: a gap of 5
    kernels = [(0.0, 10.0), (8.0, 12.0), (14.0, 20.0), (25.0, 30.0)]
    idle, gap = idle_per_step(kernels, num_steps=2)
    assert idle == pytest.approx(7.0 / 2)
    assert gap == pytest.approx(5.0)
    assert idle_per_step(kernels[::-1], num_steps=2) == (idle, gap)


def test_without_a_record_of_kernels_there_is_no_idle_time() -> None:
    assert idle_per_step([], num_steps=5) == (None, None)


def test_percentiles_are_values_that_occurred() -> None:
    assert percentiles(list(range(101))) == (50, 95)
    assert percentiles([3.0]) == (3.0, 3.0)


# --- correctness ------------------------------------------------------------------------------------------------------


@given(st.floats(1e-3, 1e4))
def test_a_bfloat16_ulp_is_the_distance_to_the_next_bfloat16(value: float) -> None:
    rounded = torch.tensor(value).bfloat16()
    above = torch.tensor([rounded.view(torch.int16).item() + 1], dtype=torch.int16).view(torch.bfloat16)
    assert ulp_of_bfloat16(rounded.item()) == above.item() - rounded.item()


def test_the_gap_is_between_the_two_best_logits_in_ulps_of_the_larger() -> None:
    logits = np.array([[1.0, 17.0, 16.5, -90.0], [-3.0, -2.0, -2.25, -7.0]], np.float32)
    assert gaps_in_ulps(logits) == [0.5 / 0.125, 0.25 / 2.0**-6]


def test_more_than_four_ulps_are_no_rounding() -> None:
    assert Departure("", 0, 0, gap=4.0).is_rounding
    assert not Departure("", 0, 0, gap=4.01).is_rounding


def test_the_first_different_token_is_found_in_the_text() -> None:
    prefixes = ["The", "The cat", "The cat sat"]
    assert first_difference("The cat sat", prefixes) is None
    assert first_difference("The cab sat", prefixes) == 1
    assert first_difference("A cat", prefixes) == 0


def test_half_a_character_is_no_difference() -> None:
    assert first_difference("né", ["n", "n\ufffd", "né"]) is None


# --- tables, time and sections ----------------------------------------------------------------------------------------


def test_a_table_is_aligned_and_says_what_is_missing() -> None:
    table = Table("Title", ("what", "ms"), notes=["a note"])
    table.add("one", 3.14159)
    table.add("another", None)
    assert table.render() == "Title\nwhat       ms\none      3.14\nanother     -\n(a note)"
    with pytest.raises(ValueError, match="3 cells for the 2 columns"):
        table.add(1, 2, 3)


def test_everything_is_measured_once_and_repeats_end_with_the_time() -> None:
    hours = Hours()
    clock = Clock(10.0, now=hours)
    assert clock.repeat(lambda: hours.work(4.0), 5) == [4.0, 4.0]
    assert clock.repeat(lambda: hours.work(30.0), 5) == [30.0]
    assert clock.elapsed == 38.0


def test_a_row_leaves_time_for_the_next() -> None:
    hours = Hours()
    clock = Clock(10.0, now=hours)
    assert len(clock.repeat(lambda: hours.work(1.0), 50, until=0.5)) == 5
    assert len(clock.repeat(lambda: hours.work(1.0), 50, until=1.0)) == 5


def test_a_section_that_fails_says_so_and_the_others_go_on() -> None:
    def broken(bench: Bench, clock: Clock, report: Report) -> None:
        report.table("Half", "what", "ms").add("a row", 1.0)
        report.figures["row"] = 1.0
        raise RuntimeError("no such kernel")

    def sound(bench: Bench, clock: Clock, report: Report) -> None:
        report.figures["whole"] = 2.0

    shown: list[str] = []
    result = engine_gpu.run(a_bench(), {"broken": broken, "sound": sound}, 1.0, shown.append)
    assert result["failed"] == {"broken": "RuntimeError: no such kernel"}
    assert result["sections"] == {"broken": {"row": 1.0}, "sound": {"whole": 2.0}}
    assert any("a row" in text for text in shown)
    assert "broken FAILED: RuntimeError: no such kernel" in shown


def test_an_interruption_keeps_what_was_measured() -> None:
    def interrupted(bench: Bench, clock: Clock, report: Report) -> None:
        report.figures["row"] = 1.0
        raise KeyboardInterrupt

    def later(bench: Bench, clock: Clock, report: Report) -> None:
        raise AssertionError("not reached")

    result = engine_gpu.run(a_bench(), {"first": interrupted, "later": later}, 1.0, lambda _: None)
    assert result["interrupted"] and result["sections"] == {"first": {"row": 1.0}} and not result["failed"]


@pytest.mark.parametrize("text", ["latency,speed", "", ","])
def test_an_unknown_section_is_refused_by_name(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        engine_gpu.parse(["--sections", text])
    assert "expected one or more of latency, graphs" in capsys.readouterr().err


def test_a_missing_model_is_a_failure_that_says_which_option() -> None:
    result = engine_gpu.run(a_bench(), {"latency": engine_gpu.SECTIONS["latency"]}, 1.0, lambda _: None)
    assert result["failed"]["latency"].startswith("MissingModelError: needs --random DIR")


def test_a_bar_is_met_or_missed_by_its_sections_figure() -> None:
    figures = {
        "latency": {
            f"{b}x{n}{kind}": {"inter_token_ms": 3.0, "first_token_ms": 10.0}
            for b, n in VLLM_BF16
            for kind in ("", " unbounded")
        },
        "graphs": {"saved_by_graphs": 0.5, "32": {"host_us_per_token": 9.0}},
        "batching": {"log_uniform": {"continuous_over_static": 2.0}},
        "prefix": {"random": {"saved": 0.9}, "text": {"saved": 0.9}},
        "start": {"cold": {"total": 12.0}},
        "correctness": {"num_beyond_rounding": 0},
    }
    assert all(bar.figure(figures) is not None for bar in BARS)
    assert [row[-1] for row in engine_gpu.bars(figures).rows] == [True] * len(BARS)
    figures["latency"]["1x512"]["inter_token_ms"] = 3.81
    figures["prefix"]["text"]["saved"] = 0.79
    missed = [row[0] for row in engine_gpu.bars(figures).rows if row[-1] is False]
    assert missed == ["inter-token ms, batch 1", "first-token time saved by 1,000 tokens of text"]
    assert engine_gpu.bars({}).rows == []


def test_the_benchmark_runs_on_a_cpu_and_ends_with_one_json_line(tmp_path: Path) -> None:
    markdown = tmp_path / "report.md"
    command = [sys.executable, str(BENCHMARKS / "engine_gpu.py"), "--model", str(EMBEDDED), "--device", "cpu"]
    options = ["--quick", "--budget", "1", "--sections", "latency,correctness,small,quantized"]
    options += ["--quantizations", "int4", "--markdown", str(markdown)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert list(result["sections"]) == ["small", "quantized", "latency", "correctness"] and not result["failed"]
    for figures in (result["sections"]["quantized"]["int4"]["1x64"], result["sections"]["latency"]["1x64"]):
        assert figures["first_token_ms"] > 0
        assert math.isfinite(figures["inter_token_ms"])  # of so few tokens, a busy machine's may be below 0
    assert result["sections"]["correctness"]["num_beyond_rounding"] == 0
    assert "Greedy tokens of tiny" in markdown.read_text() and '"benchmark": "engine_gpu"' in markdown.read_text()
