"""Random numbers that are a function of (seed, position, token id) and of nothing else. Knows integers; knows nothing
of logits or batches.

A generator with a state would tie a sequence's tokens to everything drawn before them, by anybody. Here every
candidate token has its own number, computed by hashing, so a sequence draws the same tokens alone or in a batch, in
one piece or after preemption, and a draft model can be verified against the very noise that it will meet.

The hash is SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014): the key of a
position is an output of the stream that the seed starts, and the numbers of the tokens are the outputs of the stream
that this key starts. It is done in wrapping 64-bit integers, hence is the same on every device.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def noise_keys(places: Iterable[tuple[int, int]]) -> npt.NDArray[np.uint64]:
    """Keys_R1 of places (seed, position) in sequences; a position is the index of the token to be drawn."""
    keys = [_mix((_mix(seed & _MASK) + _GAMMA * (position + 1)) & _MASK) for seed, position in places]
    return np.array(keys, np.uint64).reshape(-1, 1)


# R rows, K candidates of a row
def exponential_noise(keys_R1: npt.NDArray[np.uint64], ids_RK: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Exponentially distributed numbers, mean 1, one for each (key, token id).

    argmax(weight / noise) is then a token drawn in proportion to the weights (the Gumbel-max trick without its
    logarithms). The winner has a small noise, of the order of one in a vocabulary, so what matters is precision near
    0: 53 random bits make u, rounded to float32 with a relative error of 2^-24 however small u is, and log1p keeps
    that. A u of 24 bits would leave the winner only 7 significant ones in a vocabulary of 128,000.
    """
    x = keys_R1 + (ids_RK + 1).view(np.uint64) * np.uint64(_GAMMA)
    x ^= x >> np.uint64(30)
    x *= np.uint64(_MULTIPLIER_1)
    x ^= x >> np.uint64(27)
    x *= np.uint64(_MULTIPLIER_2)
    x ^= x >> np.uint64(31)
    x >>= np.uint64(11)
    x |= np.uint64(1)  # never 0
    u = x.astype(np.float32)
    u *= np.float32(-(2.0**-53))
    with np.errstate(divide="ignore"):  # u may round to 1: its noise is infinite, and it never wins
        return np.negative(np.log1p(u, out=u), out=u)


def exponential_noise_on_device(keys_R1: torch.Tensor, ids_RK: torch.Tensor) -> torch.Tensor:
    """The same numbers as tensors, from int64 keys and ids; the logarithm may differ in its last bit."""
    x = keys_R1 + (ids_RK + 1) * _signed(_GAMMA)
    x ^= (x >> 30) & ((1 << 34) - 1)  # torch shifts the sign in: the mask makes the shift logical
    x *= _signed(_MULTIPLIER_1)
    x ^= (x >> 27) & ((1 << 37) - 1)
    x *= _signed(_MULTIPLIER_2)
    x ^= (x >> 31) & ((1 << 33) - 1)
    x >>= 11
    x &= (1 << 53) - 1
    x |= 1
    return x.to(torch.float32).mul_(-(2.0**-53)).log1p_().neg_()


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * _MULTIPLIER_1) & _MASK
    x = ((x ^ (x >> 27)) * _MULTIPLIER_2) & _MASK
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
