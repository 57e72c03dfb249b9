"""Triton kernels: a tile of the weight at a time, from what is stored to what is wanted, with no temporary in memory.

Every kernel has a tile [ROWS, COLUMNS] of the weight as [ROWS, GROUPS, COLUMNS / GROUPS]: several whole groups, or a
part of one. The arithmetic is float32, and its order is written out:

- the low-rank product is a chain of fused multiply-adds in the order of the ranks, and divisions are rounded as IEEE
  754 has it. So a weight has one unrounded code, whichever kernel, tile or card computes it, and what lies on the edge
  between two codes is merged to the one that it was trained with; a matrix unit's order of sums is its own affair;
- launched with `enable_fp_fusion=False`, no other product and sum are fused, as they are not in torch, so that
  codes decoded by torch are the weight that was trained, float32 scales among them.
"""

# No `from __future__ import annotations`: Triton reads tl.constexpr from the annotations.
import triton
import triton.language as tl


@triton.jit
def quantize(
    weight,
    A,
    B,
    step,
    rounding_zero,
    scale,
    zero,
    result,
    n_out,
    n_in,
    r,
    n_groups,
    group_size,
    row_stride,
    column_stride,
    result_row_stride,
    result_column_stride,
    scaling,
    BITS: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    UPDATE_IN_STEPS: tl.constexpr,
    STORED_BITS: tl.constexpr,
    CODES_ONLY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Write w_hat, or with CODES_ONLY its codes, of one tile; `scale` and `zero` are the shipped ones."""
    column = tl.program_id(0) * COLUMNS
    rows = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    steps = _of_groups(step, rows, n_out, column // group_size, n_groups, GROUPS)
    rounding_zeros = _of_groups(rounding_zero, rows, n_out, column // group_size, n_groups, GROUPS)
    unrounded, _ = _unrounded(
        weight, A, B, steps, rounding_zeros, rows, column, n_out, n_in, r, row_stride, column_stride, scaling,
        BITS, ZERO_POINT, UPDATE_IN_STEPS, STORED_BITS, ROWS, COLUMNS, GROUPS,
    )  # fmt: skip
    values = _round(_clip(unrounded, BITS))
    if not CODES_ONLY:
        scales = _of_groups(scale, rows, n_out, column // group_size, n_groups, GROUPS)
        zeros = _of_groups(zero, rows, n_out, column // group_size, n_groups, GROUPS)
        if ZERO_POINT == "float":
            values = (values + 2 ** (BITS - 1)) * scales + zeros
        elif ZERO_POINT == "integer":
            values = (values - zeros) * scales
        else:
            values = values * scales
    columns = (column + tl.arange(0, COLUMNS)).to(tl.int64)
    where = result + rows[:, None] * result_row_stride + columns[None, :] * result_column_stride
    mask = (rows[:, None] < n_out) & (columns[None, :] < n_in)
    tl.store(where, tl.reshape(values, (ROWS, COLUMNS)).to(result.dtype.element_ty), mask=mask)


@triton.jit
def weight_grads(
    g,
    weight,
    A,
    B,
    step,
    rounding_zero,
    zero,
    slope,
    sums,
    n_out,
    n_in,
    r,
    n_groups,
    group_size,
    n_sums,
    row_stride,
    column_stride,
    scaling,
    BITS: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    UPDATE_IN_STEPS: tl.constexpr,
    STORED_BITS: tl.constexpr,
    FACTORS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Reduce one tile of g = dL/dw_hat [n_out, n_in] to sums over groups.

    Writes to `sums` [4, n_out, n_sums] those of g, of g where clipped, of g times the code counted from its zero, and
    of g inside times the latent weight in steps. n_sums is n_groups, or more where a group spans several tiles: no
    number is written twice, so that nothing depends on the order in which tiles come.

    With FACTORS it leaves g * inside * slope in place of g, of which dL/dA and dL/dB are products.
    """
    column = tl.program_id(0) * COLUMNS
    rows = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = column + tl.arange(0, COLUMNS)
    mask = (rows[:, None] < n_out) & (columns[None, :] < n_in)
    where = g + rows[:, None] * n_in + columns[None, :]
    slopes = tl.load(where, mask=mask, other=0.0).to(tl.float32)
    slopes = tl.reshape(slopes, (ROWS, GROUPS, COLUMNS // GROUPS))
    steps = _of_groups(step, rows, n_out, column // group_size, n_groups, GROUPS)
    rounding_zeros = _of_groups(rounding_zero, rows, n_out, column // group_size, n_groups, GROUPS)
    unrounded, latent = _unrounded(
        weight, A, B, steps, rounding_zeros, rows, column, n_out, n_in, r, row_stride, column_stride, scaling,
        BITS, ZERO_POINT, UPDATE_IN_STEPS, STORED_BITS, ROWS, COLUMNS, GROUPS,
    )  # fmt: skip
    clipped = _clip(unrounded, BITS)
    counted = _round(clipped)
    inside = tl.where(clipped == unrounded, slopes, 0.0)
    if ZERO_POINT == "integer":
        counted = counted - _of_groups(zero, rows, n_out, column // group_size, n_groups, GROUPS)
        latent = latent - rounding_zeros
    own_sums = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    mask_sums = (rows[:, None] < n_out) & (own_sums[None, :] < n_sums)
    where_sums = sums + rows[:, None] * n_sums + own_sums[None, :]
    of_a_kind = (rows[:, None] * 0 + n_out) * n_sums
    tl.store(where_sums, tl.sum(slopes, 2), mask=mask_sums)
    tl.store(where_sums + of_a_kind, tl.sum(slopes - inside, 2), mask=mask_sums)
    tl.store(where_sums + 2 * of_a_kind, tl.sum(slopes * counted, 2), mask=mask_sums)
    tl.store(where_sums + 3 * of_a_kind, tl.sum(inside * latent, 2), mask=mask_sums)
    if FACTORS:
        inside *= _of_groups(slope, rows, n_out, column // group_size, n_groups, GROUPS)
        tl.store(where, tl.reshape(inside, (ROWS, COLUMNS)).to(g.dtype.element_ty), mask=mask)


@triton.jit
def _unrounded(
    weight,
    A,
    B,
    steps,
    rounding_zeros,
    rows,
    column,
    n_out,
    n_in,
    r,
    row_stride,
    column_stride,
    scaling,
    BITS: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    UPDATE_IN_STEPS: tl.constexpr,
    STORED_BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """u, and that part of it of which step takes a share: all of it or, with the update in grid units, W0's own.

    `steps` and `rounding_zeros` are those of the tile; the result's shape is the tile's, in groups.
    """
    columns = column + tl.arange(0, COLUMNS)
    update = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(r):
        a = tl.load(A + k * n_in + columns, mask=columns < n_in, other=0.0)
        b = tl.load(B + rows * r + k, mask=rows < n_out, other=0.0)
        update = tl.fma(_widen(b[:, None], update), _widen(a[None, :], update), update)
    update = tl.reshape(update * scaling, (ROWS, GROUPS, COLUMNS // GROUPS))

    PER_BYTE: tl.constexpr = 8 // STORED_BITS if STORED_BITS else 1
    stored = column // PER_BYTE + tl.arange(0, COLUMNS // PER_BYTE)
    mask = (rows[:, None] < n_out) & (stored[None, :] < n_in // PER_BYTE)
    where = weight + rows[:, None] * row_stride + stored[None, :].to(tl.int64) * column_stride
    own = tl.load(where, mask=mask, other=0)
    if STORED_BITS:
        PARTS: tl.constexpr = 2 ** (STORED_BITS - BITS)
        numbers = tl.reshape(_unpack(own, STORED_BITS), (ROWS, GROUPS, COLUMNS // GROUPS)).to(tl.float32)
        own = numbers * (1.0 / PARTS) + (0.5 / PARTS - 0.5 - 2 ** (BITS - 1))
        if not UPDATE_IN_STEPS:
            update = _divide(update, steps)
    else:
        own = tl.reshape(own.to(tl.float32), (ROWS, GROUPS, COLUMNS // GROUPS))
        if not UPDATE_IN_STEPS:
            own += update
        if ZERO_POINT == "float":
            own = _divide(own - rounding_zeros, steps)
        elif ZERO_POINT == "integer":
            own = _divide(own, steps) + rounding_zeros
        else:
            own = _divide(own, steps)
    if UPDATE_IN_STEPS:
        return own + update, own
    if STORED_BITS:
        own += update
    return own, own


@triton.jit
def _unpack(packed, STORED_BITS: tl.constexpr):
    """Numbers [rows, columns] from bytes; the first in a byte's lowest bits."""
    if STORED_BITS == 8:
        numbers = packed
    elif STORED_BITS == 4:
        numbers = tl.join(packed & 15, packed >> 4)
    else:
        # Joining puts the new axis last, and so the second of a pair beside the first.
        numbers = tl.join(
            tl.join(packed & 3, (packed >> 4) & 3),
            tl.join((packed >> 2) & 3, packed >> 6),
        )
    return numbers


@triton.jit
def _of_groups(values, rows, n_out, group, n_groups, GROUPS: tl.constexpr):
    """What [n_out, n_groups] has for the tile's groups, [rows, GROUPS, 1]; 1 where there is none, which divides."""
    groups = group + tl.arange(0, GROUPS)
    mask = (rows[:, None] < n_out) & (groups[None, :] < n_groups)
    return tl.load(values + rows[:, None] * n_groups + groups[None, :], mask=mask, other=1.0)[:, :, None]


@triton.jit
def _divide(values, divisors):
    """Rounded to nearest, which `/` is not."""
    return tl.div_rn(values, _widen(divisors, values))


@triton.jit
def _widen(values, like):
    return tl.broadcast_to(values, like.shape)


@triton.jit
def _clip(unrounded, BITS: tl.constexpr):
    """[qmin, qmax] of it; NaN stays NaN, so that a training that has broken shows it."""
    low: tl.constexpr = -(2 ** (BITS - 1))
    clipped = tl.maximum(unrounded, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(clipped, -low - 1, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _round(values):
    """Half to even: a float32 sum of this size has no bits left for a fraction."""
    return (values + 12582912.0) - 12582912.0  # 1.5 * 2**23
