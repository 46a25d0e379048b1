"""Choose the next tokens on the device that holds the logits, without a word to the host. Knows logits and one row of
parameters for each; knows nothing of sequences, penalties or log probabilities.

The tokens are those of engine/sampler.py for the same logits, seed and position; only logits, masses or draws that are
equal to the last bit of an exponential can make a difference. Everything is queued: nothing waits, nothing is
allocated, and the work is the same sequence of launches for any parameters, so that a CUDA graph can hold it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton

from autobot_llm.engine.kernels.gpu import sampling_kernels as kernels
from autobot_llm.engine.kernels.gpu.launch import launch_options
from autobot_llm.engine.noise import exponential_noise_on_device

_CHUNK = kernels.CHUNK.value
_DRAW_CHUNK = kernels.DRAW_CHUNK.value


# R rows, V vocabulary
@dataclass(frozen=True, slots=True)
class SamplingTensors:
    """How each row is sampled, on the device.

    Rows whose `is_drawn_R` (int32) is 0 take their best token, whatever else is said of them. `temperature_R`,
    `top_p_R` and `min_p_R` are float32, `top_k_R` is int32; top_k 0, top_p 1 and min_p 0 are off. `keys_R` holds the
    noise keys (engine/noise.py) as int64.
    """

    temperature_R: torch.Tensor
    top_k_R: torch.Tensor
    top_p_R: torch.Tensor
    min_p_R: torch.Tensor
    keys_R: torch.Tensor
    is_drawn_R: torch.Tensor


class DeviceSampler:
    """Samples up to `max_rows` rows at once, in buffers of its own.

    `tokens_R` (int32) and `bests_R` (float32) hold what the last call chose and each row's best logit; rows beyond
    those of the last call hold older answers. Their addresses never change. The last `num_draft_rows` of the tokens are
    left to others, from row `max_rows` on.
    """

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device, *, num_draft_rows: int = 0) -> None:
        self.vocab_size = vocab_size
        self.max_rows = max_rows
        self._num_chunks = triton.cdiv(vocab_size, _CHUNK)
        self._num_draw_chunks = triton.cdiv(vocab_size, _DRAW_CHUNK)
        self._options = launch_options(device)
        num_groups = self._num_chunks * kernels.GROUPS_PER_CHUNK.value
        num_candidates = kernels.NUM_CANDIDATES.value

        def buffer(dtype: torch.dtype, *widths: int) -> torch.Tensor:
            return torch.zeros((max_rows, *widths), dtype=dtype, device=device)

        self.tokens_R = torch.zeros(max_rows + num_draft_rows, dtype=torch.int32, device=device)
        self.bests_R = buffer(torch.float32)
        self._chunk_bests = buffer(torch.int64, self._num_chunks)
        self._group_bests = buffer(torch.int32, num_groups)
        self._bars = buffer(torch.int32)
        self._chunk_masses = buffer(torch.float64, self._num_chunks)
        self._num_candidates = buffer(torch.int32)
        self._candidate_logits = buffer(torch.float32, num_candidates)
        self._candidate_ids = buffer(torch.int32, num_candidates)
        self._is_pending = buffer(torch.int32)
        self._thresholds = buffer(torch.int32)
        self._chunk_draws = buffer(torch.int64, self._num_draw_chunks)

    def sample(
        self,
        logits_RV: torch.Tensor,
        sampling: SamplingTensors | None = None,
        *,
        any_drawn: bool = False,
        any_restricted: bool = False,
        into: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens_R (int32) and the best logit_R (float32) of each row of the float32 `logits_RV`.

        `any_drawn` says whether a row may be drawn, `any_restricted` whether a drawn one may have top_k, top_p or
        min_p; where they are false, the parameters are not read. A row holding NaN or infinity, or minus infinity
        alone, has such a best logit; its token means nothing, but lies in the vocabulary. Both tensors are views of
        the sampler's buffers, which the next call overwrites, or of those that they are to be written `into`.
        """
        num_rows = logits_RV.shape[0]
        tokens_R, bests_R = into = into or (self.tokens_R, self.bests_R)
        assert num_rows <= self.max_rows and logits_RV.shape[1] == self.vocab_size
        assert logits_RV.dtype == torch.float32 and logits_RV.stride(1) == 1
        if num_rows:
            self._best(logits_RV, into, with_groups=any_drawn and any_restricted)
            if any_drawn:
                assert sampling is not None and len(sampling.keys_R) >= num_rows
                if any_restricted:
                    self._restrict(logits_RV, sampling, into)
                self._draw(logits_RV, sampling, into, any_restricted)
        return tokens_R[:num_rows], bests_R[:num_rows]

    def _best(self, logits_RV: torch.Tensor, into: tuple[torch.Tensor, torch.Tensor], *, with_groups: bool) -> None:
        num_rows, num_chunks = logits_RV.shape[0], self._num_chunks
        tokens_R, bests_R = into
        kernels.best_of_chunks_kernel[(num_chunks, num_rows)](
            logits_RV,
            logits_RV.stride(0),
            self._chunk_bests,
            self._group_bests,
            self.vocab_size,
            WITH_GROUPS=with_groups,
            num_warps=4,
            **self._options,
        )
        kernels.best_of_rows_kernel[(num_rows,)](
            self._chunk_bests,
            self._group_bests,
            tokens_R,
            bests_R,
            self._bars,
            self._num_candidates,
            self.vocab_size,
            num_chunks,
            CHUNKS=triton.next_power_of_2(num_chunks),
            WITH_GROUPS=with_groups,
            num_warps=4 if with_groups else 1,
            **self._options,
        )

    def _restrict(
        self, logits_RV: torch.Tensor, sampling: SamplingTensors, into: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        num_rows, num_chunks = logits_RV.shape[0], self._num_chunks
        tokens_R, bests_R = into
        kernels.collect_candidates_kernel[(num_chunks, num_rows)](
            logits_RV,
            logits_RV.stride(0),
            bests_R,
            self._bars,
            sampling.temperature_R,
            sampling.top_k_R,
            sampling.top_p_R,
            sampling.min_p_R,
            sampling.is_drawn_R,
            self._chunk_masses,
            self._num_candidates,
            self._candidate_logits,
            self._candidate_ids,
            self.vocab_size,
            num_warps=8,
            **self._options,
        )
        kernels.restrict_rows_kernel[(num_rows,)](
            logits_RV,
            logits_RV.stride(0),
            bests_R,
            self._chunk_masses,
            self._num_candidates,
            self._candidate_logits,
            self._candidate_ids,
            sampling.temperature_R,
            sampling.top_k_R,
            sampling.top_p_R,
            sampling.min_p_R,
            sampling.keys_R,
            sampling.is_drawn_R,
            tokens_R,
            self._is_pending,
            self._thresholds,
            self.vocab_size,
            num_chunks,
            CHUNKS=triton.next_power_of_2(num_chunks),
            num_warps=16,  # a program may have to read its row a dozen times
            **self._options,
        )

    def _draw(
        self,
        logits_RV: torch.Tensor,
        sampling: SamplingTensors,
        into: tuple[torch.Tensor, torch.Tensor],
        any_restricted: bool,
    ) -> None:
        num_rows, num_chunks = logits_RV.shape[0], self._num_draw_chunks
        tokens_R, bests_R = into
        is_pending_R = self._is_pending if any_restricted else sampling.is_drawn_R
        kernels.draw_from_chunks_kernel[(num_chunks, num_rows)](
            logits_RV,
            logits_RV.stride(0),
            bests_R,
            sampling.temperature_R,
            sampling.min_p_R,
            sampling.keys_R,
            is_pending_R,
            self._thresholds,
            self._chunk_draws,
            self.vocab_size,
            RESTRICTED=any_restricted,
            num_warps=4,
            **self._options,
        )
        kernels.draw_from_rows_kernel[(num_rows,)](
            self._chunk_draws,
            is_pending_R,
            tokens_R,
            self.vocab_size,
            num_chunks,
            CHUNKS=triton.next_power_of_2(num_chunks),
            num_warps=1,
            **self._options,
        )


def sample_reference(logits_RV: torch.Tensor, sampling: SamplingTensors) -> torch.Tensor:
    """The slow twin: tokens_R by sorting each row, in float64. Rows hold finite logits."""
    columns = zip(*(getattr(sampling, name).tolist() for name in SamplingTensors.__slots__), strict=True)
    tokens = [_draw_reference(logits_V, *row) for logits_V, row in zip(logits_RV.double(), columns, strict=True)]
    return torch.tensor(tokens, dtype=torch.int32, device=logits_RV.device)


def _draw_reference(
    logits_V: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float, key: int, is_drawn: int
) -> int:
    if not is_drawn:
        return int(logits_V.argmax())
    ordered_V, ids_V = logits_V.sort(descending=True, stable=True)
    weights_V = ((ordered_V - ordered_V[0]) / temperature).exp()
    kept_V = torch.ones_like(ids_V, dtype=torch.bool)
    if 0 < top_k < len(ids_V):
        kept_V &= ordered_V >= ordered_V[top_k - 1]
    if top_p < 1.0:
        masses_V = torch.where(kept_V, weights_V, 0.0)
        begins_V = masses_V.cumsum(0) - masses_V < top_p * masses_V.sum()
        kept_V &= ordered_V >= torch.where(begins_V, ordered_V, math.inf).min().clamp(max=float(ordered_V[0]))
    kept_V &= weights_V >= min_p
    keys_11 = torch.tensor([[key]], device=logits_V.device)
    noise_V = exponential_noise_on_device(keys_11, ids_V).double().flatten()
    return int(ids_V[torch.where(kept_V, weights_V / noise_V, -1.0).argmax()])
