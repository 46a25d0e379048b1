"""Make a 7B model that really speaks: a small model, widened without changing what it computes (see widening.py).

The folder is an ordinary one of Hugging Face's kind. It is made on a GPU if there is one, else on the CPU, and needs
memory for one tensor at a time. Prints one JSON line.

    python benchmarks/widen.py src/autobot_llm/assets/tiny tiny-7b                 # 7.0B parameters, 14.0 GB
    python benchmarks/widen.py DRAFT draft-68m --shape draft-68m                   # its draft model, 67.6M
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from folder_writer import STORED_NAMES, TOKENIZER_FILES, progress_bar, write_folder
from widening import SHAPES, Shape, Widening, shape_of, widened_config

from autobot_llm.engine.models.checkpoint import open_checkpoint
from autobot_llm.engine.models.config import ModelConfig, load_config
from autobot_llm.engine.models.weights import expected_shapes
from autobot_llm.errors import ModelLoadError

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORED_NAMES}


def widened_tensors(
    source: Path, target: Shape, *, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of the model in folder `source`, widened to `target`, made one by one on `device`.

    `dict()` of it is the whole model in memory. Raises ModelLoadError for the folder, ValueError for the target.
    """
    config = load_config(source)
    widening = Widening(shape_of(config), target, dtype=dtype, device=device, seed=seed)
    return widening.model(read_tensors(source, config), expected_shapes(widened_config(config, target)))


def widen_folder(
    source: Path,
    folder: Path,
    target: Shape,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the widened model to `folder`, whole or not at all; return the bytes of its tensors. See `write_folder`."""
    tensors = widened_tensors(source, target, dtype=dtype, device=device, seed=seed)
    config = widened_config(load_config(source), target)
    return write_folder(
        folder,
        config=config_file(source, config, dtype),
        dtype=dtype,
        shapes=expected_shapes(config),
        tensors=tensors,
        copies=[source / name for name in (*TOKENIZER_FILES, "MODEL_CARD.md")],
        on_progress=on_progress,
    )


def read_tensors(folder: Path, config: ModelConfig) -> dict[str, torch.Tensor]:
    """All tensors of a model folder as they are stored, by their names there. Raises ModelLoadError."""
    shapes = expected_shapes(config)
    checkpoint = open_checkpoint(
        folder, shapes, model_type=config.model_type, may_ignore=frozenset({"lm_head.weight"} - set(shapes))
    )
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def config_file(source: Path, config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The source's config.json with the sizes of `config`, for weights of `dtype`."""
    fields: dict[str, Any] = json.loads((source / "config.json").read_text())
    fields.pop("layer_types", None)  # an entry for each layer; here all are alike
    fields.pop("torch_dtype", None)
    return fields | {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "dtype": str(dtype).removeprefix("torch."),
    }


def add_folder_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of everything that makes a model folder."""
    parser.add_argument("--shape", choices=SHAPES, default="mistral-7b", help="its sizes (default mistral-7b)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of its weights (default bfloat16)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where it is computed")
    parser.add_argument("--seed", type=int, default=0, help="of its random weights (default 0)")


def report_folder(arguments: argparse.Namespace, make: Callable[[Callable[[int, int], None]], int]) -> None:
    """Make a folder with a progress bar, and print one JSON line; exit with a message if it cannot be made."""
    start = time.perf_counter()
    try:
        with progress_bar(arguments.folder.name) as on_progress:
            num_bytes = make(on_progress)
    except (ModelLoadError, ValueError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    result = {
        "folder": str(arguments.folder),
        "shape": arguments.shape,
        "num_parameters": num_bytes // DTYPES[arguments.dtype].itemsize,
        "num_bytes": num_bytes,
        "seconds": round(time.perf_counter() - start, 2),
    }
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the folder of a Llama or Mistral model")
    parser.add_argument("folder", type=Path, help="the folder to make")
    add_folder_arguments(parser)
    arguments = parser.parse_args()
    report_folder(
        arguments,
        lambda on_progress: widen_folder(
            arguments.source,
            arguments.folder,
            SHAPES[arguments.shape],
            dtype=DTYPES[arguments.dtype],
            device=arguments.device,
            seed=arguments.seed,
            on_progress=on_progress,
        ),
    )


if __name__ == "__main__":
    main()
