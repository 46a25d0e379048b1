"""Decoding with quantized weights on a CPU beside the same model in bfloat16: speed, and memory of the matrices.

A random model large enough that its matrices do not stay in the cache; each variant is quantized as it is loaded. The
variants take turns, on one thread, and seconds are of CPU time, so that a busy machine disturbs little. Prints a table,
and one JSON line at the end.

    python benchmarks/quantized_cpu.py                      # 0.3B parameters: the figures of docs/results
    python benchmarks/quantized_cpu.py --layers 2 --tokens 6 --rounds 1
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from random_model import write_random_folder
from widening import Shape

from autobot_llm.engine.engine import Engine
from autobot_llm.engine.load import load_engine
from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.models.weights import load_weights
from autobot_llm.engine.options import EngineOptions
from autobot_llm.engine.quantization.online import quantize_online
from autobot_llm.engine.quantization.scheme import QuantizationType
from autobot_llm.engine.request import EngineRequest, RequestStats
from autobot_llm.engine.sequence import SamplingParams

STEPS = {"compiled": "on", "torch": "off"}
KINDS = ("none", "w8a8", "w8", "w4")
PROMPT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Variant:
    step: str
    kind: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=16, help="decoded by each sequence")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "random"
        shape = Shape(2048, arguments.layers, 16, 4, 128, 5632)
        write_random_folder(folder, shape, vocab_size=8192, max_context=512, dtype=torch.bfloat16)
        memory = {kind: matrix_bytes(folder, kind) for kind in KINDS}
        best: dict[tuple[Variant, int], float] = {}
        for _ in range(arguments.rounds):
            for variant in (Variant(step, kind) for step in STEPS for kind in KINDS):
                engine = make_engine(folder, Path(temporary), variant)
                for batch in arguments.batches:
                    seconds = decode_seconds(engine, batch, arguments.tokens)
                    best[variant, batch] = min(best.get((variant, batch), float("inf")), seconds)
                engine.close()
    report(best, memory, arguments.batches)


def matrix_bytes(folder: Path, kind: str) -> int:
    weights = load_weights(folder, load_config(folder), dtype=None, device="cpu")
    rest = weights.embed_VE.numel() + weights.lm_head_VE.numel()
    if kind != "none":
        weights = quantize_online(weights, QuantizationType(kind))
    return weights.num_bytes - 2 * rest


def make_engine(folder: Path, cache_dir: Path, variant: Variant) -> Engine:
    options = EngineOptions(
        folder=folder, cache_dir=cache_dir, device="cpu", compiled_step=STEPS[variant.step], cpu_threads=1,
        quantization=QuantizationType(variant.kind), prefix_caching=False,
    )  # fmt: skip
    return load_engine(options)


def decode_seconds(engine: Engine, batch: int, num_tokens: int) -> float:
    """Seconds of CPU time for a step in which `batch` sequences get a token each, the mean after the first."""
    params = SamplingParams(max_tokens=num_tokens + 1, min_tokens=num_tokens + 1, temperature=0.0)
    for number in range(batch):
        prompt = list(range(100 + number, 100 + number + PROMPT_TOKENS))
        engine.add(number, EngineRequest(prompt_ids=prompt, params=(params,)), RequestStats())
    engine.step()  # the prompts
    num_steps, start = 0, time.process_time()
    while engine.has_work:
        engine.step()
        num_steps += 1
    return (time.process_time() - start) / num_steps


def report(best: dict[tuple[Variant, int], float], memory: dict[str, int], batches: list[int]) -> None:
    print("step      weights  matrices" + "".join(f"   ms at {batch:<3} speed-up" for batch in batches))
    rows = []
    for variant in dict.fromkeys(variant for variant, _ in best):
        cells = ""
        row = {"step": variant.step, "weights": variant.kind, "matrix_bytes": memory[variant.kind]}
        for batch in batches:
            seconds, whole = best[variant, batch], best[Variant("compiled", "none"), batch]
            cells += f"   {1e3 * seconds:8.1f}  {whole / seconds:8.2f}"
            row |= {f"ms_at_{batch}": 1e3 * seconds, f"speedup_at_{batch}": whole / seconds}
        print(f"{variant.step:<9} {variant.kind:<8} {memory[variant.kind] / 1e6:5.0f} MB{cells}")
        rows.append(row)
    print(json.dumps({"benchmark": "quantized_cpu", "rows": rows}))


if __name__ == "__main__":
    main()
