"""Memory that quantizing takes, beside the size of the model's file: the peak of a process of its own for each type.

A random model. What a process takes with the libraries loaded and nothing done is subtracted. Prints a table, and one
JSON line. Linux only: the peak is the kernel's (VmHWM).

    python benchmarks/quantizing_memory.py                          # 0.5 GB, types fp8 (no text) and gptq
    python benchmarks/quantizing_memory.py --layers 16 --types w4 --samples 32
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from random_model import write_random_folder
from widening import Shape

from autobot_llm.engine.quantization.quantize import quantize_folder
from autobot_llm.engine.quantization.scheme import QuantizationConfig, QuantizationType

VOCAB_SIZE = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--types", nargs="+", default=["fp8", "gptq"])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--child", nargs=3, metavar=("SOURCE", "FOLDER", "TYPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        source, folder, kind = arguments.child
        print(json.dumps(peaks(Path(source), Path(folder), kind, arguments.samples, arguments.length)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "model"
        shape = Shape(1536, arguments.layers, 12, 4, 128, 4096)
        size = write_random_folder(source, shape, vocab_size=VOCAB_SIZE, max_context=512, dtype=torch.bfloat16)
        layer = (size - 2 * 2 * VOCAB_SIZE * shape.hidden_size) / arguments.layers
        hidden = 2 * arguments.samples * arguments.length * shape.hidden_size
        print(f"file {size / 1e6:.0f} MB, a layer {layer / 1e6:.0f} MB, hidden states {hidden / 1e6:.0f} MB\n")
        print("| type | peak beside the libraries | of the file |\n|---|---|---|")
        found = {}
        for kind in arguments.types:
            command = [sys.executable, __file__, "--samples", str(arguments.samples), "--length", str(arguments.length)]
            child = [*command, "--child", str(source), str(Path(temporary) / kind), kind]
            before, after = json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE).stdout)
            found[kind] = after - before
            print(f"| {kind} | {found[kind] / 1e6:.0f} MB | {found[kind] / size:.2f} |", flush=True)
    print()
    print(json.dumps({"file": size, "layer": layer, "hidden": hidden, "peaks": found}))


def peaks(source: Path, folder: Path, kind: str, samples: int, length: int) -> tuple[int, int]:
    """This process's largest resident memory in bytes, before and after quantizing; GPTQ and the like read noise."""
    config = QuantizationConfig(type=QuantizationType(kind))
    ids = torch.randint(5, VOCAB_SIZE, (samples, length)) if config.type.needs_calibration else None
    before = peak()
    quantize_folder(source, folder, config, sequences_BL=ids)
    return before, peak()


def peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


if __name__ == "__main__":
    main()
