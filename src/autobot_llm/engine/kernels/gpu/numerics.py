"""What the sampling kernels compute for one value: exact-enough logarithms and exponentials, noise, and integers that
order like floats. Knows numbers; knows nothing of rows or of how a token is chosen.

The device's own exp and log are approximations whose relative error grows away from 0 (exp) and towards 1 (log); the
token that wins has a small noise, which is where the latter would hurt. The functions here stay within 4 units in the
last place (checked over the whole range by tests/kernels/test_device_sampling.py); the host's are about as exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN2_HIGH = tl.constexpr(0.693359375)  # 10 bits: its product with an exponent is exact
_LN2_LOW = tl.constexpr(-2.12194440054690583e-4)
_SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
_ONE_BITS = tl.constexpr(0x3F800000)

_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = tl.constexpr(0x94D049BB133111EB)

MINUS_INFINITY_ORDER = tl.constexpr(-0x7F800001)
_LOW_HALF = tl.constexpr(0xFFFFFFFF)


@triton.jit
def exponential(x):  # type: ignore[no-untyped-def]
    """e^x of float32 values that are 0 or less. Below -87 the result may be 0, or a subnormal number."""
    x = tl.maximum(x, -120.0)
    num_doublings = tl.floor(x * _LOG2_E + 0.5)
    rest = x - num_doublings * _LN2_HIGH - num_doublings * _LN2_LOW
    return tl.exp2(rest * _LOG2_E) * tl.exp2(num_doublings)


@triton.jit
def minus_log1p_of_minus(u):  # type: ignore[no-untyped-def]
    """-log(1 - u) of float32 values in (0, 1]; infinity at 1.

    1 - u = 2^k (1 + f) with 1 + f between sqrt(1/2) and sqrt(2), and log(1 + f) = 2 artanh(f / (2 + f)). Where k is 0,
    f is -u itself: nothing is lost however small u is.
    """
    bits = (1.0 - u).to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    f = tl.where(exponent == 0, -u, mantissa - 1.0)
    s = tl.div_rn(f, 2.0 + f)
    z = s * s
    # artanh(s) / s - 1 up to z^4 / 9: z stays below 0.0295, so the next term is below 2^-28
    series = z * (1 / 3 + z * (1 / 5 + z * (1 / 7 + z * (1 / 9))))
    # f - s f = 2 s, so that the leading term is f, which is exact
    log_mantissa = f - s * (f - 2.0 * series)
    k = exponent.to(tl.float32)
    result = -(k * _LN2_HIGH + (k * _LN2_LOW + log_mantissa))
    return tl.where(u < 1.0, result, float("inf"))


@triton.jit
def exponential_noise(key, ids):  # type: ignore[no-untyped-def]
    """The noise of engine/noise.py: exponentially distributed, mean 1, a function of (key, token id). int64 in."""
    x = key.to(tl.uint64, bitcast=True) + (ids + 1).to(tl.uint64) * _GAMMA
    x = (x ^ (x >> 30)) * _MULTIPLIER_1
    x = (x ^ (x >> 27)) * _MULTIPLIER_2
    x = ((x ^ (x >> 31)) >> 11) | 1
    return minus_log1p_of_minus(x.to(tl.int64).to(tl.float32) * (2.0**-53))


@triton.jit
def order_of(x):  # type: ignore[no-untyped-def]
    """int32 that order as the float32 do: equal zeros are equal, NaN is above all."""
    x = tl.where(x == 0.0, 0.0, x)  # minus zero becomes zero
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def value_of(order):  # type: ignore[no-untyped-def]
    """The inverse of `order_of`."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def packed(order, ids):  # type: ignore[no-untyped-def]
    """int64 whose largest is that of the highest order, and of the lowest id among equals."""
    return (order.to(tl.int64) << 32) | (ids.to(tl.int64) ^ _LOW_HALF)


@triton.jit
def id_of(packed_value, V):  # type: ignore[no-untyped-def]
    """The id in a packed value. Whatever went in, it lies in the vocabulary: the next step looks it up."""
    return tl.minimum((packed_value & _LOW_HALF) ^ _LOW_HALF, V - 1).to(tl.int32)
