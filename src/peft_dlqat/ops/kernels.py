"""Triton kernels: a tile of the weight at a time, from what is stored to what is wanted, without a temporary in memory.

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
    shift,
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
    IN_GRID_UNITS: tl.constexpr,
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
    shifts = _of_groups(shift, rows, n_out, column // group_size, n_groups, GROUPS)
    unrounded, _ = _unrounded(
        weight, A, B, steps, shifts, rows, column, n_out, n_in, r, row_stride, column_stride, scaling,
        BITS, ZERO_POINT, IN_GRID_UNITS, STORED_BITS, ROWS, COLUMNS, GROUPS,
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
    shift,
    zero,
    to_latent,
    sums,
    grad_A,
    grad_B,
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
    IN_GRID_UNITS: tl.constexpr,
    STORED_BITS: tl.constexpr,
    FACTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Reduce g = dL/dw_hat [n_out, n_in] of TILES tiles, one below the other, to sums over groups and over ranks.

    Writes, each number once, so that the result does not depend on the order in which tiles come:
        sums [4, n_out, n_sums]: of g, of g where clipped, of g times the code counted from its zero, and of g inside
            times the latent weight in steps; n_sums is n_groups, or more where a group spans several tiles.
        grad_A [strips, r, n_in]: B.T @ h, of the strip's rows, with h = g * inside * to_latent; where FACTORS.
        grad_B [tiles in a row, n_out, r]: h @ A.T, of the tile's columns; where FACTORS.

    The third axis of the launch is that of blocks of RANKS ranks.
    """
    column = tl.program_id(0) * COLUMNS
    columns = column + tl.arange(0, COLUMNS)
    ranks = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    group = column // group_size
    if FACTORS:
        mask_A = (ranks[:, None] < r) & (columns[None, :] < n_in)
        where_A = ranks[:, None] * n_in + columns[None, :]
        own_A = tl.load(A + where_A, mask=mask_A, other=0.0)
        sum_A = tl.zeros((RANKS, COLUMNS), tl.float32)
    for tile in range(TILES):
        rows = ((tl.program_id(1) * TILES + tile) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (rows[:, None] < n_out) & (columns[None, :] < n_in)
        slopes = tl.load(g + rows[:, None] * n_in + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        slopes = tl.reshape(slopes, (ROWS, GROUPS, COLUMNS // GROUPS))
        steps = _of_groups(step, rows, n_out, group, n_groups, GROUPS)
        shifts = _of_groups(shift, rows, n_out, group, n_groups, GROUPS)
        unrounded, latent = _unrounded(
            weight, A, B, steps, shifts, rows, column, n_out, n_in, r, row_stride, column_stride, scaling,
            BITS, ZERO_POINT, IN_GRID_UNITS, STORED_BITS, ROWS, COLUMNS, GROUPS,
        )  # fmt: skip
        clipped = _clip(unrounded, BITS)
        counted = _round(clipped)
        inside = tl.where(clipped == unrounded, slopes, 0.0)
        if ZERO_POINT == "integer":
            counted = counted - _of_groups(zero, rows, n_out, group, n_groups, GROUPS)
            latent = latent - shifts
        if tl.program_id(2) == 0:
            own_sums = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
            mask_sums = (rows[:, None] < n_out) & (own_sums[None, :] < n_sums)
            where = sums + rows[:, None] * n_sums + own_sums[None, :]
            of_kind = (rows[:, None] * 0 + n_out) * n_sums
            tl.store(where, tl.sum(slopes, 2), mask=mask_sums)
            tl.store(where + of_kind, tl.sum(slopes - inside, 2), mask=mask_sums)
            tl.store(where + 2 * of_kind, tl.sum(slopes * counted, 2), mask=mask_sums)
            tl.store(where + 3 * of_kind, tl.sum(inside * latent, 2), mask=mask_sums)
        if FACTORS:
            h = tl.reshape(inside * _of_groups(to_latent, rows, n_out, group, n_groups, GROUPS), (ROWS, COLUMNS))
            mask_B = (rows[:, None] < n_out) & (ranks[None, :] < r)
            own_B = tl.load(B + rows[:, None] * r + ranks[None, :], mask=mask_B, other=0.0)
            sum_A = tl.dot(tl.trans(own_B), h, sum_A, input_precision=PRECISION)
            sum_B = tl.dot(h, tl.trans(own_A), input_precision=PRECISION)
            where_B = (tl.program_id(0).to(tl.int64) * n_out + rows[:, None]) * r + ranks[None, :]
            tl.store(grad_B + where_B, sum_B, mask=mask_B)
    if FACTORS:
        tl.store(grad_A + tl.program_id(1).to(tl.int64) * r * n_in + where_A, sum_A, mask=mask_A)


@triton.jit
def _unrounded(
    weight,
    A,
    B,
    steps,
    shifts,
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
    IN_GRID_UNITS: tl.constexpr,
    STORED_BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """u, and that part of it of which step takes a share: all of it or, with the update in grid units, W0's own.

    `steps` and `shifts` are those of the tile; the result's shape is the tile's, in groups.
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
        if not IN_GRID_UNITS:
            update = _divide(update, steps)
    else:
        own = tl.reshape(own.to(tl.float32), (ROWS, GROUPS, COLUMNS // GROUPS))
        if not IN_GRID_UNITS:
            own += update
        if ZERO_POINT == "float":
            own = _divide(own - shifts, steps)
        elif ZERO_POINT == "integer":
            own = _divide(own, steps) + shifts
        else:
            own = _divide(own, steps)
    if IN_GRID_UNITS:
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
