"""The engine on a GPU at 7B size: latency, graphs, batching, queue delay, prefixes, start and correctness.

Each section prints its tables when it ends, one that fails says why and the others go on, and one JSON line comes last.
The model folders are made by benchmarks/random_model.py and benchmarks/widen.py.

    python benchmarks/engine_gpu.py --random DIR --widened DIR --markdown docs/results/engine_gpu.md
    python benchmarks/engine_gpu.py --random DIR --sections latency,graphs --budget 20
    python benchmarks/engine_gpu.py --random DIR --sections small,quantized --quantizations int8,fp8,int4
    python benchmarks/engine_gpu.py --model src/autobot_llm/assets/tiny --device cpu --quick    # does it all run?
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from gpu.batching import batching
from gpu.bench import Bench
from gpu.correctness import correctness
from gpu.graphs import graphs
from gpu.latency import latency
from gpu.prefix import prefix
from gpu.published import BARS, BARS_DEVICE
from gpu.quantized import quantized, small
from gpu.queue_delay import queue_delay
from gpu.report import Clock, Report, Table
from gpu.start import start

Section = Callable[[Bench, Clock, Report], None]
# In the order that loads the fewest models: neighbours share an engine.
SECTIONS: Mapping[str, Section] = {
    "latency": latency,
    "graphs": graphs,
    "prefix": prefix,
    "batching": batching,
    "queue": queue_delay,
    "start": start,
    "correctness": correctness,
}
# Only where they are asked for; `small` before anything else, because it counts what the process holds.
QUANTIZED_SECTIONS: Mapping[str, Section] = {"small": small, "quantized": quantized}
ALL_SECTIONS: Mapping[str, Section] = {**QUANTIZED_SECTIONS, **SECTIONS}
QUANTIZATIONS = ("none", "int8", "fp8", "int4")
BUDGET = 60.0
PACKAGES = ("torch", "triton", "transformers", "flashinfer-python", "flash-attn")
INTERRUPTED = 130  # the exit status of a program that SIGINT ended


def run(bench: Bench, sections: Mapping[str, Section], budget: float, show: Callable[[str], None]) -> dict[str, Any]:
    """Run sections one after the other. Returns what the JSON line holds, complete or up to an interruption."""
    result: dict[str, Any] = {"sections": {}, "seconds": {}, "failed": {}, "interrupted": False}
    for name, section in sections.items():
        report, clock = Report(), Clock(budget)
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            section(bench, clock, report)
        except KeyboardInterrupt:
            result["interrupted"] = True
        except Exception as error:
            traceback.print_exc()
            result["failed"][name] = f"{type(error).__name__}: {error}"
        if name in result["failed"]:  # here, where the traceback no longer holds what the section has made
            bench.release()
        result["sections"][name] = report.figures
        result["seconds"][name] = round(clock.elapsed, 1)
        for table in report.tables:
            if table.rows or table.notes:
                show(table.render())
        if name in result["failed"]:
            show(f"{name} FAILED: {result['failed'][name]}")
        show(f"{name}: {clock.elapsed:.1f} s")
        if result["interrupted"]:
            show(f"interrupted in {name}")
            break
    return result


def bars(sections: Mapping[str, Any]) -> Table:
    """What has to hold, beside what was measured."""
    table = Table(f"What must hold on one {BARS_DEVICE}", ("what", "bar", "measured", "holds"))
    for bar in BARS:
        figure = bar.figure(sections)
        if figure is not None:
            table.add(bar.what, f"{'>=' if bar.at_least else '<='} {bar.limit:g}", figure, bar.holds(figure))
    return table


def machine(bench: Bench) -> dict[str, Any]:
    """Where this ran, and with which versions."""
    versions = {"python": platform.python_version(), "autobot_llm": _version("autobot_llm"), "cuda": torch.version.cuda}
    versions |= {name: version for name in PACKAGES if (version := _version(name)) is not None}
    return {"device": bench.device_name, "cores": os.cpu_count(), "versions": versions}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def as_markdown(result: Mapping[str, Any], shown: list[str], command: str) -> str:
    """The report that docs/results keeps: the tables as they were printed, and the figures."""
    where = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
    tables = "\n\n".join(shown)
    return (
        f"# The engine on a GPU\n\n    {command}\n\n"
        f"{where['device']}, {where['cores']} cores; {versions}; {result['date']}.\n\n"
        f"```\n{tables}\n```\n\n## As JSON\n\n```json\n{json.dumps(result)}\n```\n"
    )


def section_names(text: str) -> list[str]:
    """The sections that --sections names, in the order in which they run. Raises argparse.ArgumentTypeError."""
    wanted = [name for name in text.split(",") if name]
    unknown = [name for name in wanted if name not in ALL_SECTIONS]
    if unknown or not wanted:
        accepted = ", ".join((*SECTIONS, *QUANTIZED_SECTIONS))
        raise argparse.ArgumentTypeError(f"{text!r}: expected one or more of {accepted}, with commas")
    return [name for name in ALL_SECTIONS if name in wanted]


def quantization_names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if not names or any(name not in QUANTIZATIONS for name in names):
        raise argparse.ArgumentTypeError(f"{text!r}: expected one or more of {', '.join(QUANTIZATIONS)}, with commas")
    return names


def model_folder(text: str) -> Path:
    folder = Path(text)
    if not (folder / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a model folder, with a config.json")
    return folder


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=model_folder, metavar="DIR", help="7B model with random weights, for speed")
    parser.add_argument("--widened", type=model_folder, metavar="DIR", help="7B model that speaks: the widened one")
    parser.add_argument("--model", type=model_folder, metavar="DIR", help="one folder for both")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--sections",
        type=section_names,
        default=list(SECTIONS),
        help=f"with commas: {','.join(SECTIONS)}; {','.join(QUANTIZED_SECTIONS)}",
    )
    parser.add_argument(
        "--quantizations",
        type=quantization_names,
        default=["int8", "fp8", "int4"],
        help="what section quantized makes of the weights at load, with commas; none: as the folder has them",
    )
    parser.add_argument(
        "--budget", type=float, default=BUDGET, help=f"seconds a section may spend on repeats (default {BUDGET:g})"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, and measures nothing")
    parser.add_argument(
        "--kv-cache-dtype", choices=("auto", "int8", "fp8"), default="auto", help="how keys and values are stored"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the report to this file, too")
    return parser.parse_args(arguments)


def main() -> int:
    arguments = parse()
    shown: list[str] = []

    def show(text: str) -> None:
        shown.append(text)
        print(text, flush=True)
        print(flush=True)

    bench = Bench(
        random_model=arguments.random or arguments.model,
        widened_model=arguments.widened or arguments.model,
        device=arguments.device,
        quick=arguments.quick,
        kv_cache_dtype=arguments.kv_cache_dtype,
        quantizations=arguments.quantizations,
    )
    try:
        result = run(bench, {name: ALL_SECTIONS[name] for name in arguments.sections}, arguments.budget, show)
    finally:
        bench.release()
    result = {
        "benchmark": "engine_gpu",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(bench),
        "models": {
            name: str(folder) if folder else None
            for name, folder in (
                ("random", arguments.random or arguments.model),
                ("widened", arguments.widened or arguments.model),
            )
        },
        "quick": arguments.quick,
        **result,
    }
    if bench.device_name == BARS_DEVICE and not arguments.quick and arguments.random:
        table = bars(result["sections"])
        show(table.render())
        result["bars"] = {str(row[0]): row[-1] for row in table.rows}
    if arguments.markdown:
        arguments.markdown.write_text(as_markdown(result, shown, f"python {' '.join(sys.argv)}"))
    print(json.dumps(result))
    if result["interrupted"]:
        return INTERRUPTED
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
