"""The gateway benchmark: its load refuses wrong answers, its upstream keeps its word, and it leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from gateways import bars, load, wire  # noqa: E402
from gateways.measure import QUICK, Figures, Sizes, measure_hits, num_asked  # noqa: E402
from gateways.processes import Server, upstream  # noqa: E402
from gateways.soak import Soak, State  # noqa: E402

HOST = "127.0.0.1"


@pytest.fixture(scope="module")
def floor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with upstream(tmp_path_factory.mktemp("upstream"), None) as server:
        yield server


# --- the upstream and the load ----------------------------------------------------------------------------------------


async def test_every_whole_answer_is_counted_and_checked(floor: Server) -> None:
    make = wire.requests(HOST, {})
    answers = await load.run(floor.port, make, load.check_whole, num_connections=3, num_requests=50)
    assert len(answers.durations) == 50
    assert 0 < max(answers.durations) <= answers.seconds


async def test_a_stream_has_as_many_pieces_as_were_asked_for(floor: Server) -> None:
    make = wire.requests(HOST, {}, num_chunks=1_000)
    answers = await load.run(
        floor.port, make, load.check_stream(1_000), num_connections=2, num_requests=4, pieces=1_000
    )
    assert answers.num_pieces == 4_000
    assert len(answers.first_pieces) == 4
    assert max(answers.first_pieces) < max(answers.durations)


async def test_a_paced_stream_takes_its_time(floor: Server) -> None:
    make = wire.requests(HOST, {}, num_chunks=6, pace_ms=20)
    answers = await load.run(floor.port, make, load.check_stream(6), num_connections=1, num_requests=1)
    assert answers.durations[0] >= 6 * 0.02


async def test_the_upstream_tells_how_many_answers_it_was_asked_for(floor: Server) -> None:
    before = num_asked(floor)
    make = wire.repeated_requests(HOST, {}, 3)
    await load.run(floor.port, make, load.check_whole, num_connections=2, num_requests=7)
    assert num_asked(floor) - before == 7
    assert make(0) == make(3) != make(1)


async def test_answers_that_are_not_kept_end_the_measurement_of_kept_ones(floor: Server) -> None:
    with pytest.raises(RuntimeError, match="asked its upstream"):
        await asyncio.to_thread(measure_hits, floor, floor, QUICK, Figures("direct"))


async def test_no_two_prompts_are_alike(floor: Server) -> None:
    asked: list[bytes] = []
    make = wire.requests(HOST, {"authorization": "Bearer x"}, num_chunks=2)

    def noted(number: int) -> bytes:
        asked.append(make(number))
        return asked[-1]

    for _ in range(2):
        await load.run(floor.port, noted, load.check_stream(2), num_connections=2, num_requests=5)
    assert len(set(asked)) == len(asked) == 10
    head, _, body = asked[0].partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}".encode() in head and b"authorization: Bearer x" in head
    assert json.loads(body)["max_tokens"] == 2


async def test_an_answer_that_is_not_the_upstreams_ends_the_measurement(floor: Server) -> None:
    failing = wire.failing_requests(HOST, {})
    with pytest.raises(load.WrongAnswer, match="(?s)status 500.*the engine has failed"):
        await load.run(floor.port, failing, load.check_whole, num_connections=2, num_requests=4)
    await load.run(floor.port, failing, load.check_whole_or_failed, num_connections=2, num_requests=4)
    with pytest.raises(load.WrongAnswer, match="8 of 9 pieces"):
        make = wire.requests(HOST, {}, num_chunks=8)
        await load.run(floor.port, make, load.check_stream(9), num_connections=1, num_requests=1)


async def test_a_server_that_hangs_up_ends_the_measurement() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n{")
        writer.close()

    async with await asyncio.start_server(hang_up, HOST, 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(load.WrongAnswer, match="closed within an answer"):
            await load.run(port, wire.requests(HOST, {}), load.check_whole, num_connections=1, num_requests=1)


# --- figures and bars -------------------------------------------------------------------------------------------------


def figures(**rounds: list[float]) -> Figures:
    return Figures("any", {what.replace("_at_", "@"): values for what, values in rounds.items()})


def measured(cpu_us: float = 300.0, litellm_rps: float = 100.0) -> dict[str, Figures]:
    return {
        "direct": figures(p50_ms_at_1=[0.1], first_piece_ms=[0.2]),
        "autobot_llm": figures(
            cpu_us_at_32=[cpu_us, 1.0, 10_000.0], rps_at_32=[3_100.0], p50_ms_at_1=[0.6], first_piece_ms=[1.0],
            chunks_per_s=[80_000.0], memory_loaded_mb=[79.0], cold_start_s=[0.5],
        ),
        "LiteLLM": figures(rps_at_32=[litellm_rps]),
    }  # fmt: skip


def verdicts(all_figures: dict[str, Figures], soaked: Soak | None = None) -> dict[str, Any]:
    return {str(row[0]): row[-1] for row in bars.bars_table(all_figures, soaked).rows}


def test_a_bar_is_met_or_missed_by_the_median_of_the_rounds() -> None:
    assert set(verdicts(measured()).values()) == {True}
    missed = verdicts(measured(cpu_us=321.0, litellm_rps=104.0))
    assert [what for what, holds in missed.items() if not holds] == [
        "CPU µs per request, 32 connections",
        "requests/s against LiteLLM's, 32 connections",
    ]


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    alone = measured()
    del alone["LiteLLM"]
    assert verdicts(alone)["requests/s against LiteLLM's, 32 connections"] is None
    assert "requests/s at 1 / 2" in bars.load_table(alone, Sizes(levels=(1, 2))).render()


def test_only_what_was_measured_is_held_to_its_bar() -> None:
    kept = {"autobot_llm": figures(hit_cpu_us_at_32=[80.0], hits_per_s_at_32=[9_000.0])}
    theirs = {"LiteLLM": figures(hits_per_s_at_32=[200.0])}
    assert list(verdicts(kept).values()) == [True, None]
    assert list(verdicts(kept | theirs).values()) == [True, False]
    assert "hits/s at 1 / 32" in bars.hits_table(kept, Sizes()).render()


def test_a_soak_is_held_to_what_the_server_was_before_it() -> None:
    def after(state: State) -> list[Any]:
        soaked = Soak(90, 5, 5, 1.0, before=State(50.0, 3, 20), after=state)
        return list(verdicts(measured(), soaked).values())[-3:]

    assert after(State(51.0, 3, 19)) == [True, True, True]
    assert after(State(53.0, 4, 21)) == [False, False, False]


# --- the program ------------------------------------------------------------------------------------------------------


def command(*options: str) -> list[str]:
    return [sys.executable, str(BENCHMARKS / "gateway.py"), "--quick", *options]


def test_the_benchmark_runs_and_ends_with_one_json_line(tmp_path: Path) -> None:
    markdown = tmp_path / "gateway.md"
    done = subprocess.run(command("--markdown", str(markdown)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result["figures"]) == {"direct", "autobot_llm"}
    own = result["figures"]["autobot_llm"]
    assert own["rps@4"]["median"] > 0 and own["cold_start_s"]["median"] > 0 and own["memory_idle_mb"]["median"] > 10
    assert own["hits_per_s@4"]["median"] > own["rps@4"]["median"]
    assert result["figures"]["direct"]["rps@4"]["median"] > 3 * own["rps@4"]["median"]
    assert result["soak"]["num_given_up"] == QUICK.soak // 20
    assert result["soak"]["num_failed"] == (QUICK.soak - QUICK.soak // 20) // 20
    assert result["soak"]["after"]["num_tasks"] <= result["soak"]["before"]["num_tasks"]
    assert "What must hold" in markdown.read_text() and '"benchmark": "gateway"' in markdown.read_text()


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_benchmark_that_is_stopped_ends_every_process_that_it_started(sign: signal.Signals) -> None:
    running = subprocess.Popen(command("--rounds", "1000"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert running.stderr is not None
        while "round 2" not in running.stderr.readline():
            assert running.poll() is None
        started = psutil.Process(running.pid).children(recursive=True)
        assert len(started) == 2
        os.kill(running.pid, sign)
        _, errors = running.communicate(timeout=30)
    finally:
        running.kill()
        running.communicate()
    assert running.returncode == 130
    assert "interrupted" in errors and "Traceback" not in errors
    deadline = time.monotonic() + 10
    while (alive := [one for one in started if one.is_running()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive == []
