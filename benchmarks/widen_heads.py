"""Medusa heads or an EAGLE-3 draft of the small model, for the widened one (see widen.py). Prints one JSON line.

    python benchmarks/widen_heads.py src/autobot_llm/assets/tiny HEADS heads-7b

HEADS is a folder that `autobot-llm train medusa` or `train eagle3` wrote. What uses the model's own projection goes on
doing so, now the widened model's.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from widen import DTYPES, add_folder_arguments
from widening import SHAPES, Shape, Widening, shape_of, widened_config

from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.models.whole_file import write_json, write_tensors
from autobot_llm.engine.speculative.eagle.config import load_eagle_config
from autobot_llm.errors import ModelLoadError

MEDUSA_FILE, EAGLE_FILE = "medusa_lm_head.safetensors", "model.safetensors"


def widen_heads(
    source: Path,
    heads: Path,
    folder: Path,
    target: Shape,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> int:
    """Write the widened heads to `folder`; return the bytes of their tensors. `source` is the small model's folder.

    Raises ModelLoadError or OSError for the folders, ValueError for the target.
    """
    about: dict[str, Any] = json.loads((heads / "config.json").read_text())
    if (heads / MEDUSA_FILE).exists():
        file_name = MEDUSA_FILE
        widening = Widening(shape_of(load_config(source)), target, dtype=dtype, device=device, seed=seed)
        tensors = widening.medusa_heads(safetensors.torch.load_file(heads / file_name))
        about["hidden_size"] = target.hidden_size
    else:
        file_name = EAGLE_FILE
        layer, target = load_eagle_config(heads).layer, replace(target, num_layers=1)
        widening = Widening(shape_of(layer), target, dtype=dtype, device=device, seed=seed)
        tensors = widening.eagle(safetensors.torch.load_file(heads / file_name))
        about |= {
            "hidden_size": target.hidden_size,
            "target_hidden_size": target.hidden_size,
            "intermediate_size": target.intermediate_size,
            "num_attention_heads": target.num_heads,
            "num_key_value_heads": target.num_kv_heads,
            "head_dim": target.head_size,
            "rms_norm_eps": widened_config(layer, target).rms_norm_eps,
            "torch_dtype": str(dtype).removeprefix("torch."),
        }
    write_tensors(folder / file_name, tensors)
    write_json(folder / "config.json", about)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the folder of the small model")
    parser.add_argument("heads", type=Path, help="its Medusa heads or EAGLE-3 draft")
    parser.add_argument("folder", type=Path, help="the folder to make")
    add_folder_arguments(parser)
    arguments = parser.parse_args()
    try:
        num_bytes = widen_heads(
            arguments.source,
            arguments.heads,
            arguments.folder,
            SHAPES[arguments.shape],
            dtype=DTYPES[arguments.dtype],
            device=arguments.device,
            seed=arguments.seed,
        )
    except (ModelLoadError, ValueError, OSError) as error:
        sys.exit(f"widen_heads.py: {error}")
    print(json.dumps({"folder": str(arguments.folder), "shape": arguments.shape, "num_bytes": num_bytes}))


if __name__ == "__main__":
    main()
