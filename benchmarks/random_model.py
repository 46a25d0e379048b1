"""Make a model folder of any shape with random weights: its speed is real, and what it says is noise.

Weights are drawn as for the start of a training, so that activations stay finite in 16 bits. The tokenizer is that of
the embedded model; ids beyond it have no text. Made on a GPU if there is one, else on the CPU, one tensor at a time.
Prints one JSON line.

    python benchmarks/random_model.py mistral-7b-random --shape mistral-7b --vocab 32000     # 7.24B parameters, 14.5 GB
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from folder_writer import TOKENIZER_FILES, write_folder
from widen import DTYPES, add_folder_arguments, config_file, report_folder
from widening import SHAPES, Shape, resized

from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.models.weights import expected_shapes

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
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write a random model of the Llama family, whole or not at all; return the bytes of its tensors.

    `max_context` is the longest sequence that it takes, in tokens. Raises ValueError for a vocabulary smaller than the
    tokenizer's, and what `write_folder` raises.
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
    return write_folder(
        folder,
        config=config_file(EMBEDDED, config, dtype),
        dtype=dtype,
        shapes=shapes,
        tensors=_random_tensors(shapes, shape.num_layers, dtype, torch.device(device), seed),
        copies=[EMBEDDED / name for name in TOKENIZER_FILES],
        on_progress=on_progress,
    )


def _random_tensors(
    shapes: Mapping[str, tuple[int, ...]], num_layers: int, dtype: torch.dtype, device: torch.device, seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator(device).manual_seed(seed)
    # what writes to the residual stream is smaller, so that the stream does not grow with depth (as in GPT-2)
    writer_std = STD / math.sqrt(2 * num_layers)
    for name, shape in shapes.items():
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if "norm" in name:
            tensor.fill_(1.0)
        else:
            writes = name.endswith((".o_proj.weight", ".down_proj.weight"))
            tensor.normal_(0.0, writer_std if writes else STD, generator=generator)
        yield name, tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder to make")
    parser.add_argument("--vocab", type=int, default=32_000, help="rows of the embedding and the head (default 32000)")
    parser.add_argument("--context", type=int, default=32_768, help="longest sequence in tokens (default 32768)")
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
            on_progress=on_progress,
        ),
    )


if __name__ == "__main__":
    main()
