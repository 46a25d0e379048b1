"""An EagleDevice in plain torch on the CPU: passes over a paged cache, in the order of their launches."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it

from autobot_llm.engine.speculative.eagle.growth import Growth
from autobot_llm.engine.speculative.eagle.model import EagleDraft, draft_rope
from autobot_llm.engine.speculative.eagle.on_device import Roots, Streams, Taken, Tree


class TorchEagleDevice:
    max_sequences = 3

    def __init__(
        self,
        draft: EagleDraft,
        embed_VE: torch.Tensor,
        num_blocks: int,
        block_size: int,
        *,
        num_branches: int,
        max_tokens: int,
        max_depth: int = 5,
    ) -> None:
        layer = draft.config.layer
        self._draft, self._embed_VE, self._block_size = draft, embed_VE, block_size
        self._num_branches, self.max_tokens, self.max_depth = num_branches, max_tokens, max_depth
        self._rope_PD = draft_rope(draft.config, 512, torch.float32, "cpu")
        # what was never written must not be read
        shape = (num_blocks * block_size, layer.num_kv_heads, layer.head_size)
        self._keys_NKD, self._values_NKD = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
        self.num_taken = self.num_trees = 0
        self.is_closed = False

    def most_root_rows(self, num_sequences: int) -> int:
        return max(4, 6 // num_sequences)

    def num_tree_rows(self, depth: int) -> int:
        return self._num_branches * (depth - 1)

    def keep(self, streams: list[Streams]) -> torch.Tensor:
        return torch.cat([each.streams_TF[list(each.rows)] for each in streams])

    @torch.inference_mode()
    def take_in(self, taken: Taken) -> None:
        assert len(taken.ids_T) <= self.max_tokens
        self._take(taken)

    @torch.inference_mode()
    def grow(self, taken: Taken, roots: Roots, depth: int, num_nodes: int) -> list[Tree]:
        num_sequences, branches = len(roots.context_lens_S), self._num_branches
        assert (
            num_sequences <= self.max_sequences
            and len(taken.ids_T) <= self.most_root_rows(num_sequences) * num_sequences
        )
        assert depth <= self.max_depth
        self._take(taken)
        growths = [Growth(0) for _ in range(num_sequences)]
        features_TE = self._draft.fuse(self.keep(taken.streams))[roots.last_rows_S.tolist()]
        level = Taken([], *(array[roots.last_rows_S] for array in taken[1:]))
        seen = [list(range(n)) for n in roots.context_lens_S.tolist()]  # of each token, its places
        for number in range(depth):
            if number:
                parents, ids, slots, positions, before = [], [], [], [], list[list[int]]()
                for s, growth in enumerate(growths):
                    first = roots.context_lens_S[s] + (number - 1) * branches
                    own = len(growth.frontier)
                    parents += [s * own + place for place in growth.advance(branches, int(first))]
                    ids += [growth.nodes[node].token for node in growth.frontier]
                    slots += [int(self._slots(roots, s, [first + i])[0]) for i in range(len(growth.frontier))]
                    positions += [int(taken.positions_T[roots.last_rows_S[s]]) + number] * len(growth.frontier)
                    context = list(range(roots.context_lens_S[s]))
                    before += [context + growth.rows_to(node) for node in growth.frontier]
                features_TE, seen = features_TE[parents], before
                level = Taken([], *(torch.tensor(array).int().numpy() for array in (ids, positions, slots)))
            num_each = len(level.ids_T) // num_sequences

            def attend(
                q_THD: torch.Tensor,
                k_TKD: torch.Tensor,
                v_TKD: torch.Tensor,
                level: Taken = level,
                seen: list[list[int]] = seen,
            ) -> torch.Tensor:
                self._write(torch.from_numpy(level.slots_T), k_TKD, v_TKD)
                out = []
                for t, places in enumerate(seen):
                    slots = self._slots(roots, t * num_sequences // len(seen), places)
                    k, v = self._keys_NKD[slots].transpose(0, 1), self._values_NKD[slots].transpose(0, 1)
                    q = q_THD[t][:, None]
                    out.append(F.scaled_dot_product_attention(q, k, v, enable_gqa=True)[:, 0])
                return torch.stack(out)

            features_TE = self._pass(level, features_TE, attend)
            best = self._draft.logits(features_TE).log_softmax(dim=-1).topk(branches, dim=-1)
            ids_MN, chances_MN = self._draft.target_ids[best.indices].tolist(), best.values.tolist()
            for s, growth in enumerate(growths):
                rows = slice(s * num_each, (s + 1) * num_each)
                growth.add_level(ids_MN[rows], chances_MN[rows])
        self.num_trees += num_sequences
        kept = [growth.best(num_nodes + 1)[1:] for growth in growths]
        return [
            Tree([n.token for n in nodes], [n.parent - 1 for n in nodes], [n.log_probability for n in nodes])
            for nodes in kept
        ]

    def close(self) -> None:
        self.is_closed = True

    def _take(self, taken: Taken) -> None:
        def attend(q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> torch.Tensor:
            self._write(torch.from_numpy(taken.slots_T), k_TKD, v_TKD)
            return q_THD  # what comes of it is nobody's

        self._pass(taken, self._draft.fuse(self.keep(taken.streams)), attend)
        self.num_taken += len(taken.ids_T)

    def _pass(self, tokens: Taken, features_TE: torch.Tensor, attend: object) -> torch.Tensor:
        positions_T = torch.from_numpy(tokens.positions_T).long()
        cos_sin = tuple(table[positions_T, None] for table in self._rope_PD)
        embedded_TE = self._embed_VE[torch.from_numpy(tokens.ids_T).long()]
        return self._draft(embedded_TE, features_TE, cos_sin, attend)

    def _slots(self, roots: Roots, s: int, places: list[int]) -> torch.Tensor:
        places_N = torch.tensor(places)
        blocks_N = torch.from_numpy(roots.block_tables_SB[s]).long()[places_N // self._block_size]
        return blocks_N * self._block_size + places_N % self._block_size

    def _write(self, slots_T: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> None:
        self._keys_NKD[slots_T.long()], self._values_NKD[slots_T.long()] = k_TKD, v_TKD
