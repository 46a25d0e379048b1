"""What has to hold, with the figure that decides it, and the tables to read. Measures nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gpu.report import Table

from gateways.measure import Figures, Sizes, added
from gateways.soak import Soak

OURS, DIRECT, LITELLM = "autobot_llm", "direct", "LiteLLM"
AllFigures = Mapping[str, Figures]


@dataclass(frozen=True, slots=True)
class Bar:
    """One thing that has to hold of our figure `own`, or of what `figure` makes of it and others'.

    `stretch` is where it would be among the best that were measured.
    """

    what: str
    limit: float
    own: str
    figure: Callable[[AllFigures, str], float | None] = lambda figures, own: figures[OURS].get(own)
    at_least: bool = False
    stretch: float | None = None

    def holds(self, figure: float) -> bool:
        return figure >= self.limit if self.at_least else figure <= self.limit


def _times_litellms(figures: AllFigures, what: str) -> float | None:
    own, theirs = (figures[name].get(what) if name in figures else None for name in (OURS, LITELLM))
    return own / theirs if own and theirs else None


def _added(figures: AllFigures, what: str) -> float | None:
    return added(figures, OURS, what)


BARS = (
    Bar("CPU µs per request, 32 connections", 320, "cpu_us@32", stretch=180),
    Bar("requests/s against LiteLLM's, 32 connections", 30, "rps@32", _times_litellms, at_least=True),
    Bar("added p50 ms, 1 connection", 0.55, "p50_ms@1", _added),
    Bar("added ms to the first chunk", 0.9, "first_piece_ms", _added),
    Bar("chunks/s, 16 streams", 80_000, "chunks_per_s", at_least=True, stretch=150_000),
    Bar("memory MB, loaded", 80, "memory_loaded_mb"),
    Bar("cold start s", 0.6, "cold_start_s"),
    Bar("CPU µs of an answer from memory, 32 connections", 120, "hit_cpu_us@32", stretch=70),
    Bar("answers from memory/s against LiteLLM's, 32 connections", 50, "hits_per_s@32", _times_litellms, at_least=True),
)
SOAK_GROWTH = 0.05  # of memory, which an allocator never gives back exactly; over 100,000 requests, 25 bytes of each


def bars_table(figures: AllFigures, soaked: Soak | None) -> Table:
    """Every bar that is about something measured."""
    table = Table("What must hold", ("what", "bar", "stretch", "measured", "holds"))
    for bar in BARS:
        if OURS not in figures or figures[OURS].get(bar.own) is None:
            continue
        figure = bar.figure(figures, bar.own)
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
        rates, half, most, cpu = (
            _at_levels(own, what, levels, digits)
            for what, digits in (("rps", 0), ("p50_ms", 2), ("p99_ms", 2), ("cpu_us", 0))
        )
        plus = added(figures, name, "p50_ms@1") if name != DIRECT else None
        table.add(name, rates, half, most, plus, cpu)
    return table


def _at_levels(own: Figures, what: str, levels: Sequence[int], digits: int) -> str | None:
    """A figure at each number of connections, in one cell."""
    values = [own.get(f"{what}@{level}") for level in levels]
    return None if None in values else _slashed([f"{value:,.{digits}f}" for value in values])


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


def hits_table(figures: AllFigures, sizes: Sizes) -> Table:
    levels = sizes.hit_levels
    columns = [f"{what} at {_slashed(levels)}" for what in ("hits/s", "p50 ms", "p99 ms", "CPU µs a hit")]
    table = Table("Answers from memory", ("gateway", *columns))
    for name, own in figures.items():
        cells = (("hits_per_s", 0), ("hit_p50_ms", 2), ("hit_p99_ms", 2), ("hit_cpu_us", 0))
        if name != DIRECT:
            table.add(name, *(_at_levels(own, what, levels, digits) for what, digits in cells))
    table.notes.append(f"{sizes.num_prompts} prompts in turn, temperature 0; LiteLLM with cache: true, type: local")
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
    for what in ("rps@32", "cpu_us@32", "p50_ms@1", "first_piece_ms", "chunks_per_s", "hits_per_s@32", "hit_cpu_us@32"):
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
