"""An EagleExecutor in plain torch on the CPU: passes over a paged cache, in the order of their launches."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it

from autobot_llm.engine.batching.plan import StepBatch
from autobot_llm.engine.executor import Features, SampledRows, SamplingArrays
from autobot_llm.engine.speculative.eagle.model import EagleDraft, draft_rope


class Launched:
    features = Features()

    def __init__(self, executor: TorchEaglePasses, rows: SampledRows) -> None:
        self._executor = executor
        self._rows = rows

    def wait(self) -> SampledRows:
        self._executor.num_unwaited -= 1
        return self._rows


class TorchEaglePasses:
    name = "torch"
    reason = "a test"

    def __init__(self, draft: EagleDraft, embed_VE: torch.Tensor, num_blocks: int, block_size: int, max_tokens: int):
        layer = draft.config.layer
        self._draft, self._embed_VE, self._block_size, self._max_tokens = draft, embed_VE, block_size, max_tokens
        self._rope_PD = draft_rope(draft.config, 512, torch.float32, "cpu")
        # what was never written must not be read
        shape = (num_blocks * block_size, layer.num_kv_heads, layer.head_size)
        self._keys_NKD, self._values_NKD = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
        self._features_TE = torch.zeros(0)
        self._returned_RE, self._last_ids_R = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
        self.num_unwaited = 0
        self.num_passes = 0
        self.is_closed = False

    def fuse(self, streams_TF: torch.Tensor) -> torch.Tensor:
        return self._draft.fuse(streams_TF)

    def set_features(self, parts: list[torch.Tensor]) -> None:
        self._features_TE = torch.cat(parts)

    @torch.inference_mode()
    def launch(self, batch: StepBatch, sampling: SamplingArrays) -> Launched:
        assert not sampling.any_drawn and batch.num_tokens <= self._max_tokens and self.num_unwaited < 2
        ids_T, features_TE = (
            torch.from_numpy(batch.ids_T).clone(),
            torch.zeros(batch.num_tokens, self._embed_VE.shape[1]),
        )
        rows_T = torch.from_numpy(batch.pending_rows_T).long()
        given, known = rows_T >= 0, rows_T < 0
        ids_T[given] = self._draft.target_ids[self._last_ids_R[rows_T[given]]]
        features_TE[given] = self._returned_RE[rows_T[given]] if given.any() else features_TE[given]
        if known.any():
            assert known.all() and len(self._features_TE) == batch.num_tokens, "features of every token, and no other"
            features_TE[known] = self._features_TE
        positions_T = torch.from_numpy(batch.positions_T).long()
        cos_sin = tuple(table[positions_T, None] for table in self._rope_PD)

        def attend(q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> torch.Tensor:
            slots_T = torch.from_numpy(batch.slots_T)
            self._keys_NKD[slots_T], self._values_NKD[slots_T] = k_TKD, v_TKD
            out = []
            for s, context in enumerate(batch.context_lens.tolist()):
                first, end = batch.query_starts[s : s + 2].tolist()
                places = torch.arange(context)
                blocks = torch.from_numpy(batch.block_tables_SB[s]).long()[places // self._block_size]
                slots = blocks * self._block_size + places % self._block_size
                seen = places[None] <= torch.arange(context - (end - first), context)[:, None]
                k, v = (cache[slots].transpose(0, 1) for cache in (self._keys_NKD, self._values_NKD))
                q = q_THD[first:end].transpose(0, 1)
                out.append(F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True).transpose(0, 1))
            return torch.cat(out)

        returned_TE = self._draft(self._embed_VE[ids_T], features_TE, cos_sin, attend)
        self._returned_RE = returned_TE[torch.from_numpy(batch.logit_rows_R)]
        best = self._draft.logits(self._returned_RE).max(dim=-1)
        self._last_ids_R, self._features_TE = best.indices, torch.zeros(0)
        self.num_unwaited += 1
        self.num_passes += 1
        return Launched(self, SampledRows(best.indices.tolist(), best.values.tolist()))

    def close(self) -> None:
        self.is_closed = True
