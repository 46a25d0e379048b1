"""Make a model folder of any shape with random weights: its speed is real, and what it says is noise.

Weights are drawn as for the start of a training, so that activations stay finite in 16 bits. The tokenizer is that of
the embedded model; ids beyond it have no text. Made on a GPU if there is one, else on the CPU, one tensor at a time.
Prints one JSON line.

    python benchmarks/random_model.py mistral-7b-random --shape mistral-7b --vocab 32000     # 7.24B parameters, 14.5 GB
    python benchmarks/random_model.py mistral-7b-int4 --shape mistral-7b --quantized int4     # 4.1 GB
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from folder_writer import TOKENIZER_FILES, write_folder
from widen import DTYPES, add_folder_arguments, config_file, report_folder
from widening import SHAPES, Shape, resized

from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.models.shapes import matrix_names
from autobot_llm.engine.models.weights import expected_shapes
from autobot_llm.engine.quantization.scheme import QuantizationConfig, QuantizationType, Scheme, scheme_of
from autobot_llm.engine.quantization.writing import quantization_config

EMBEDDED = Path(__file__).parents[1] / "src" / "autobot_llm" / "assets" / "tiny"
STD = 0.02


def write_random_folder(
    folder: Path,
    shape: Shape,
    *,
    vocab_size: int,
    max_context: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seed: int = 0,
    quantized: QuantizationType = QuantizationType.NONE,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write a random model of the Llama family, whole or not at all; return the bytes of its tensors.

    `max_context` is the longest sequence that it takes, in tokens. `quantized`: the layers' matrices are stored so (in
    compressed-tensors' format), of random numbers: nothing is rounded. Raises ValueError for a vocabulary smaller than
    the tokenizer's, and what `write_folder` raises.
    """
    embedded = load_config(EMBEDDED)
    if vocab_size < embedded.vocab_size:
        raise ValueError(f"vocab_size={vocab_size}: expected {embedded.vocab_size} or more, the tokenizer's tokens")
    config = replace(
        resized(embedded, shape),
        vocab_size=vocab_size,
        max_position_embeddings=max_context,
        tie_word_embeddings=False,
    )
    shapes = expected_shapes(config)
    described: dict[str, Any] = config_file(EMBEDDED, config, dtype)
    dtypes = dict.fromkeys(shapes, dtype)
    if quantized is not QuantizationType.NONE:
        scheme = scheme_of(QuantizationConfig(type=quantized))
        described["quantization_config"] = quantization_config(scheme)
        for name in matrix_names(config):
            parts = _stored_parts(name, shapes.pop(name), scheme, dtypes.pop(name))
            shapes |= {part: part_shape for part, (part_shape, _) in parts.items()}
            dtypes |= {part: part_dtype for part, (_, part_dtype) in parts.items()}
    return write_folder(
        folder,
        config=described,
        dtype=dtypes,
        shapes=shapes,
        tensors=_random_tensors(shapes, shape.num_layers, dtypes, torch.device(device), seed),
        copies=[EMBEDDED / name for name in TOKENIZER_FILES],
        on_progress=on_progress,
    )


def _stored_parts(
    name: str, shape: tuple[int, ...], scheme: Scheme, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """What compressed-tensors stores of a matrix: names, shapes and dtypes."""
    module, (num_outputs, num_inputs) = name.removesuffix(".weight"), shape
    scale = {f"{module}.weight_scale": ((num_outputs, scheme.num_groups(num_inputs)), dtype)}
    if scheme.kind == "float" or scheme.activations is not None:
        stored = torch.float8_e4m3fn if scheme.kind == "float" else torch.int8
        return {f"{module}.weight": (shape, stored)} | scale
    num_words = num_inputs * scheme.num_bits // 32
    return {
        f"{module}.weight_packed": ((num_outputs, num_words), torch.int32),
        f"{module}.weight_shape": ((2,), torch.int64),
    } | scale


def _random_tensors(
    shapes: Mapping[str, tuple[int, ...]],
    num_layers: int,
    dtypes: Mapping[str, torch.dtype],
    device: torch.device,
    seed: int,
) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator(device).manual_seed(seed)
    # what writes to the residual stream is smaller, so that the stream does not grow with depth (as in GPT-2)
    writer_std = STD / math.sqrt(2 * num_layers)
    for name, shape in shapes.items():
        dtype, module = dtypes[name], name.rpartition(".")[0]
        std = writer_std if module.endswith((".o_proj", ".down_proj")) else STD
        if name.endswith(".weight_shape"):
            rows, words = shapes[f"{module}.weight_packed"]
            yield name, torch.tensor([rows, words * (8 if shapes[f"{module}.weight_scale"][1] > 1 else 4)])
            continue
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if name.endswith(".weight_packed"):
            tensor.random_(-(2**31), 2**31, generator=generator)
        elif dtype == torch.int8:
            tensor.random_(-128, 128, generator=generator)
        elif dtype == torch.float8_e4m3fn:
            tensor = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(generator=generator).to(dtype)
        elif name.endswith(".weight_scale"):
            tensor.fill_(std / _std_of_stored(shapes, dtypes, module))
        elif "norm" in name:
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, std, generator=generator)
        yield name, tensor


def _std_of_stored(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], module: str) -> float:
    """Of a module's numbers before its scale: even ones over all their range, or normal ones in float8."""
    if f"{module}.weight_packed" in shapes:
        return 4.61 if shapes[f"{module}.weight_scale"][1] > 1 else 73.9
    return 73.9 if dtypes[f"{module}.weight"] == torch.int8 else 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder to make")
    parser.add_argument("--vocab", type=int, default=32_000, help="rows of the embedding and the head (default 32000)")
    parser.add_argument("--context", type=int, default=32_768, help="longest sequence in tokens (default 32768)")
    parser.add_argument(
        "--quantized", choices=("int8", "fp8", "int4"), default="none", help="store random numbers of this format"
    )
    add_folder_arguments(parser)
    arguments = parser.parse_args()
    report_folder(
        arguments,
        lambda on_progress: write_random_folder(
            arguments.folder,
            SHAPES[arguments.shape],
            vocab_size=arguments.vocab,
            max_context=arguments.context,
            dtype=DTYPES[arguments.dtype],
            device=arguments.device,
            seed=arguments.seed,
            quantized=QuantizationType.from_setting(arguments.quantized),
            on_progress=on_progress,
        ),
    )


if __name__ == "__main__":
    main()
