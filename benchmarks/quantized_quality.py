"""What each way of quantizing costs a model, on held-out text, beside llm-compressor's: a table, and a line of JSON.

Folders are made by what `autobot-llm quantize` runs and kept in --folders, so that a second call measures the same
ones; all are measured as its report does, on the same passages, beside the same unquantized model.

    python benchmarks/quantized_quality.py --calibration train.txt --evaluate heldout.txt --folders build/quantized
    python benchmarks/quantized_quality.py ... --llm-compressor install        # its w8a8, gptq and fp8, too
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from autobot_llm.cli.progress import Progress
from autobot_llm.engine.quantization.loader import quantize_to
from autobot_llm.engine.quantization.quality import Quality, compare_all
from autobot_llm.engine.quantization.quantize import QuantizedFolder, describe
from autobot_llm.engine.quantization.scheme import QuantizationConfig, QuantizationType
from autobot_llm.providers.native.provider import model_folder
from autobot_llm.settings import load_settings
from autobot_llm.settings.child import child_environment

OURS = ("w8a8", "w8", "fp8", "fp8 without a text", "gptq", "awq", "w4")
THEIRS = ("w8a8", "fp8", "gptq")
OUR_NAME, THEIR_NAME = "autobot_llm", "llm-compressor"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--calibration", type=Path, nargs="+", required=True)
    parser.add_argument("--evaluate", type=Path, nargs="+", required=True)
    parser.add_argument("--folders", type=Path, required=True, help="where quantized folders are kept")
    parser.add_argument("--types", nargs="+", choices=OURS, default=OURS)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--llm-compressor", choices=["off", "installed", "install"], default="off")
    arguments = parser.parse_args()
    source = model_folder(arguments.model)
    calibration, evaluation = (
        "\n".join(path.read_text(encoding="utf-8") for path in paths)
        for paths in (arguments.calibration, arguments.evaluate)
    )
    cache_dir = load_settings().cache_dir
    wanted = [(OUR_NAME, kind) for kind in arguments.types]
    if arguments.llm_compressor != "off":
        wanted += [(THEIR_NAME, kind) for kind in THEIRS if kind in arguments.types]
    made: list[QuantizedFolder] = []
    with Progress("Quantizing and measuring") as progress:
        for by, name in wanted:
            kind, _, without_text = name.partition(" ")
            folder = arguments.folders / f"{by}-{name.replace(' ', '-')}"
            config = QuantizationConfig(
                type=QuantizationType(kind),
                calibration_samples=arguments.samples,
                calibration_sequence_length=arguments.length,
            )
            if not folder.exists():
                progress.say(f"Quantizing to {name} by {by}")
                found = quantize_to(
                    source, folder, config, None if without_text else calibration, cache_dir,
                    compressor_mode=arguments.llm_compressor if by == THEIR_NAME else "off",
                    on_progress=progress.advance, environ=child_environment({}),
                )  # fmt: skip
                if found.by != by:
                    parser.error(f"{name}: {found.by}")
            made.append(describe(source, folder, by=by, seconds=0.0))
        progress.say("Measuring")
        measured = compare_all(
            source, [one.folder for one in made], evaluation, cache_dir,
            num_windows=arguments.windows, on_progress=progress.advance,
        )  # fmt: skip
    report(wanted, made, measured)


def report(wanted: list[tuple[str, str]], made: list[QuantizedFolder], measured: list[Quality]) -> None:
    first = measured[0]
    print(f"perplexity of the unquantized model {first.perplexity_before:.3f} on {first.num_tokens:,} tokens\n")
    print("| type | by | linear weights | all tensors | perplexity | change | KL | top-1 | same texts | speed |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    print(f"| unquantized | | {made[0].num_linear_bytes_before / 1e6:.2f} MB | {made[0].num_bytes_before / 1e6:.2f} MB "
          f"| {first.perplexity_before:.3f} | | | | | 1 |")  # fmt: skip
    for (by, name), folder, quality in zip(wanted, made, measured, strict=True):
        error = quality.perplexity_change_error
        print(
            f"| {name} | {by} | {folder.num_linear_bytes / 1e6:.2f} MB | {folder.num_bytes / 1e6:.2f} MB "
            f"| {quality.perplexity:.3f} | {100 * quality.perplexity_change:+.2f} %"
            f"{'' if error is None else f' ± {100 * error:.2f}'} | {quality.kl:.4f} "
            f"| {100 * quality.top1_agreement:.1f} % | {quality.exact_continuations} of {quality.num_continuations} "
            f"| {quality.speedup:.2f} |"
        )
    print()
    rows = [
        {"by": by, "type": name, "linear_bytes": folder.num_linear_bytes, "bytes": folder.num_bytes} | quality.as_json()
        for (by, name), folder, quality in zip(wanted, made, measured, strict=True)
    ]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
