"""Which captured step a batch is replayed by, and what memory is counted on for it. No device is needed for that."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autobot_llm.engine.attention.paged import AttentionShape
from autobot_llm.engine.attention.triton_paged import TritonPagedAttention
from autobot_llm.engine.batching.plan import ScheduledSequence, StepBatch, build_batch
from autobot_llm.engine.gpu.graph_sizes import MAX_PROMPTS, crowd_graph_sizes
from autobot_llm.engine.gpu.options import GpuLimits
from autobot_llm.engine.gpu.step_graphs import StepGraphs
from autobot_llm.engine.sequence import SamplingParams, Sequence

TABLE_WIDTH = 64


class HostStaging:
    """FetchedStaging's buffers, on a host."""

    def __init__(self, num_bytes: int) -> None:
        self.on_device = torch.zeros(num_bytes, dtype=torch.uint8)
        self.slots = [np.zeros(num_bytes, np.uint8) for _ in range(2)]


def step_graphs(max_num_seqs: int, max_num_batched_tokens: int = 2048) -> StepGraphs:
    cache = torch.zeros(4, 2, 16, 8, dtype=torch.bfloat16)
    shape = AttentionShape(num_heads=8, num_kv_heads=2, head_size=8, windows=(0,))
    attention = TritonPagedAttention(shape, [cache], [cache], max_sequences=max_num_seqs, reason="a test")
    limits = GpuLimits(max_num_seqs, max_num_batched_tokens, TABLE_WIDTH * 16, TABLE_WIDTH * 16)
    graphs = StepGraphs(
        limits,
        attention,
        table_width=TABLE_WIDTH,
        num_spare_items=4,
        num_spare_items_if_long=4,
        window=0,
        takes_trees=True,
    )
    graphs.bind(HostStaging(graphs.num_bytes), torch.zeros(max_num_seqs, dtype=torch.int64))  # type: ignore[arg-type]
    graphs.is_captured = True
    return graphs


def step(num_decoding: int, num_prompt_tokens: int = 0, num_draft: int = 0) -> StepBatch:
    """Sequences with one token each and as many drafts, and a prompt."""
    parts = [(40, 1 + num_draft)] * num_decoding + [(0, num_prompt_tokens)] * (num_prompt_tokens > 0)
    scheduled = []
    for i, (start, number) in enumerate(parts):
        sequence = Sequence(i, [1] * (start + number), SamplingParams(max_tokens=9))
        sequence.block_ids.extend(range(-(-(start + number) // 16)))
        sequence.draft_ids = [1] * (number - 1 if start else 0)
        scheduled.append(ScheduledSequence(sequence, start, number, True, 0, len(sequence.draft_ids)))
    return build_batch(scheduled, 16)


@pytest.mark.parametrize(
    ("num_decoding", "num_prompt_tokens", "num_draft", "key"),
    [
        (100, 0, 0, "decode 128"),
        (63, 100, 0, "prompts 192"),
        (64, 100, 0, "crowds 192"),
        (100, 400, 0, "crowds 512"),
        (127, 441, 0, "crowds 640"),
        (255, 700, 0, "crowds 1024"),
        (256, 700, 0, None),  # more than there may be
        (100, 1000, 0, None),  # larger than what is captured
        (8, 0, 7, "prompts 64"),
        (8, 0, 16, None),  # the logits of all its tokens are wanted
        (90, 0, 1, "crowds 192"),
    ],
)
def test_a_step_with_prompts_has_a_graph_for_few_sequences_and_one_for_many(
    num_decoding: int, num_prompt_tokens: int, num_draft: int, key: str | None
) -> None:
    graphs, batch = step_graphs(256), step(num_decoding, num_prompt_tokens, num_draft)
    graph = graphs.find(batch)
    assert (None if graph is None else graph.key) == key
    if graph is None:
        return
    host = graphs.fill(graph, 0, batch)
    assert host["ids"][: batch.num_tokens].tolist() == batch.ids_T.tolist()
    assert (host["slots"][batch.num_tokens :] == -1).all()
    if graph.batch is None:
        num_rows = len(batch.logit_rows_R)
        assert host["logit_rows"][:num_rows].tolist() == batch.logit_rows_R.tolist()
        tables_SB = host["block_tables"]
        assert tables_SB[: batch.num_sequences, : batch.block_tables_SB.shape[1]].tolist() == (
            batch.block_tables_SB.tolist()
        )
        items_I8 = host["items"]
        served = set(items_I8[items_I8[:, 0] >= 0, 0].tolist())
        assert num_draft or set(range(num_decoding)) <= served, "everybody who decodes is attended to"


def test_no_graphs_of_crowds_where_there_are_none() -> None:
    assert not crowd_graph_sizes(8192, MAX_PROMPTS)
    assert crowd_graph_sizes(500, MAX_PROMPTS + 1) == (192, 256, 384)
    assert not any(graph.key.startswith("crowds") for graph in step_graphs(MAX_PROMPTS).all)
