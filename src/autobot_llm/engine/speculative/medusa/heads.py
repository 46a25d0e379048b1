"""Medusa's heads: from the hidden state at one position to the tokens after the next one. Knows arithmetic; knows
neither trees nor files.

Head k looks at the normed hidden state from which the model computes token t + 1, and predicts token t + 2 + k. It is
one or more residual blocks, x + SiLU(W x + b), and a projection to the vocabulary: of its own, as published, or the
model's (`lm_head_VE`), which costs no memory and starts out as a fair guess.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import nn


# R rows, K heads, E hidden size, V vocabulary, N tokens kept of each head
class ResidualBlock(nn.Module):
    """x + SiLU(W x + b). It begins as the identity: W and b are zero."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.silu(self.linear(x))


class MedusaHead(nn.Sequential):
    """`num_layers` residual blocks, and a projection unless `vocab_size` is None: the names of its tensors are those of
    the published checkpoints (`0.linear.weight`, `0.linear.bias`, `1.weight`)."""

    def __init__(self, hidden_size: int, vocab_size: int | None, num_layers: int = 1) -> None:
        super().__init__(*(ResidualBlock(hidden_size) for _ in range(num_layers)))
        self.num_layers = num_layers
        if vocab_size is not None:
            self.append(nn.Linear(hidden_size, vocab_size, bias=False))

    def transformed(self, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden state after the residual blocks, before the projection: the shape of `hidden`."""
        for block in list(self)[: self.num_layers]:
            hidden = block(hidden)
        return hidden


class MedusaHeads(nn.ModuleList):
    """All heads of a model. `lm_head_VE` is the model's own projection, used by heads without one; never trained here.

    Names of tensors: `{head}.{layer}.linear.weight`, `.bias`, `{head}.{num_layers}.weight`.
    """

    def __init__(
        self,
        num_heads: int,
        hidden_size: int,
        vocab_size: int,
        *,
        num_layers: int = 1,
        lm_head_VE: torch.Tensor | None = None,
    ) -> None:
        own = None if lm_head_VE is not None else vocab_size
        super().__init__(MedusaHead(hidden_size, own, num_layers) for _ in range(num_heads))
        self.num_layers = num_layers
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.lm_head_VE = lm_head_VE

    @property
    def shares_lm_head(self) -> bool:
        return self.lm_head_VE is not None

    def head_logits(self, head: int, hidden: torch.Tensor) -> torch.Tensor:
        """The logits [..., V] of one head."""
        chosen = self[head]
        assert isinstance(chosen, MedusaHead)
        transformed = chosen.transformed(hidden)
        projection = self.lm_head_VE if self.lm_head_VE is not None else chosen[-1].weight
        return F.linear(transformed, projection)  # type: ignore[arg-type]

    def forward(self, hidden_RE: torch.Tensor) -> torch.Tensor:
        """The logits KRV of all heads, one after the other: the slow twin of `StackedHeads`."""
        return torch.stack([self.head_logits(head, hidden_RE) for head in range(len(self))])


class StackedHeads:
    """The same heads for decoding: the blocks of all heads are one batched product a layer, and heads that share the
    model's projection meet it in one product, which reads it once."""

    def __init__(self, heads: MedusaHeads) -> None:
        with torch.no_grad():
            blocks = [[head[layer].linear for head in heads] for layer in range(heads.num_layers)]  # type: ignore[index]
            self._weights_KEE = [torch.stack([b.weight.t() for b in row]).contiguous() for row in blocks]
            self._biases_K1E = [torch.stack([b.bias for b in row])[:, None] for row in blocks]
            self._lm_head_VE = heads.lm_head_VE
            self._own_KEV = None
            if heads.lm_head_VE is None:
                self._own_KEV = torch.stack([head[-1].weight.t() for head in heads])  # type: ignore[index]
        self.num_heads = len(heads)

    def logits(self, hidden_RE: torch.Tensor, num_heads: int | None = None) -> torch.Tensor:
        """The logits KRV of the first `num_heads` heads; None: of all."""
        number = self.num_heads if num_heads is None else num_heads
        with torch.no_grad():
            x_KRE = hidden_RE.expand(number, -1, -1)
            for weight_KEE, bias_K1E in zip(self._weights_KEE, self._biases_K1E, strict=True):
                x_KRE = x_KRE + F.silu(torch.baddbmm(bias_K1E[:number], x_KRE, weight_KEE[:number]))
            if self._own_KEV is not None:
                return torch.bmm(x_KRE, self._own_KEV[:number])
            assert self._lm_head_VE is not None
            return F.linear(x_KRE, self._lm_head_VE)

    def candidates(
        self, hidden_S: SequenceABC[torch.Tensor], num_heads: int, num_best: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """The best tokens ids_KSC of the first heads, and their logits KSC, the best first, from S hidden states E."""
        best = self.logits(torch.stack(list(hidden_S)), num_heads).topk(num_best, dim=-1)
        return best.indices.numpy(), best.values.numpy()

    def close(self) -> None:
        """Nothing to release: the heads go with this object."""

    def top_tokens(self, hidden_RE: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """The best tokens RKN of each head, the best first."""
        return self.logits(hidden_RE).topk(num_tokens, dim=-1).indices.transpose(0, 1)
