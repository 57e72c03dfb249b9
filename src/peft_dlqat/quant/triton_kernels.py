"""Triton kernels: a tile of the weight at a time, from what is stored to what is wanted, with no temporary in memory.

Every kernel has a tile [ROWS, COLUMNS] of the weight as [ROWS, GROUPS, COLUMNS / GROUPS]: several whole groups, or a
part of one. The arithmetic is float32, and its order is written out:

- the low-rank product is a chain of fused multiply-adds in the order of the ranks: that is what `tl.dot` in "ieee"
  precision compiles to. A matrix unit's order of sums is its own affair;
- divisions give the codes that IEEE 754's division gives, see `_divide`;
- launched with `enable_fp_fusion=False`, no other product and sum are fused, as they are not in torch, so that
  codes decoded by torch are the weight that was trained, float32 scales among them.

So a weight has one unrounded code, whichever kernel, tile or card computes it, and what lies on the edge between two
codes is merged to the one that it was trained with.

Scales and zeros come as they are trained, and are rounded here as `quantizer.ship` does it: several launches less.
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
    row_stride,
    column_stride,
    result_row_stride,
    result_column_stride,
    scaling,
    RANK: tl.constexpr,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    UPDATE_IN_STEPS: tl.constexpr,
    STORED_BITS: tl.constexpr,
    CODES_ONLY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Write w_hat, or with CODES_ONLY its codes, of one tile."""
    column = tl.program_id(0) * COLUMNS
    rows = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    steps = _of_groups(step, rows, column, n_out, n_in, GROUP_SIZE, GROUPS)
    rounding_zeros = _zeros(rounding_zero, rows, column, n_out, n_in, GROUP_SIZE, GROUPS, ZERO_POINT)
    unrounded, _ = _unrounded(
        weight, A, B, steps, rounding_zeros, rows, column, n_out, n_in, row_stride, column_stride, scaling,
        RANK, BITS, ZERO_POINT, UPDATE_IN_STEPS, STORED_BITS, ROWS, COLUMNS, GROUPS,
    )  # fmt: skip
    values = _round(_clip(unrounded, BITS))
    if not CODES_ONLY:
        scales = _scales(scale, rows, column, n_out, n_in, GROUP_SIZE, GROUPS, SCALE_DTYPE)
        zeros = _zeros(zero, rows, column, n_out, n_in, GROUP_SIZE, GROUPS, ZERO_POINT)
        if ZERO_POINT == "float":
            if SCALE_DTYPE is not None:
                zeros = (zeros - 2 ** (BITS - 1) * scales).to(SCALE_DTYPE).to(tl.float32)
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
    scale,
    zero,
    of_scale,
    of_zero,
    of_step,
    of_rounding_zero,
    n_out,
    n_in,
    row_stride,
    column_stride,
    scaling,
    RANK: tl.constexpr,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    UPDATE_IN_STEPS: tl.constexpr,
    STORED_BITS: tl.constexpr,
    FACTORS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Reduce one tile of g = dL/dw_hat [n_out, n_in] to gradients of its groups, of those that are not None.

    They are [n_out, n_sums]: n_sums is the number of groups, or of tiles where a group spans several. No number is
    written twice, so that nothing depends on the order in which tiles come.

    With FACTORS it leaves scaling * dL/dW in place of g, of which dL/dA and dL/dB are products.
    """
    column = tl.program_id(0) * COLUMNS
    rows = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = column + tl.arange(0, COLUMNS)
    mask = (rows[:, None] < n_out) & (columns[None, :] < n_in)
    where = g + rows[:, None] * n_in + columns[None, :]
    slopes = tl.load(where, mask=mask, other=0.0).to(tl.float32)
    slopes = tl.reshape(slopes, (ROWS, GROUPS, COLUMNS // GROUPS))
    steps = _of_groups(step, rows, column, n_out, n_in, GROUP_SIZE, GROUPS)
    rounding_zeros = _zeros(rounding_zero, rows, column, n_out, n_in, GROUP_SIZE, GROUPS, ZERO_POINT)
    unrounded, latent = _unrounded(
        weight, A, B, steps, rounding_zeros, rows, column, n_out, n_in, row_stride, column_stride, scaling,
        RANK, BITS, ZERO_POINT, UPDATE_IN_STEPS, STORED_BITS, ROWS, COLUMNS, GROUPS,
    )  # fmt: skip
    clipped = _clip(unrounded, BITS)
    inside = tl.where(clipped == unrounded, slopes, 0.0)
    scales = _scales(scale, rows, column, n_out, n_in, GROUP_SIZE, GROUPS, SCALE_DTYPE)
    in_steps = tl.div_rn(scales, steps)

    n_sums = tl.cdiv(n_in, COLUMNS // GROUPS)
    sums = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    where_sums = (rows[:, None] * n_sums + sums[None, :])[:, :, None]
    mask_sums = ((rows[:, None] < n_out) & (sums[None, :] < n_sums))[:, :, None]
    if of_scale is not None:
        counted = _round(clipped)
        if ZERO_POINT == "integer":
            counted -= _zeros(zero, rows, column, n_out, n_in, GROUP_SIZE, GROUPS, ZERO_POINT)
        tl.store(of_scale + where_sums, tl.sum(slopes * counted, 2, keep_dims=True), mask=mask_sums)
    if (of_zero is not None) or (of_rounding_zero is not None):
        of_all = tl.sum(slopes, 2, keep_dims=True)
        if of_zero is not None:
            values = -scales * of_all if ZERO_POINT == "integer" else of_all
            tl.store(of_zero + where_sums, values, mask=mask_sums)
        if of_rounding_zero is not None:
            # Where nothing is clipped this is `of_all` to the bit, and the gradients of the two zeros cancel.
            of_inside = of_all - tl.sum(slopes - inside, 2, keep_dims=True)
            values = of_inside * (scales if ZERO_POINT == "integer" else -in_steps)
            tl.store(of_rounding_zero + where_sums, values, mask=mask_sums)
    if of_step is not None:
        if ZERO_POINT == "integer":
            latent -= rounding_zeros
        tl.store(of_step + where_sums, tl.sum(inside * latent, 2, keep_dims=True) * -in_steps, mask=mask_sums)
    if FACTORS:
        inside *= (scales if UPDATE_IN_STEPS else in_steps) * scaling
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
    row_stride,
    column_stride,
    scaling,
    RANK: tl.constexpr,
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
    # A block of ranks at a time, the smallest that `tl.dot` takes. Where it is not full, 0 * 0 changes no number.
    BLOCK: tl.constexpr = 16
    for first in range(0, RANK, BLOCK):
        ranks = first + tl.arange(0, BLOCK)
        where_a = A + ranks[:, None] * n_in + columns[None, :]
        a = tl.load(where_a, mask=(ranks[:, None] < RANK) & (columns[None, :] < n_in), other=0.0)
        where_b = B + rows[:, None] * RANK + ranks[None, :]
        b = tl.load(where_b, mask=(rows[:, None] < n_out) & (ranks[None, :] < RANK), other=0.0)
        update = tl.dot(b.to(tl.float32), a.to(tl.float32), update, input_precision="ieee")
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
def _of_groups(values, rows, column, n_out, n_in, GROUP_SIZE: tl.constexpr, GROUPS: tl.constexpr):
    """What [n_out, n_groups] has for the tile's groups, [rows, GROUPS, 1]; 1 where there is none, which divides."""
    groups, n_groups = column // GROUP_SIZE + tl.arange(0, GROUPS), n_in // GROUP_SIZE
    mask = (rows[:, None] < n_out) & (groups[None, :] < n_groups)
    found = tl.load(values + rows[:, None] * n_groups + groups[None, :], mask=mask, other=1.0)
    return found.to(tl.float32)[:, :, None]


@triton.jit
def _scales(
    scale, rows, column, n_out, n_in, GROUP_SIZE: tl.constexpr, GROUPS: tl.constexpr, SCALE_DTYPE: tl.constexpr
):
    """Shipped scales of the tile's groups; without a SCALE_DTYPE they have come so."""
    scales = _of_groups(scale, rows, column, n_out, n_in, GROUP_SIZE, GROUPS)
    if SCALE_DTYPE is not None:
        scales = scales.to(SCALE_DTYPE).to(tl.float32)
    return scales


@triton.jit
def _zeros(zero, rows, column, n_out, n_in, GROUP_SIZE: tl.constexpr, GROUPS: tl.constexpr, ZERO_POINT: tl.constexpr):
    """Zeros of the tile's groups; zero points are rounded, as `quantizer.shipped_zero` does it."""
    if ZERO_POINT == "none":
        zeros = 0.0
    else:
        zeros = _of_groups(zero, rows, column, n_out, n_in, GROUP_SIZE, GROUPS)
        if ZERO_POINT == "integer":
            zeros = tl.where(tl.abs(zeros) < 2**22, _round(zeros), zeros)
    return zeros


@triton.jit
def _divide(values, divisors):
    """values / divisors, of which there are few.

    A product with the reciprocal and one correction is the correctly rounded quotient (Markstein 1990; Brisebarre,
    Muller, Raina 2004), unless something in between is too large or too small for float32. Divisors near such ends
    are moved by a power of two. A quotient beyond 2**24 keeps the first estimate, which may be infinite; one below
    2**-30 may differ in its last bit. Neither changes a code. An infinite divisor gives NaN.
    """
    size = tl.abs(divisors)
    unit = tl.where(size < 2.0**-60, 2.0**80, tl.where(size > 2.0**60, 2.0**-80, 1.0))
    divisors *= unit
    reciprocal = tl.div_rn(1.0, divisors)
    values *= unit
    estimate = values * reciprocal
    rest = tl.fma(estimate, _widen(-divisors, values), values)
    quotient = tl.fma(rest, _widen(reciprocal, values), estimate)
    return tl.where(tl.abs(estimate) < 2.0**24, quotient, estimate)


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
