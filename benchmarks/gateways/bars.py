"""What has to hold, with the figure that decides it, and the tables to read. Measures nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gpu.report import Table

from gateways.measure import Figures, Sizes, added
from gateways.soak import Soak

OURS, DIRECT, LITELLM = "autobot_llm", "direct", "LiteLLM"
AllFigures = Mapping[str, Figures]


@dataclass(frozen=True, slots=True)
class Bar:
    """One thing that has to hold. `stretch` is where it would be among the best that were measured."""

    what: str
    limit: float
    figure: Callable[[AllFigures], float | None]
    at_least: bool = False
    stretch: float | None = None

    def holds(self, figure: float) -> bool:
        return figure >= self.limit if self.at_least else figure <= self.limit


def _of(what: str) -> Callable[[AllFigures], float | None]:
    return lambda figures: figures[OURS].get(what)


def _times_litellm(figures: AllFigures) -> float | None:
    if LITELLM not in figures:
        return None
    own, theirs = figures[OURS].get("rps@32"), figures[LITELLM].get("rps@32")
    return own / theirs if own and theirs else None


BARS = (
    Bar("CPU µs per request, 32 connections", 320, _of("cpu_us@32"), stretch=180),
    Bar("requests/s against LiteLLM's, 32 connections", 30, _times_litellm, at_least=True),
    Bar("added p50 ms, 1 connection", 0.55, lambda figures: added(figures, OURS, "p50_ms@1")),
    Bar("added ms to the first chunk", 0.9, lambda figures: added(figures, OURS, "first_piece_ms")),
    Bar("chunks/s, 16 streams", 80_000, _of("chunks_per_s"), at_least=True, stretch=150_000),
    Bar("memory MB, loaded", 80, _of("memory_loaded_mb")),
    Bar("cold start s", 0.6, _of("cold_start_s")),
)
SOAK_GROWTH = 0.05  # of memory, which an allocator never gives back exactly; over 100,000 requests, 25 bytes of each


def bars_table(figures: AllFigures, soaked: Soak | None) -> Table:
    table = Table("What must hold", ("what", "bar", "stretch", "measured", "holds"))
    for bar in BARS:
        figure = bar.figure(figures)
        if figure is None:
            table.add(bar.what, _limit(bar, bar.limit), None, None, None)
        else:
            stretch = None if bar.stretch is None else _limit(bar, bar.stretch)
            table.add(bar.what, _limit(bar, bar.limit), stretch, figure, bar.holds(figure))
    if soaked is not None:
        table.add("memory, growth in % over the soak", f"<= {SOAK_GROWTH:.0%}", None, 100 * soaked.memory_growth,
                  soaked.memory_growth <= SOAK_GROWTH)  # fmt: skip
        for what in ("num_tasks", "num_sockets"):
            before, after = getattr(soaked.before, what), getattr(soaked.after, what)
            table.add(f"{what[4:]}, before and after", "no more", None, f"{before} / {after}", after <= before)
    return table


def _limit(bar: Bar, limit: float) -> str:
    return f"{'>=' if bar.at_least else '<='} {limit:g}"


def load_table(figures: AllFigures, sizes: Sizes) -> Table:
    levels = sizes.levels
    columns = ["gateway", f"requests/s at {_slashed(levels)}"]
    columns += [f"p50 ms at {_slashed(levels)}", f"p99 ms at {_slashed(levels)}", "added p50 ms at 1"]
    table = Table("Whole answers", (*columns, f"CPU µs a request at {_slashed(levels)}"))
    for name, own in figures.items():

        def shown(what: str, digits: int, own: Figures = own) -> str | None:
            values = [own.get(f"{what}@{level}") for level in levels]
            return None if None in values else _slashed([f"{value:,.{digits}f}" for value in values])

        plus = added(figures, name, "p50_ms@1") if name != DIRECT else None
        table.add(name, shown("rps", 0), shown("p50_ms", 2), shown("p99_ms", 2), plus, shown("cpu_us", 0))
    return table


def stream_table(figures: AllFigures, sizes: Sizes) -> Table:
    streams = f"{sizes.num_streams} streams"
    table = Table(
        "Streams",
        (
            "gateway",
            "added ms to first chunk",
            f"chunks/s, {streams}",
            "CPU µs a chunk",
            f"CPU µs a chunk, one every {sizes.pace_ms} ms",
        ),
    )
    for name, own in figures.items():
        plus = added(figures, name, "first_piece_ms") if name != DIRECT else None
        figure = own.get("chunks_per_s")
        table.add(name, plus, figure, own.get("cpu_us_per_chunk"), own.get("cpu_us_per_paced_chunk"))
    table.notes.append("at full speed many chunks come in one read; paced, each one is read and written alone")
    return table


def process_table(figures: AllFigures) -> Table:
    table = Table("Process", ("gateway", "cold start s", "memory MB idle", "loaded"))
    for name, own in figures.items():
        if name != DIRECT:
            memory = own.get("memory_idle_mb"), own.get("memory_loaded_mb")
            table.add(name, own.get("cold_start_s"), *memory)
    table.notes.append("cold start: from the start of the process to its first answer, files in the system's cache")
    return table


def soak_table(soaked: Soak) -> Table:
    num = soaked.num_whole + soaked.num_failed + soaked.num_given_up
    table = Table(f"autobot_llm, before and after {num:,} requests", ("when", "memory MB", "tasks", "sockets"))
    for when, state in (("before", soaked.before), ("after", soaked.after)):
        table.add(when, state.memory_mb, state.num_tasks, state.num_sockets)
    table.notes.append(
        f"{soaked.num_whole:,} whole answers, {soaked.num_failed:,} failures of the upstream, "
        f"{soaked.num_given_up:,} streams given up by their clients; {soaked.seconds:.0f} s"
    )
    table.notes.append("tasks: those that came after the start; both are taken when the clients have gone")
    return table


def spread_table(figures: AllFigures) -> Table:
    """How far the rounds lie apart, for the figures that the bars are about."""
    table = Table("Spread of the rounds: least, median, most", ("figure", *figures))
    for what in ("rps@32", "cpu_us@32", "p50_ms@1", "first_piece_ms", "chunks_per_s"):
        cells = [own.rounds.get(what) for own in figures.values()]
        if any(cells):
            table.add(what, *(_spread(values) if values else None for values in cells))
    return table


def _spread(values: list[float]) -> str:
    digits = 0 if min(values) >= 100 else 3
    median = sorted(values)[len(values) // 2]
    return " ".join(f"{value:,.{digits}f}" for value in (min(values), median, max(values)))


def _slashed(values: object) -> str:
    assert isinstance(values, list | tuple)
    return " / ".join(map(str, values))
