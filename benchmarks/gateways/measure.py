"""What is measured of a gateway, or of the upstream without one. Knows loads and figures; knows no gateway by name."""

from __future__ import annotations

import asyncio
import http.client
import statistics
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import uvloop

from gateways import load, wire
from gateways.load import Answers
from gateways.processes import Server

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured. Seconds are those of one measurement; `rounds` of each are made and the median counts."""

    levels: tuple[int, ...] = (1, 32, 128)
    seconds: float = 2.0
    rounds: int = 3
    num_starts: int = 3
    num_streams: int = 16
    pieces_per_stream: int = 500
    paced_pieces: int = 50
    pace_ms: int = 20
    soak: int = 20_000
    before_soak: int = 20_000
    hit_levels: tuple[int, ...] = (1, 32)
    num_prompts: int = 10  # that are asked again and again
    settle_seconds: float = 3.0  # the pool closes the connections that it has too many of after two


QUICK = Sizes(
    levels=(1, 4),
    seconds=0.2,
    rounds=1,
    num_starts=1,
    num_streams=4,
    pieces_per_stream=40,
    paced_pieces=5,
    soak=400,
    before_soak=400,
    hit_levels=(4,),
    settle_seconds=0.5,
)


def run(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


@dataclass(slots=True)
class Figures:
    """Every round's value of each figure, and their medians."""

    name: str
    rounds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, what: str, value: float) -> None:
        self.rounds.setdefault(what, []).append(value)

    def get(self, what: str) -> float | None:
        values = self.rounds.get(what)
        return statistics.median(values) if values else None

    def as_json(self) -> dict[str, Any]:
        return {what: {"median": statistics.median(values), "rounds": values} for what, values in self.rounds.items()}


def measure_round(server: Server, sizes: Sizes, figures: Figures) -> None:
    """One value of everything."""
    whole = wire.requests(f"127.0.0.1:{server.port}", server.headers)
    for level in sizes.levels:

        def ask(level: int = level) -> Answers:
            return run(load.run(server.port, whole, load.check_whole, num_connections=level, seconds=sizes.seconds))

        answers = _metered(server, figures, f"cpu_us@{level}", ask, lambda answers: len(answers.durations))
        figures.add(f"rps@{level}", len(answers.durations) / answers.seconds)
        figures.add(f"p50_ms@{level}", 1000 * statistics.median(answers.durations))
        figures.add(f"p99_ms@{level}", 1000 * _percentile(answers.durations, 99))

    answers = _streams(server, num_connections=1, num_pieces=8, seconds=sizes.seconds)
    figures.add("first_piece_ms", 1000 * statistics.median(answers.first_pieces))

    def many() -> Answers:
        return _streams(server, sizes.num_streams, sizes.pieces_per_stream, sizes.seconds)

    answers = _metered(server, figures, "cpu_us_per_chunk", many, lambda answers: answers.num_pieces)
    figures.add("chunks_per_s", answers.num_pieces / answers.seconds)

    def paced() -> Answers:
        return _streams(server, sizes.num_streams, sizes.paced_pieces, sizes.seconds, pace_ms=sizes.pace_ms)

    answers = _metered(server, figures, "cpu_us_per_paced_chunk", paced, lambda answers: answers.num_pieces)
    figures.add("paced_chunks_per_s", answers.num_pieces / answers.seconds)
    figures.add("memory_loaded_mb", server.memory_mb())


def measure_hits(server: Server, floor: Server, sizes: Sizes, figures: Figures) -> None:
    """One value of what an answer costs that a gateway has kept.

    Raises RuntimeError where it was not kept: the upstream, `floor`, was asked for more than one answer in a hundred.
    """
    make = wire.repeated_requests(f"127.0.0.1:{server.port}", server.headers, sizes.num_prompts)
    for level in sizes.hit_levels:
        run(load.run(server.port, make, load.check_whole, num_connections=1, num_requests=2 * sizes.num_prompts))
        asked_before = num_asked(floor)

        def ask(level: int = level) -> Answers:
            return run(load.run(server.port, make, load.check_whole, num_connections=level, seconds=sizes.seconds))

        answers = _metered(server, figures, f"hit_cpu_us@{level}", ask, lambda answers: len(answers.durations))
        if (num_missed := num_asked(floor) - asked_before) > 0.01 * len(answers.durations):
            raise RuntimeError(f"{server.name} asked its upstream for {num_missed} of {len(answers.durations)} answers")
        figures.add(f"hits_per_s@{level}", len(answers.durations) / answers.seconds)
        figures.add(f"hit_p50_ms@{level}", 1000 * statistics.median(answers.durations))
        figures.add(f"hit_p99_ms@{level}", 1000 * _percentile(answers.durations, 99))


def num_asked(floor: Server) -> int:
    """How many answers the upstream has been asked for."""
    connection = http.client.HTTPConnection("127.0.0.1", floor.port, timeout=10)
    try:
        connection.request("GET", wire.COUNT)
        return int(connection.getresponse().read())
    finally:
        connection.close()


def warm_up(server: Server, sizes: Sizes) -> None:
    """Have everything loaded and every connection made that the rounds then find."""
    whole = wire.requests(f"127.0.0.1:{server.port}", server.headers)
    seconds = sizes.seconds / 2
    run(load.run(server.port, whole, load.check_whole, num_connections=sizes.levels[-1], seconds=seconds))
    _streams(server, num_connections=2, num_pieces=20, seconds=seconds / 2)


def _streams(
    server: Server, num_connections: int, num_pieces: int, seconds: float, pace_ms: int | None = None
) -> Answers:
    make = wire.requests(f"127.0.0.1:{server.port}", server.headers, num_chunks=num_pieces, pace_ms=pace_ms)
    check = load.check_stream(num_pieces)
    return run(load.run(server.port, make, check, num_connections=num_connections, seconds=seconds, pieces=num_pieces))


def _metered(
    server: Server, figures: Figures, what: str, work: Callable[[], Answers], count: Callable[[Answers], int]
) -> Answers:
    """What `work` gets; the CPU time it cost `server`, for each of what `count` counts, goes into the figures."""
    before = server.cpu_seconds()
    answers = work()
    figures.add(what, 1e6 * (server.cpu_seconds() - before) / count(answers))
    return answers


def _percentile(values: Sequence[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[max(0, -(-percent * len(ordered) // 100) - 1)]


def added(figures: Mapping[str, Figures], name: str, what: str) -> float | None:
    """What a gateway adds to the upstream alone."""
    if "direct" not in figures:
        return None
    own, direct = figures[name].get(what), figures["direct"].get(what)
    return own - direct if own is not None and direct is not None else None
