"""The Triton kernels of `gate_mix`. What fills their arguments, and how tiles are chosen, is in ops/triton.py.

Sizes are not specialised on, or each new shape would compile anew. That rows are aligned, which 128-bit loads need, is
said by `V`: widths and strides are passed in units of V elements.
"""

from __future__ import annotations

import triton
import triton.language as tl
from diffmask_fast.kernels.gate_math import (
    exclusive_product,
    hard_concrete,
    log_open,
    log_open_slope,
    logistic_noise,
    running_product,
    running_sum,
    suffix_recursion,
    suffix_sum,
    words,
)

_NUMBERS = ("rows", "groups", "members", "parts", "part_size", "chunks", "count", "vectors", "columns", "row_programs")


@triton.jit
def _offset(index, steps, strides):
    """sum of i_d * strides[d], int64, where index is made of the i_d as sum of i_d * steps[d]; the last step is 1."""
    offset = tl.zeros_like(index).to(tl.int64)
    for d in tl.static_range(len(steps) - 1):
        offset += (index // steps[d]).to(tl.int64) * strides[d]
        index = index % steps[d]
    return offset + index.to(tl.int64) * strides[len(steps) - 1]


@triton.jit
def _rows(first, index, steps, strides, V: tl.constexpr):
    return first + _offset(index, steps, strides) * V


@triton.jit
def _gate(logits, seed, row, k, real, count, temperature, left, spread):
    """Logits, gates and their slopes of the rows (R, 1), as tiles (R, K); all are finite where there is no gate."""
    element = row.to(tl.int64) * count + k
    logit = tl.load(logits + element, mask=real & (k < count), other=0.0).to(tl.float32)
    noise = logistic_noise(words(tl.load(seed), tl.load(seed + 1), element))
    gate, slope = hard_concrete(noise, logit, temperature, left, spread)
    return logit, gate, slope


@triton.jit
def _last(running, k, count):
    return tl.sum(tl.where(k == count - 1, running, 0.0), axis=1, keep_dims=True)


@triton.jit(do_not_specialize=_NUMBERS)
def forward_kernel(
    states,
    logits,
    baseline,
    seed,
    mixed,
    gates,
    opened,
    rows,
    count,
    vectors,
    steps,
    states_at,
    baseline_at,
    temperature,
    left,
    spread,
    shift,
    R: tl.constexpr,
    C: tl.constexpr,
    BITS: tl.constexpr,
    V: tl.constexpr,
):
    """A program mixes R consecutive rows, C columns at a time."""
    row = tl.program_id(0).to(rows.dtype) * R + tl.arange(0, R)[:, None]
    real = row < rows
    column = tl.arange(0, C)[None, :]
    columns = vectors * V
    state_row = _rows(states, row, steps, states_at, V)
    mixed_row = mixed + row.to(tl.int64) * vectors * V
    # Rows that share a baseline read it from the cache.
    baseline_row = baseline + _offset(row, steps, baseline_at) * vectors * V

    # The first states are on their way while the gates are made.
    state = tl.load(state_row + column, mask=real & (column < columns), other=0.0)

    k = tl.arange(0, 1 << BITS)[None, :]
    logit, gate, _ = _gate(logits, seed, row, k, real, count, temperature, left, spread)
    running = running_product(gate, k, BITS)
    element = row.to(tl.int64) * count + k
    tl.store(gates + element, running, mask=real & (k < count))
    tl.store(opened + element, running_sum(log_open(logit, shift), k, BITS), mask=real & (k < count))
    z = _last(running, k, count)

    for start in range(0, columns, C):
        here = start + column
        b = tl.load(baseline_row + here, mask=real & (here < columns), other=0.0).to(tl.float32)
        later = tl.load(state_row + (here + C), mask=real & (here + C < columns), other=0.0)
        mix = z * state.to(tl.float32) + (1.0 - z) * b
        tl.store(mixed_row + here, mix.to(mixed.dtype.element_ty), mask=real & (here < columns))
        state = later


@triton.jit(do_not_specialize=_NUMBERS)
def backward_kernel(
    grad,
    states,
    logits,
    baseline,
    seed,
    dots,
    grad_states,
    grad_baseline,
    rows,
    groups,
    members,
    parts,
    part_size,
    chunks,
    count,
    vectors,
    group_steps,
    group_at,
    member_steps,
    member_at,
    temperature,
    left,
    spread,
    R: tl.constexpr,
    C: tl.constexpr,
    BITS: tl.constexpr,
    V: tl.constexpr,
):
    """A program takes a part of the rows that share a baseline, R at a time, and a chunk of C columns.

    It writes the chunk's share of each row's sum of grad * (state - baseline), (chunks, rows), the part's sum of
    (1 - z) * grad, (parts, groups, H), and the states' gradient; the last two may be None.
    """
    chunk = tl.program_id(0) % chunks
    part = tl.program_id(0) // chunks % parts
    group = tl.program_id(0) // chunks // parts
    column = chunk * C + tl.arange(0, C)[None, :]
    inside = column < vectors * V
    b = tl.load(baseline + group.to(tl.int64) * vectors * V + column, mask=inside, other=0.0).to(tl.float32)
    first_row = _offset(group, group_steps, group_at[0])
    first_state = states + _offset(group, group_steps, group_at[1]) * V
    first_grad = grad + _offset(group, group_steps, group_at[2]) * V
    k = tl.arange(0, 1 << BITS)[None, :]

    total = tl.zeros((1, C), tl.float32)
    begin = part.to(members.dtype) * part_size
    end = tl.minimum(begin + part_size, members)
    member = begin + tl.arange(0, R)[:, None]
    some = (member < end) & inside
    state = tl.load(_rows(first_state, member, member_steps, member_at[1], V) + column, mask=some, other=0.0)
    g = tl.load(_rows(first_grad, member, member_steps, member_at[2], V) + column, mask=some, other=0.0)
    for _ in range(begin, end, R):
        real = member < end
        row = first_row + _offset(member, member_steps, member_at[0])
        z = tl.zeros((R, 1), tl.float32)
        if grad_states is not None or grad_baseline is not None:
            _, gate, _ = _gate(logits, seed, row, k, real, count, temperature, left, spread)
            z = _last(running_product(gate, k, BITS), k, count)
        # The next rows are on their way while these are summed. Asked for before the gates, they would have Triton lay
        # tiles out in the gates' way, and pass them through shared memory.
        member += R
        some = (member < end) & inside
        next_state = tl.load(_rows(first_state, member, member_steps, member_at[1], V) + column, mask=some, other=0.0)
        next_g = tl.load(_rows(first_grad, member, member_steps, member_at[2], V) + column, mask=some, other=0.0)
        wide = g.to(tl.float32)
        dot = tl.sum(wide * (state.to(tl.float32) - b), axis=1, keep_dims=True)
        tl.store(dots + chunk.to(tl.int64) * rows + row, dot, mask=real)
        if grad_baseline is not None:
            total += tl.sum((1.0 - z) * wide, axis=0, keep_dims=True)
        if grad_states is not None:
            place = grad_states + row * vectors * V + column
            tl.store(place, (z * wide).to(grad_states.dtype.element_ty), mask=real & inside)
        state, g = next_state, next_g
    if grad_baseline is not None:
        place = grad_baseline + (part.to(tl.int64) * groups + group) * vectors * V + column
        tl.store(place, total.to(grad_baseline.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_NUMBERS)
def finish_kernel(
    dots,
    grad_gates,
    grad_opened,
    logits,
    seed,
    grad_logits,
    partial,
    grad_baseline,
    rows,
    count,
    chunks,
    parts,
    columns,
    row_programs,
    temperature,
    left,
    spread,
    shift,
    R: tl.constexpr,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
):
    """The first `row_programs` programs each make the logits' gradient of R rows, from the dots (chunks, rows) and the
    gradients of the running gates and of log_open (rows, K). The others each sum C columns of partial (parts, columns).

    dots, grad_gates, grad_opened and partial may be None.
    """
    if tl.program_id(0) < row_programs:
        row = tl.program_id(0).to(rows.dtype) * R + tl.arange(0, R)[:, None]
        real = row < rows
        k = tl.arange(0, 1 << BITS)[None, :]
        exists = real & (k < count)
        element = row.to(tl.int64) * count + k
        logit, gate, slope = _gate(logits, seed, row, k, real, count, temperature, left, spread)
        grad = tl.zeros((R, 1 << BITS), tl.float32)
        if dots is not None:
            dot = tl.zeros((R, 1), tl.float32)
            of_chunk = dots + row
            for _ in range(chunks):
                dot += tl.load(of_chunk, mask=real, other=0.0)
                of_chunk += rows
            grad = tl.where(k == count - 1, dot, 0.0)
        if grad_gates is not None:
            grad += tl.load(grad_gates + element, mask=exists, other=0.0)
        before = exclusive_product(running_product(gate, k, BITS), k)
        # With G_j = z_0 ... z_j:  dz_j = G_{j-1} * S_j,  S_j = dG_j + z_{j+1} * S_{j+1}. Nothing is divided by a gate.
        grad = suffix_recursion(grad, gate, k, BITS) * (slope * before)
        if grad_opened is not None:
            later = suffix_sum(tl.load(grad_opened + element, mask=exists, other=0.0), k, BITS)
            grad += later * log_open_slope(logit, shift)
        tl.store(grad_logits + element, grad.to(grad_logits.dtype.element_ty), mask=exists)
    elif partial is not None:
        column = (tl.program_id(0) - row_programs).to(columns.dtype) * C + tl.arange(0, C)[None, :]
        inside = column < columns
        part = tl.arange(0, PARTS)[:, None]
        total = tl.zeros((PARTS, C), tl.float32)
        for start in range(0, parts, PARTS):
            place = partial + (start + part).to(tl.int64) * columns + column
            total += tl.load(place, mask=(start + part < parts) & inside, other=0.0)
        total = tl.sum(total, axis=0, keep_dims=True)
        tl.store(grad_baseline + column, total.to(grad_baseline.dtype.element_ty), mask=inside)
