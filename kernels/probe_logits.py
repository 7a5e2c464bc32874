"""Triton kernels of `probe_logits`: two launches forward, two backward, whatever the number of sites.

The sites' tensors stay where they are. A table of int64 numbers, one row a site, says where: see `FIELDS`. The products
with the two halves of the first weight add up in one accumulator, first over x_0 and then over x_i. A left product that
all sites share would save nothing, for no two sites have a weight in common, and would have to be written and read.

A weight is ``magnitude * direction / norm`` row by row: the kernels multiply with directions and scale what comes out.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The columns of the table: addresses, but for the second and third.
FIELDS = (
    "state",
    "stride",  # of the state's rows, in elements
    "size",  # of the state's last dim
    "magnitude",
    "direction",
    "bias",
    "outer_magnitude",
    "outer_direction",
    "offset",
    "grad_magnitude",
    "grad_direction",
    "grad_bias",
    "grad_outer_magnitude",
    "grad_outer_direction",
    "grad_offset",
)
_FIELDS = tl.constexpr(len(FIELDS))
_STATE, _STRIDE, _SIZE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_MAGNITUDE, _DIRECTION, _BIAS = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
_OUTER_MAGNITUDE, _OUTER_DIRECTION, _OFFSET = tl.constexpr(6), tl.constexpr(7), tl.constexpr(8)
# Numbers that are 1 only where a state is one value wide: left to be numbers, they need no code of their own for that.
_PLAIN = ["first_stride", "first_size"]
_GRADS = tl.constexpr(6)  # how much further the gradient of a weight stands


@triton.jit
def _pointer(table, site, field: tl.constexpr, dtype: tl.constexpr):
    return tl.load(table + site * _FIELDS + field).to(tl.pointer_type(dtype))


@triton.jit
def _tanh(x):
    # Where 1 - exp(-2 |x|) would cancel, the series: its next term is below 2^-26 there.
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    square = x * x
    series = 1.0 + square * (-0.33333334 + square * (0.13333334 + square * (-0.05396825 + square * 0.021869488)))
    return tl.where(square < 0.0625, x * series, tl.where(x < 0, -far, far))


@triton.jit(do_not_specialize=_PLAIN)
def probe_norms(table, scale, first_size, width, BLOCK_W: tl.constexpr, BLOCK_F: tl.constexpr):
    """scale (S, W) = magnitude / norm of each row of the directions. Grid (S, W / BLOCK_W)."""
    site, block = tl.program_id(0), tl.program_id(1)
    features = first_size + tl.load(table + site * _FIELDS + _SIZE).to(tl.int32)
    rows = block * BLOCK_W + tl.arange(0, BLOCK_W)
    real = rows < width
    direction = _pointer(table, site, _DIRECTION, tl.float32) + rows[:, None] * features
    squares = tl.zeros([BLOCK_W, BLOCK_F], tl.float32)
    for begin in range(0, features, BLOCK_F):
        columns = begin + tl.arange(0, BLOCK_F)
        values = tl.load(direction + columns[None], mask=real[:, None] & (columns < features)[None], other=0.0)
        squares += values * values
    magnitude = tl.load(_pointer(table, site, _MAGNITUDE, tl.float32) + rows, mask=real, other=0.0)
    norm = tl.sqrt_rn(tl.sum(squares, 1))
    tl.store(scale + site * width + rows, tl.div_rn(magnitude, tl.where(real, norm, 1.0)), mask=real)


@triton.jit
def _outer_scale(table, site, width, INNER: tl.constexpr):
    """What the direction of the second weight is scaled by. INNER is a power of 2, W or more."""
    inner = tl.arange(0, INNER)
    values = tl.load(_pointer(table, site, _OUTER_DIRECTION, tl.float32) + inner, mask=inner < width, other=0.0)
    magnitude = tl.load(_pointer(table, site, _OUTER_MAGNITUDE, tl.float32))
    return tl.div_rn(magnitude, tl.sqrt_rn(tl.sum(values * values, 0)))


@triton.jit
def _accumulate(
    product, x, stride, weight, size, rows, real_rows, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """product (M, N) + the rows of x times those of the weight, whose pointers (N,) are given."""
    for begin in range(0, size, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        features = tl.load(x + rows[:, None] * stride + k[None], mask=real_rows[:, None] & (k < size)[None], other=0.0)
        weights = tl.load(weight[:, None] + k[None], mask=(k < size)[None], other=0.0)
        product = tl.dot(features.to(tl.float32), tl.trans(weights), product, input_precision=PRECISION)
    return product


@triton.jit(do_not_specialize=_PLAIN)
def probe_forward(
    table, scale, first, first_stride, first_size, logits, raw, hidden, count, width, sites, bound,
    FIRST: tl.constexpr, SAVE: tl.constexpr, BOUND: tl.constexpr, STATE: tl.constexpr, ALIGN: tl.constexpr,
    INNER: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """logits (R, S) and raw (S, R), and, where SAVE, hidden (S, R, W). Grid (R / BLOCK_M, S).

    A program has all of W for its rows, BLOCK_N at a time, so that it can finish their logits.
    """
    site = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = rows < count
    size = tl.load(table + site * _FIELDS + _SIZE).to(tl.int32)
    stride = tl.multiple_of(tl.load(table + site * _FIELDS + _STRIDE), ALIGN)
    state = tl.multiple_of(_pointer(table, site, _STATE, STATE), ALIGN)
    direction = tl.multiple_of(_pointer(table, site, _DIRECTION, tl.float32), 16)
    features = tl.multiple_of(first_size + size, ALIGN)
    first_stride, first_size = tl.multiple_of(first_stride, ALIGN), tl.multiple_of(first_size, ALIGN)
    outer_scale = _outer_scale(table, site, width, INNER)
    total = tl.zeros([BLOCK_M], tl.float32)
    for begin in range(0, width, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        inside = n < width
        # Beyond W the weight's last row stands in; its product is multiplied by a scale and an outer weight of 0.
        weight = direction + tl.minimum(n, width - 1) * features
        product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if FIRST:
            product = _accumulate(product, first, first_stride, weight, first_size, rows, real, PRECISION, BLOCK_K)
            weight += first_size
        product = _accumulate(product, state, stride, weight, size, rows, real, PRECISION, BLOCK_K)
        factor = tl.load(scale + site * width + n, mask=inside, other=0.0)
        bias = tl.load(_pointer(table, site, _BIAS, tl.float32) + n, mask=inside, other=0.0)
        second = tl.load(_pointer(table, site, _OUTER_DIRECTION, tl.float32) + n, mask=inside, other=0.0) * outer_scale
        values = _tanh(product * factor[None] + bias[None])
        total += tl.sum(values * second[None], 1)
        if SAVE:
            place = hidden + (site.to(tl.int64) * count + rows[:, None]) * width + n[None]
            tl.store(place, values, mask=real[:, None] & inside[None])
    tl.store(raw + site.to(tl.int64) * count + rows, total, mask=real)
    if BOUND:
        total = bound * _tanh(total)
    offset = tl.load(_pointer(table, site, _OFFSET, tl.float32))
    tl.store(logits + rows * sites + site, total + offset, mask=real)


@triton.jit(do_not_specialize=_PLAIN)
def probe_backward(
    table, first, first_stride, first_size, grad, raw, hidden, outer_products, count, width, sites, bound,
    FIRST: tl.constexpr, BOUND: tl.constexpr, STATE: tl.constexpr, ALIGN: tl.constexpr,
    INNER: tl.constexpr, PRECISION: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The gradients of the effective first weights, where those of the directions will stand, and of biases, offsets
    and the effective second weights, outer_products (S, W). Grid (column blocks of the widest weight, W / BLOCK_W, S).

    The gradient before tanh is made again for each block of columns: it takes less than to write and read it.
    """
    block, site = tl.program_id(0), tl.program_id(2)
    size = tl.load(table + site * _FIELDS + _SIZE).to(tl.int32)
    x = _pointer(table, site, _STATE, STATE)
    stride = tl.load(table + site * _FIELDS + _STRIDE)
    columns = block * BLOCK_H
    left = first_size
    features = tl.multiple_of(first_size + size, ALIGN)
    if FIRST:  # blocks of the left half come first
        blocks = tl.cdiv(first_size, BLOCK_H)
        if block < blocks:
            x, stride, size, left = first, first_stride.to(tl.int64), first_size, first_size * 0
        else:
            columns = (block - blocks) * BLOCK_H
    if columns >= size:
        return
    x = tl.multiple_of(x, ALIGN)
    stride = tl.multiple_of(stride, ALIGN)
    h = columns + tl.arange(0, BLOCK_H)
    n = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    second = tl.load(_pointer(table, site, _OUTER_DIRECTION, tl.float32) + n, mask=n < width, other=0.0)
    second *= _outer_scale(table, site, width, INNER)
    product = tl.zeros([BLOCK_W, BLOCK_H], tl.float32)
    bias_sum = tl.zeros([BLOCK_W], tl.float32)
    hidden_sum = tl.zeros([BLOCK_W], tl.float32)
    offset_sum = tl.zeros([BLOCK_R], tl.float32)
    for begin in range(0, count, BLOCK_R):
        rows = begin + tl.arange(0, BLOCK_R).to(tl.int64)
        real = rows < count
        g = tl.load(grad + rows * sites + site, mask=real, other=0.0)
        if block == 0:
            offset_sum += g
        if BOUND:
            bounded = _tanh(tl.load(raw + site.to(tl.int64) * count + rows, mask=real, other=0.0))
            g = g * (bound * (1.0 - bounded * bounded))
        place = hidden + (site.to(tl.int64) * count + rows[:, None]) * width + n[None]
        values = tl.load(place, mask=real[:, None] & (n < width)[None], other=0.0)
        inside = g[:, None] * second[None] * (1.0 - values * values)
        if block == 0:
            bias_sum += tl.sum(inside, 0)
            hidden_sum += tl.sum(g[:, None] * values, 0)
        states = tl.load(x + rows[:, None] * stride + h[None], mask=real[:, None] & (h < size)[None], other=0.0)
        product = tl.dot(tl.trans(inside), states.to(tl.float32), product, input_precision=PRECISION)
    direction = tl.multiple_of(_pointer(table, site, _DIRECTION + _GRADS, tl.float32), 16)
    place = direction + n[:, None] * features + left + h[None]
    tl.store(place, product, mask=(n < width)[:, None] & (h < size)[None])
    if block == 0:
        tl.store(_pointer(table, site, _BIAS + _GRADS, tl.float32) + n, bias_sum, mask=n < width)
        tl.store(outer_products + site * width + n, hidden_sum, mask=n < width)
        if tl.program_id(1) == 0:
            tl.store(_pointer(table, site, _OFFSET + _GRADS, tl.float32), tl.sum(offset_sum, 0))


@triton.jit
def _through_norm(weight, product, magnitude, grad, grad_magnitude, size, BLOCK_F: tl.constexpr):
    """From a row of the gradient of an effective weight to those of direction and magnitude; product may be grad."""
    squares = tl.zeros([BLOCK_F], tl.float32)
    dots = tl.zeros([BLOCK_F], tl.float32)
    for begin in range(0, size, BLOCK_F):
        f = begin + tl.arange(0, BLOCK_F)
        v = tl.load(weight + f, mask=f < size, other=0.0)
        squares += v * v
        dots += v * tl.load(product + f, mask=f < size, other=0.0)
    norm = tl.sqrt_rn(tl.sum(squares, 0))
    along = tl.div_rn(tl.sum(dots, 0), norm)
    tl.store(grad_magnitude, along)
    factor = tl.div_rn(tl.load(magnitude), norm)
    for begin in range(0, size, BLOCK_F):
        f = begin + tl.arange(0, BLOCK_F)
        v = tl.load(weight + f, mask=f < size, other=0.0)
        g = tl.load(product + f, mask=f < size, other=0.0)
        tl.store(grad + f, factor * (g - along * (v / norm)), mask=f < size)


@triton.jit(do_not_specialize=_PLAIN)
def probe_norms_backward(table, outer_products, first_size, width, ALIGN: tl.constexpr, BLOCK_F: tl.constexpr):
    """The gradients of effective weights to those of directions and magnitudes. Grid (W + 1, S): the last program of a
    site has the second weight."""
    row, site = tl.program_id(0), tl.program_id(1)
    if row == width:
        _through_norm(
            _pointer(table, site, _OUTER_DIRECTION, tl.float32),
            outer_products + site * width,
            _pointer(table, site, _OUTER_MAGNITUDE, tl.float32),
            _pointer(table, site, _OUTER_DIRECTION + _GRADS, tl.float32),
            _pointer(table, site, _OUTER_MAGNITUDE + _GRADS, tl.float32),
            width,
            BLOCK_F,
        )
    else:
        features = tl.multiple_of(first_size + tl.load(table + site * _FIELDS + _SIZE).to(tl.int32), ALIGN)
        grad = tl.multiple_of(_pointer(table, site, _DIRECTION + _GRADS, tl.float32), 16) + row * features
        _through_norm(
            tl.multiple_of(_pointer(table, site, _DIRECTION, tl.float32), 16) + row * features,
            grad,
            _pointer(table, site, _MAGNITUDE, tl.float32) + row,
            grad,
            _pointer(table, site, _MAGNITUDE + _GRADS, tl.float32) + row,
            features,
            BLOCK_F,
        )
