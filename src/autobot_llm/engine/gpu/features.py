"""Tensors for what a step on a device keeps of its work. Knows sizes; knows nothing of who reads them."""

from __future__ import annotations

import torch

from autobot_llm.engine.executor import FeatureKinds, Features

NOTHING = Features()


# T tokens, R rows whose logits are wanted, E hidden size, F the streams of all wanted layers side by side
def room_for(
    wanted: FeatureKinds, num_tokens: int, num_rows: int, hidden_size: int, dtype: torch.dtype, device: torch.device
) -> Features:
    """Tensors to keep the features of a step in, or of any smaller one: their contents mean nothing yet."""
    hidden_RE = torch.empty((num_rows, hidden_size), dtype=dtype, device=device) if wanted.hidden else None
    width = len(wanted.layers) * hidden_size
    streams_TF = torch.empty((num_tokens, width), dtype=dtype, device=device) if width else None
    return Features(hidden_RE, streams_TF)


def first_of(features: Features, num_tokens: int, num_rows: int) -> Features:
    """Views of the first tokens and rows."""
    hidden_RE, streams_TF = features
    return Features(
        None if hidden_RE is None else hidden_RE[:num_rows], None if streams_TF is None else streams_TF[:num_tokens]
    )


def copy_of(features: Features) -> Features:
    """New tensors, copied on the current stream."""
    return Features(*(None if tensor is None else tensor.clone() for tensor in features))
