"""The scalar math of the gate for Triton: Philox, exp and log, the Hard Concrete and its derivatives.

Line by line that of csrc/gate_math.h, so that a gate has the same bits on every backend. This takes IEEE division
(``div_rn``) and kernels compiled with ``enable_fp_fusion=False``. Unlike there, a logit that isn't finite makes all
that is computed from it NaN: a kernel can't stop and say so.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def words(seed, offset, element):
    """The words of the stream (seed, offset), int64, at these int64 elements (see ops/philox.py), as uint32.

    Each element makes a Philox call for one of its four words. Sharing calls would save a fifth of the instructions of
    a gate, but a row rarely begins with a whole call, and a program has fewer elements than threads or few more.
    """
    call = (element >> 2) + offset
    # 32-bit words, because 64-bit ones would make this Philox4x64
    low, high = (call & 0xFFFFFFFF).to(tl.uint32), ((call >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = tl.zeros_like(low)
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero)
    index = element & 3
    return tl.where(index < 2, tl.where(index == 0, w0, w1), tl.where(index == 2, w2, w3))


@triton.jit
def _bits(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _minus_magnitude(x):
    return _float(_bits(x) | 0x80000000)


@triton.jit
def _exp_of_negative(x):
    """exp(x) for x <= 0 within 1 ulp; 0 where the result would be subnormal."""
    bounded = tl.where(x < -87.0, -87.0, x)
    shifted = bounded * 1.44269504 + 12582912.0
    n = shifted - 12582912.0
    r = (bounded - n * 0.693359375) - n * -2.12194440e-4
    p = 0.0013813145
    p = p * r + 0.008369419
    p = p * r + 0.041668456
    p = p * r + 0.16666515
    p = p * r + 0.49999994
    y = 1.0 + (r + r * r * p)
    return tl.where(x < -87.0, 0.0, _float(_bits(y) + (_bits(shifted) << 23)))


@triton.jit
def _log_of_reduced(f, k):
    """k * log(2) + log(1 + f) for sqrt(1/2) - 1 <= f <= sqrt(2) - 1 and a whole number k."""
    p = -0.076344974
    p = p * f + 0.12761578
    p = p * f + -0.13160183
    p = p * f + 0.14201757
    p = p * f + -0.16623357
    p = p * f + 0.20001227
    p = p * f + -0.2500082
    p = p * f + 0.3333333
    square = f * f
    small = (f * square * p + k * -2.12194440e-4) - 0.5 * square
    return k * 0.693359375 + (f + small)


@triton.jit
def _log_of_positive(x):
    moved = _bits(x) - 0x3F3504F3
    k = (moved.to(tl.int32, bitcast=True) >> 23).to(tl.float32)
    mantissa = _float((moved & 0x007FFFFF) + 0x3F3504F3)
    return _log_of_reduced(mantissa - 1.0, k)


@triton.jit
def _log1p_of_unit(x):
    k = (_bits(0.41421357 - x) >> 31).to(tl.float32)
    return _log_of_reduced((x - k) * (1.0 - 0.5 * k), k)


@triton.jit
def logistic_noise(word):
    """log u - log(1 - u) of the word's uniform u."""
    odd = (word >> 9).to(tl.int32) * 2 + 1
    return _log_of_positive(tl.div_rn(odd.to(tl.float32), (16777216 - odd).to(tl.float32)))


@triton.jit
def hard_concrete(noise, logit, temperature, left, spread):
    """The gate and d gate / d logit; spread is right - left."""
    x = tl.div_rn(noise + logit, temperature)
    e = _exp_of_negative(_minus_magnitude(x))
    r = tl.div_rn(1.0, 1.0 + e)
    s = tl.where(x < 0.0, e * r, r)
    stretched = left + spread * s
    floored = tl.where(stretched < 0.0, 0.0, stretched)
    gate = tl.where(floored > 1.0, 1.0, floored)
    # s (1 - s) = e r^2, without the cancellation in 1 - s
    slope = tl.div_rn(spread, temperature) * (e * r * r)
    slope = tl.where((stretched > 0.0) & (stretched < 1.0), slope, 0.0)
    nothing = _zero_or_nan(logit)
    return gate + nothing, slope + nothing


@triton.jit
def log_open(logit, shift):
    """log P(z != 0); shift is temperature * log(-left / right)."""
    a = logit - shift
    opened = tl.where(a < 0.0, a, 0.0) - _log1p_of_unit(_exp_of_negative(_minus_magnitude(a)))
    return opened + _zero_or_nan(logit)


@triton.jit
def log_open_slope(logit, shift):
    """d log P(z != 0) / d logit = 1 - P(z != 0)"""
    a = logit - shift
    e = _exp_of_negative(_minus_magnitude(a))
    r = tl.div_rn(1.0, 1.0 + e)
    return tl.where(a < 0.0, r, e * r) + _zero_or_nan(logit)


@triton.jit
def _zero_or_nan(logit):
    return logit - logit


# Running products and sums along the last dim of a (R, K) tile whose columns are k, (1, K) with K = 2^BITS. The order
# of operations for a column depends on that column alone, which tl.associative_scan does not promise: a row has the
# same bits in forward and backward, whatever the tile.


@triton.jit
def _moved(x, k, distance):
    """Column k + distance of x at column k; some column of x where there is none."""
    last: tl.constexpr = x.shape[1] - 1
    place = tl.minimum(tl.maximum(k + distance, 0), last)
    return tl.gather(x, tl.broadcast_to(place, x.shape), 1)


@triton.jit
def running_product(x, k, BITS: tl.constexpr):
    for bit in tl.static_range(BITS):
        x = tl.where(k >= 1 << bit, x * _moved(x, k, -(1 << bit)), x)
    return x


@triton.jit
def running_sum(x, k, BITS: tl.constexpr):
    for bit in tl.static_range(BITS):
        x = tl.where(k >= 1 << bit, x + _moved(x, k, -(1 << bit)), x)
    return x


@triton.jit
def exclusive_product(running, k):
    """The product of the columns before k, from the running product."""
    return tl.where(k > 0, _moved(running, k, -1), 1.0)


@triton.jit
def suffix_sum(x, k, BITS: tl.constexpr):
    for bit in tl.static_range(BITS):
        x = tl.where(k + (1 << bit) < 1 << BITS, x + _moved(x, k, 1 << bit), x)
    return x


@triton.jit
def suffix_recursion(d, z, k, BITS: tl.constexpr):
    """S_k = d_k + z_{k+1} S_{k+1}, beginning at the last column with S = d."""
    if BITS > 0:
        # S_k = d_k + m_k S_{k + 2^bit}: at first m_k is z_{k+1}, and two such maps make the one of twice the distance.
        m = tl.where(k + 1 < 1 << BITS, _moved(z, k, 1), 0.0)
        for bit in tl.static_range(BITS):
            has_later = k + (1 << bit) < 1 << BITS
            d = tl.where(has_later, d + m * _moved(d, k, 1 << bit), d)
            m = tl.where(has_later, m * _moved(m, k, 1 << bit), 0.0)
    return d
