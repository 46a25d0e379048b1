"""Passes of an EAGLE-3 draft beside the steps of its target: the GPU's executor over the draft's layer, and how it is
put together. Knows the target's stream, embeddings and limits; knows nothing of sequences.

The passes run on the target's own stream: what the target kept is there, and kernels that split their inputs share
memory, which no two of them may use at once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as SequenceABC

import torch

from autobot_llm.engine.attention.choice import make_attention
from autobot_llm.engine.attention.paged import BLOCK_SIZE, AttentionShape
from autobot_llm.engine.gpu.eagle_decoder import EagleDecoder
from autobot_llm.engine.gpu.executor import GpuExecutor
from autobot_llm.engine.gpu.graph_sizes import decode_graph_sizes
from autobot_llm.engine.gpu.options import DraftPlace
from autobot_llm.engine.gpu.warm_up import warm_up
from autobot_llm.engine.kernels.gpu.launch import compile_ahead
from autobot_llm.engine.kv_cache.storage import PagedStorage, bytes_per_block
from autobot_llm.engine.memory import estimated_graph_bytes
from autobot_llm.engine.speculative.eagle.model import EagleDraft
from autobot_llm.errors import ConfigurationError

log = logging.getLogger(__name__)

_SHARE_FOR_CACHE = 4
"""The draft's cache takes a fourth of what the target and the draft's weights leave."""


# T packed tokens, E hidden size, F three times the target's
class EagleGpuExecutor(GpuExecutor):
    """EagleExecutor: GpuExecutor whose tokens have features, and whose sampled tokens are ids of the draft."""

    _decoder: EagleDecoder

    def fuse(self, streams_TF: torch.Tensor) -> torch.Tensor:
        """Features TE from the target's streams, which were computed on the same stream; queued there."""
        with torch.cuda.stream(self.stream), torch.no_grad():
            return self._decoder.fuse(streams_TF)

    def set_features(self, parts: SequenceABC[torch.Tensor]) -> None:
        """The rows TE of the tokens that are launched next, one part after the other; queued."""
        num_tokens = sum(map(len, parts))
        with torch.cuda.stream(self.stream), torch.no_grad():
            rows_TE = self._decoder.features_TE[:num_tokens]
            if len(parts) == 1:
                rows_TE.copy_(parts[0])
            else:
                torch.cat(list(parts), out=rows_TE)


def build_eagle_executor(
    draft: EagleDraft, place: DraftPlace, *, num_blocks: int, name: str
) -> tuple[EagleGpuExecutor, int]:
    """An executor for the draft, which is on the device already, and its number of blocks: at most `num_blocks`.
    Raises ConfigurationError where what the target left does not suffice."""
    layer, limits = draft.config.layer, place.limits
    embed_VE = place.embeddings.embed_VE
    device, dtype = embed_VE.device, embed_VE.dtype
    block_bytes = bytes_per_block(layer, BLOCK_SIZE, dtype)
    graph_bytes = estimated_graph_bytes(
        layer,
        max_num_seqs=limits.max_num_seqs,
        num_batched_tokens=limits.max_num_batched_tokens,
        max_model_len=limits.max_model_len,
        num_bytes_each=dtype.itemsize,
    )
    room = torch.cuda.mem_get_info(device)[0] - graph_bytes
    num_blocks = min(num_blocks, room // _SHARE_FOR_CACHE // block_bytes)
    least = -(-limits.max_model_len // BLOCK_SIZE)
    if num_blocks < least:
        raise ConfigurationError(
            f"{name}: the GPU has no room for the draft's cache of {least * block_bytes / 2**20:,.0f} MiB beside the "
            "model: set AUTOBOT_GPU_MEMORY_UTILIZATION or AUTOBOT_MAX_MODEL_LEN lower"
        )
    storage = PagedStorage.allocate(layer, num_blocks, BLOCK_SIZE, dtype, device)
    shape = AttentionShape(layer.num_heads, layer.num_kv_heads, layer.head_size, layer.sliding_windows)
    attention = make_attention(
        place.attention_backend,
        shape,
        storage.keys,
        storage.values,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
    )
    decoder = EagleDecoder(
        draft,
        embed_VE,
        storage,
        attention,
        max_context=limits.max_model_len,
        max_rows=max(limits.max_num_batched_tokens, decode_graph_sizes(limits.max_num_seqs)[-1]),
    )
    executor = EagleGpuExecutor(
        decoder,
        storage,
        attention,
        limits,
        vocab_size=draft.config.draft_vocab_size,
        widest_window=shape.widest_window,
        uses_graphs=place.uses_graphs,
        reason=f"fused kernels, attention by {attention.name}",
        stream=place.stream,
    )
    with compile_ahead(device):
        warm_up(executor)
        executor.rehearse()
    warm_up(executor)
    executor.capture(_tell_nobody)
    log.info("%s: %d cache blocks of %d bytes", name, num_blocks, block_bytes)
    return executor, num_blocks


def _tell_nobody(num_done: int, num_total: int) -> None:
    """Captured within the second."""
