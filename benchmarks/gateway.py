"""What our server costs as a gateway in front of an OpenAI-compatible upstream, beside LiteLLM's proxy in the same run.

The gateway has one core and one worker; the upstream, which answers with fixed bytes, and the load generator share
another. Every prompt is new, except where answers from memory are measured: there ten prompts take turns, and the
upstream tells that it was not asked. The gateways take turns, so that a busy moment of the machine hits all of them,
and the median of the rounds counts. "direct" is the load on the upstream without a gateway: the floor. LiteLLM gets a
virtual environment of its own, a master key, no database, no retries, LITELLM_LOG=ERROR and one worker.

    python benchmarks/gateway.py --markdown docs/results/gateway.md --soak 100000    # the figures of that page
    python benchmarks/gateway.py --sections cache                                    # answers from memory alone
    python benchmarks/gateway.py --no-litellm                                        # ours alone
    python benchmarks/gateway.py --quick                                             # does it all run?
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gateways import bars, commands
from gateways.measure import QUICK, Figures, Sizes, measure_hits, measure_round, warm_up
from gateways.processes import Command, Cores, Server, cores, pinned, started, upstream
from gateways.soak import Soak, soak

SECTIONS = ("gateway", "cache", "soak")
INTERRUPTED = 130  # the exit status of a program that SIGINT ended


def measure(wanted: Callable[[int], Sequence[Command]], sizes: Sizes, where: Cores, folder: Path) -> dict[str, Figures]:
    """Every figure of the upstream alone and of each gateway; `wanted` gets the upstream's port."""
    with contextlib.ExitStack() as servers, pinned(where.others):
        floor = servers.enter_context(upstream(folder, where.others))
        gateways = list(wanted(floor.port))
        figures = {name: Figures(name) for name in ("direct", *(gateway.name for gateway in gateways))}
        running: list[Server] = []
        for gateway in gateways:
            say(f"{gateway.name}: starting")
            own = figures[gateway.name]
            with started(gateway, folder, where.gateway):
                pass  # the first start compiles what was never run
            for _ in range(sizes.num_starts - 1):
                with started(gateway, folder, where.gateway) as server:
                    own.add("cold_start_s", server.start_seconds)
            server = servers.enter_context(started(gateway, folder, where.gateway))
            own.add("cold_start_s", server.start_seconds)
            own.add("memory_idle_mb", server.memory_mb())
            if server.has_loaded("libtorch"):
                raise RuntimeError(f"{gateway.name} has loaded torch, which a gateway does not need")
            running.append(server)
        for server in (floor, *running):
            warm_up(server, sizes)
        for number in range(sizes.rounds):
            for server in (floor, *running):
                say(f"round {number + 1} of {sizes.rounds}: {server.name}")
                measure_round(server, sizes, figures[server.name])
        return figures


def measure_kept(
    wanted: Callable[[int], Sequence[Command]], sizes: Sizes, where: Cores, folder: Path
) -> dict[str, Figures]:
    """What answers cost that the gateways have kept in memory."""
    with contextlib.ExitStack() as servers, pinned(where.others):
        floor = servers.enter_context(upstream(folder, where.others))
        running = []
        for gateway in wanted(floor.port):
            say(f"{gateway.name}, answers from memory: starting")
            running.append(servers.enter_context(started(gateway, folder, where.gateway)))
        figures = {server.name: Figures(server.name) for server in running}
        for server in running:
            measure_hits(server, floor, sizes, Figures(server.name))
        for number in range(sizes.rounds):
            for server in running:
                say(f"answers from memory, round {number + 1} of {sizes.rounds}: {server.name}")
                measure_hits(server, floor, sizes, figures[server.name])
        return figures


def soaked(sizes: Sizes, where: Cores, folder: Path) -> Soak:
    say(f"soak: {sizes.soak:,} requests")
    with pinned(where.others), upstream(folder, where.others) as floor:
        return soak(floor.port, sizes, where.gateway)


def say(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)


def machine(where: Cores, litellm: str | None) -> dict[str, Any]:
    packages = ("autobot_llm", "uvicorn", "uvloop", "httptools", "msgspec")
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    if litellm is not None:
        versions["LiteLLM"] = litellm
    return {"cores": os.cpu_count(), "processor": _processor(), "pinned": where.shown, "versions": versions}


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def as_markdown(result: dict[str, Any], shown: Sequence[str], command: str) -> str:
    """The page that docs/results keeps: how it was measured, the tables as they were printed, and the figures."""
    where = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    before, after = result["load_average"]
    assert __doc__ is not None
    how = __doc__.split("\n\n")[1]
    tables = "\n\n".join(shown)
    return (
        f"# A gateway's cost\n\n    {command}\n\n{how}\n\n"
        f"{where['processor']}, {where['cores']} cores, {where['pinned']}; {versions}; {result['date']}. "
        f"Load average over a minute: {before:.2f} before, {after:.2f} at the end, which includes the benchmark's own "
        f"two. On a shared virtual machine only ratios within one run say much.\n\n"
        f"```\n{tables}\n```\n\n## As JSON\n\n```json\n{json.dumps(result)}\n```\n"
    )


def section_names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in SECTIONS:
            raise argparse.ArgumentTypeError(f"{name!r}: expected some of {', '.join(SECTIONS)}")
    return names


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sections",
        metavar="NAMES",
        default=",".join(SECTIONS),
        type=section_names,
        help=f"what to measure, of {', '.join(SECTIONS)} (default: all); as in --sections cache",
    )
    parser.add_argument("--no-litellm", action="store_true", help="ours alone")
    parser.add_argument(
        "--litellm-env",
        type=Path,
        metavar="DIR",
        default=commands.LITELLM_ENVIRONMENT,
        help="LiteLLM's virtual environment, made if it is not there (default build/litellm)",
    )
    parser.add_argument("--soak", type=int, metavar="N", help="requests of the soak; 0 leaves it out (default 20,000)")
    parser.add_argument("--rounds", type=int, metavar="N", help="measurements of each figure (default 3)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, no LiteLLM: shows that it runs, no more")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the report to this file, too")
    return parser.parse_args(arguments)


def sizes_of(arguments: argparse.Namespace) -> Sizes:
    sizes = QUICK if arguments.quick else Sizes()
    changed = {name: value for name in ("soak", "rounds") if (value := getattr(arguments, name)) is not None}
    return Sizes(**{name: getattr(sizes, name) for name in Sizes.__dataclass_fields__} | changed)


def main() -> int:
    arguments = parse()
    # Ending this program by a signal ends the servers it has started, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    try:
        return report(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def report(arguments: argparse.Namespace) -> int:
    sizes, where = sizes_of(arguments), cores()
    has_litellm = not (arguments.no_litellm or arguments.quick)
    litellm = commands.install_litellm(arguments.litellm_env) if has_litellm else None
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="gateway-") as name:
        folder = Path(name)

        def wanted(port: int) -> list[Command]:
            ours = [commands.ours(port)]
            return [*ours, commands.litellm(port, arguments.litellm_env.absolute(), folder)] if has_litellm else ours

        def wanted_with_cache(port: int) -> list[Command]:
            ours = [commands.ours(port)]
            theirs = [commands.litellm(port, arguments.litellm_env.absolute(), folder, caches=True)]
            return [*ours, *theirs] if has_litellm else ours

        has = arguments.sections
        figures = measure(wanted, sizes, where, folder) if "gateway" in has else {}
        tables = []
        if figures:
            tables = [bars.load_table(figures, sizes), bars.stream_table(figures, sizes), bars.process_table(figures)]
        if "cache" in has:
            kept = measure_kept(wanted_with_cache, sizes, where, folder)
            tables.append(bars.hits_table(kept, sizes))
            for gateway, own in kept.items():
                figures.setdefault(gateway, Figures(gateway)).rounds |= own.rounds
        endured = soaked(sizes, where, folder) if sizes.soak and "soak" in has else None
    if endured is not None:
        tables.append(bars.soak_table(endured))
    tables += [bars.spread_table(figures)] if sizes.rounds > 1 else []
    must_hold = bars.bars_table(figures, endured)
    shown = [table.render() for table in (*tables, must_hold)]
    result = {
        "benchmark": "gateway",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(where, litellm),
        "load_average": (before, os.getloadavg()[0]),
        "quick": arguments.quick,
        "figures": {name: own.as_json() for name, own in figures.items()},
        "soak": endured.as_json() if endured is not None else None,
        "bars": {str(row[0]): row[-1] for row in must_hold.rows},
    }
    if not arguments.json:
        print("\n\n".join(shown), end="\n\n")
    if arguments.markdown:
        arguments.markdown.write_text(as_markdown(result, shown, f"python {' '.join(sys.argv)}"))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
