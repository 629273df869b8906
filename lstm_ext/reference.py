"""The LSTM in NumPy, forward and backward: the fallback where nothing was compiled, and the oracle of the tests.

One step, from the gates' weighted sums and the cell c before it (i, f, o squashed by the sigmoid, g by tanh):

    i, f, g, o = x W_ih' + b_ih + h W_hh' + b_hh
    c' = f c + i g
    h' = o tanh(c')        (h' W_hr' with a projection)

Dimensions are T (time), B (batch), I (input), H (cells), P (width of h: H without a projection) and D (directions).
Half types compute in float32. Arguments are taken as checked; they are never written to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

FORWARD, REVERSE, BOTH = 0, 1, 2
NEEDS_X, NEEDS_H0, NEEDS_C0, NEEDS_WEIGHTS = 1, 2, 4, 8


# One step ------------------------------------------------------------------------------------------------------------


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), exact at both infinities."""
    result: Array = -x  # a new array: NumPy 2.4 negates a float32 column in place wrongly
    with np.errstate(over="ignore", under="ignore"):  # where exp(-x) is inf or 0, the sigmoid is 0 or 1
        np.exp(result, out=result)
    result += 1
    return np.divide(1, result, out=result)


def split_gates(gates: Array) -> tuple[Array, Array, Array, Array]:
    """The views i, f, g, o [..., H] of gates [..., 4H]."""
    H = gates.shape[-1] // 4
    return gates[..., :H], gates[..., H : 2 * H], gates[..., 2 * H : 3 * H], gates[..., 3 * H :]


def cell_step(gates: Array, c_prev: Array) -> tuple[Array, Array]:
    """Activates gates [B, 4H] in place and returns (h before a projection, c), both [B, H]."""
    i, f, g, o = split_gates(gates)
    i[...], f[...], g[...], o[...] = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
    c = f * c_prev + i * g
    return o * np.tanh(c), c


def cell_step_backward(gates: Array, c_prev: Array, tanh_c: Array, dh: Array, dc: Array, d_pre: Array) -> Array:
    """The gradients of `cell_step`: fills d_pre [B, 4H], of the gates before their activation; returns dc_prev [B, H].

    `dh` is the gradient of h before a projection, `dc` that of c without its part through h.
    """
    i, f, g, o = split_gates(gates)
    di, df, dg, do = split_gates(d_pre)
    dc = dc + dh * o * (1 - tanh_c * tanh_c)
    di[...] = dc * g * i * (1 - i)
    df[...] = dc * c_prev * f * (1 - f)
    dg[...] = dc * i * (1 - g * g)
    do[...] = dh * tanh_c * o * (1 - o)
    return dc * f


# One direction of a layer --------------------------------------------------------------------------------------------


class Weights(NamedTuple):
    """The weights of one direction, as the caller lists them but for the absent ones."""

    w_ih: Array  # [4H, I]
    w_hh: Array  # [4H, P]
    b_ih: Array | None  # [4H]
    b_hh: Array | None  # [4H]
    w_hr: Array | None  # [P, H]


class Walk:
    """The order in which one direction visits its rows.

    Step s of a row of length n stands at time s, or at time n - 1 - s in reverse; past its length a row rests.
    """

    def __init__(self, num_steps: int, lengths: Array | None, resets: Array | None, reverse: bool):
        self.lengths = lengths
        self.reverse = reverse
        self.active = None if lengths is None else (np.arange(num_steps)[:, None] < lengths)[..., None]  # [T, B, 1]
        self.resets = None if resets is None else self.mask(self.order(resets)[..., None])  # [T, B, 1]

    def order(self, a: Array) -> Array:
        """From time order to step order, and back: a [T, B, ...]."""
        if not self.reverse:
            return a
        if self.lengths is None:
            return a[::-1]
        step, row = np.ogrid[: a.shape[0], : a.shape[1]]
        return a[np.where(step < self.lengths, self.lengths - 1 - step, step), row]

    def mask(self, a: Array) -> Array:
        """The sequence a [T, B, ...] with zeros past each length, whatever stood there."""
        return a if self.active is None else np.where(self.active, a, a.dtype.type(0))

    def forget(self, s: int | slice, state: Array) -> Array:
        """The state before step s, with zeros where a reset stands at the step."""
        return state if self.resets is None else np.where(self.resets[s], state.dtype.type(0), state)

    def advance(self, s: int, after: Array, before: Array) -> Array:
        """`after` in the rows that take step s, `before` in those that rest."""
        return after if self.active is None else np.where(self.active[s], after, before)


def linear(x: Array, weight: Array) -> Array:
    """The product x [T, B, K] @ weight [N, K].T, taken at once."""
    T, B, K = x.shape
    product: Array = x.reshape(T * B, K) @ weight.T
    return product.reshape(T, B, weight.shape[0])


def outer_sum(a: Array, b: Array) -> Array:
    """The sum over time and batch of the outer products of a [T, B, M] and b [T, B, N]."""
    rows = a.shape[0] * a.shape[1]
    total: Array = a.reshape(rows, a.shape[2]).T @ b.reshape(rows, b.shape[2])
    return total


def direction_forward(x: Array, h: Array, c: Array, w: Weights, walk: Walk) -> tuple[Array, Array, Array, Array, Array]:
    """One direction over x [T, B, I] in step order, from the state h [B, P], c [B, H].

    Returns y [T, B, P], h_n, c_n, cells [T, B, H] and gates [T, B, 4H], the sequences in step order.
    """
    gates = linear(walk.mask(x), w.w_ih)
    if w.b_ih is not None and w.b_hh is not None:
        gates += w.b_ih + w.b_hh
    y = np.empty((*x.shape[:2], h.shape[1]), x.dtype)
    cells = np.empty((*x.shape[:2], c.shape[1]), x.dtype)
    for s in range(len(x)):
        h, c = walk.forget(s, h), walk.forget(s, c)
        gates[s] += h @ w.w_hh.T
        h_next, c_next = cell_step(gates[s], c)
        if w.w_hr is not None:
            h_next = h_next @ w.w_hr.T
        h, c = walk.advance(s, h_next, h), walk.advance(s, c_next, c)
        y[s], cells[s] = h, c
    return walk.mask(y), h, c, walk.mask(cells), walk.mask(gates)


def direction_backward(
    dy: Array,
    dh: Array,
    dc: Array,
    dcells: Array,
    x: Array,
    h0: Array,
    c0: Array,
    w: Weights,
    y: Array,
    cells: Array,
    gates: Array,
    walk: Walk,
    needs: int,
) -> tuple[Array | None, Array, Array, Weights | None]:
    """The gradients of `direction_forward`, from those of y, h_n, c_n and cells, all sequences in step order.

    Returns dx (None unless needed), dh0, dc0 and the weights' gradients (None unless needed).
    """
    h_prev = walk.mask(walk.forget(slice(None), np.concatenate([h0[None], y[:-1]])))
    c_prev = walk.mask(walk.forget(slice(None), np.concatenate([c0[None], cells[:-1]])))
    tanh_c = np.tanh(cells)
    dh_total = np.empty_like(y)  # with what arrives from later steps
    d_pre = np.empty_like(gates)
    for s in reversed(range(len(x))):
        dh_total[s] = dh + dy[s]
        dh_unprojected = dh_total[s] if w.w_hr is None else dh_total[s] @ w.w_hr
        dc_prev = cell_step_backward(gates[s], c_prev[s], tanh_c[s], dh_unprojected, dc + dcells[s], d_pre[s])
        dh = walk.advance(s, walk.forget(s, d_pre[s] @ w.w_hh), dh)
        dc = walk.advance(s, walk.forget(s, dc_prev), dc)

    d_pre = walk.mask(d_pre)
    dx = linear(d_pre, w.w_ih.T) if needs & NEEDS_X else None
    if not needs & NEEDS_WEIGHTS:
        return dx, dh, dc, None
    db = None if w.b_ih is None else d_pre.sum(axis=(0, 1))
    dw_hr = None if w.w_hr is None else outer_sum(walk.mask(dh_total), split_gates(gates)[3] * tanh_c)
    return dx, dh, dc, Weights(outer_sum(d_pre, walk.mask(x)), outer_sum(d_pre, h_prev), db, db, dw_hr)


# One layer, in the caller's layout and dtype -------------------------------------------------------------------------


class Layout:
    """How the caller lays out a sequence: [T, B, ...], [B, T, ...] or the rows [N, ...] of a packed one."""

    def __init__(self, batch_first: bool, batch_sizes: Array | None):
        self.batch_first = batch_first
        self.valid: Array | None = None  # [T, B]; row n of a packed sequence is the n-th true entry
        if batch_sizes is not None:
            self.valid = np.arange(batch_sizes[0]) < np.asarray(batch_sizes)[:, None]

    def pad(self, a: Array) -> Array:
        """From the caller's layout to [T, B, ...]."""
        if self.valid is None:
            return a.swapaxes(0, 1) if self.batch_first else a
        padded = np.zeros((*self.valid.shape, *a.shape[1:]), a.dtype)
        padded[self.valid] = a
        return padded

    def unpad(self, a: Array) -> Array:
        """From [T, B, ...] to the caller's layout."""
        if self.valid is None:
            return a.swapaxes(0, 1) if self.batch_first else a
        return a[self.valid]


def compute_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """float32 for half types; otherwise the dtype itself, in native byte order."""
    return np.result_type(dtype, np.float32)


def plain(a: Array, dtype: np.dtype[Any]) -> Array:
    """`a` as a C-contiguous array of the dtype; `a` itself if it is one."""
    return np.ascontiguousarray(a, dtype=dtype)


def zeros_if_none(a: Array | None, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """`a` in the dtype, or (read-only) zeros that take no memory."""
    return np.broadcast_to(dtype.type(0), shape) if a is None else plain(a, dtype)


def reversals(directions: int) -> tuple[bool, ...]:
    """Whether each of the directions is a reverse one."""
    return {FORWARD: (False,), REVERSE: (True,), BOTH: (False, True)}[directions]


def split_weights(weights: Sequence[Array], num_directions: int, dtype: np.dtype[Any]) -> list[Weights]:
    """The flat list (2 to 5 entries per direction, an odd number where there is a projection) by direction."""
    per_direction = len(weights) // num_directions
    groups = [weights[d * per_direction : (d + 1) * per_direction] for d in range(num_directions)]
    projected, biased = per_direction % 2 == 1, per_direction >= 4
    split = []
    for group in groups:
        arrays = [plain(a, dtype) for a in group]
        b_ih, b_hh = arrays[2:4] if biased else (None, None)
        split.append(Weights(arrays[0], arrays[1], b_ih, b_hh, arrays[-1] if projected else None))
    return split


def row_lengths(lengths: Array | None, layout: Layout) -> Array | None:
    """The length of each row [B], or None where all rows are full."""
    if layout.valid is None:
        return lengths
    valid_steps: Array = layout.valid.sum(axis=0)
    return valid_steps


def layer_forward(
    x: Array,
    h0: Array | None,
    c0: Array | None,
    weights: Sequence[Array],
    lengths: Array | None,
    resets: Array | None,
    batch_sizes: Array | None,
    directions: int,
    batch_first: bool,
    save: int,
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """One or both directions of an LSTM layer over a whole sequence.

    Args:
        x: [T, B, I], or [B, T, I] if `batch_first`, or packed rows [N, I] if `batch_sizes` is given.
        h0: initial h [D, B, P]; None is zeros.
        c0: initial c [D, B, H]; None is zeros.
        weights: per direction w_ih [4H, I], w_hh [4H, P], then both or neither of b_ih, b_hh [4H], then perhaps
            w_hr [P, H]; gates in the order i, f, g, o.
        lengths: the valid steps of each row [B], or None. What x holds past them does not matter.
        resets: bool, laid out as x: where True, the state is zero before that step; or None.
        batch_sizes: the rows of each time [T], from a PackedSequence, or None.
        directions: FORWARD, REVERSE or BOTH.
        batch_first: whether B comes before T in x, resets and y.
        save: 0 for neither cells nor gates, 1 for cells, 2 for both (what `layer_backward` needs).

    Returns:
        y laid out as x, [T, B, D * P], zero past a length; h_n [D, B, P]; c_n [D, B, H]; cells [D, T, B, H] (packed:
        [D, N, H]; float32 for half types); gates after their activation [D, T, B, 4H] (packed: [D, N, 4H]).
    """
    result, dtype = x.dtype.newbyteorder("="), compute_dtype(x.dtype)
    layout, time_major = Layout(batch_first, batch_sizes), Layout(False, batch_sizes)
    x = plain(layout.pad(x), dtype)
    lengths = row_lengths(lengths, layout)
    resets = None if resets is None else layout.pad(resets)
    walks = [Walk(len(x), lengths, resets, reverse) for reverse in reversals(directions)]
    per_direction = split_weights(weights, len(walks), dtype)
    B, H, P = x.shape[1], per_direction[0].w_hh.shape[0] // 4, per_direction[0].w_hh.shape[1]
    h0 = zeros_if_none(h0, (len(walks), B, P), dtype)
    c0 = zeros_if_none(c0, (len(walks), B, H), dtype)

    ys, h_ns, c_ns, cells, gates = [], [], [], [], []
    for d, (walk, w) in enumerate(zip(walks, per_direction, strict=True)):
        y, h_n, c_n, cells_d, gates_d = direction_forward(walk.order(x), h0[d], c0[d], w, walk)
        ys.append(walk.order(y))
        h_ns.append(h_n)
        c_ns.append(c_n)
        if save >= 1:
            cells.append(time_major.unpad(walk.order(cells_d)))
        if save >= 2:
            gates.append(time_major.unpad(walk.order(gates_d)))
    return (
        plain(layout.unpad(np.concatenate(ys, axis=-1)), result),
        np.stack(h_ns).astype(result, copy=False),
        np.stack(c_ns).astype(result, copy=False),
        np.stack(cells) if save >= 1 else None,
        np.stack(gates).astype(result, copy=False) if save >= 2 else None,
    )


def layer_backward(
    dy: Array | None,
    dh_n: Array | None,
    dc_n: Array | None,
    dcells: Array | None,
    x: Array,
    h0: Array | None,
    c0: Array | None,
    weights: Sequence[Array],
    y: Array,
    cells: Array,
    gates: Array,
    lengths: Array | None,
    resets: Array | None,
    batch_sizes: Array | None,
    directions: int,
    batch_first: bool,
    needs: int,
) -> tuple[Array | None, Array | None, Array | None, list[Array] | None]:
    """The gradients of `layer_forward`, from those of y, h_n, c_n and cells (None is zeros).

    `dy`, `dh_n`, `dc_n` and `dcells` are shaped as the outputs they belong to; `y`, `cells` and `gates` are what
    `layer_forward` returned with save=2; `needs` is the sum of some of NEEDS_X, NEEDS_H0, NEEDS_C0, NEEDS_WEIGHTS;
    the others are as `layer_forward` was given them. What dy and dcells hold past a length does not matter.

    Returns:
        dx, dh0 [D, B, P], dc0 [D, B, H] and the list of the weights' gradients; None for what is not needed.
    """
    result, dtype = x.dtype.newbyteorder("="), compute_dtype(x.dtype)
    layout, time_major = Layout(batch_first, batch_sizes), Layout(False, batch_sizes)
    x, y = plain(layout.pad(x), dtype), plain(layout.pad(y), dtype)
    dy = zeros_if_none(None if dy is None else layout.pad(dy), y.shape, dtype)
    lengths = row_lengths(lengths, layout)
    resets = None if resets is None else layout.pad(resets)
    walks = [Walk(len(x), lengths, resets, reverse) for reverse in reversals(directions)]
    per_direction = split_weights(weights, len(walks), dtype)
    T, B, H, P = *x.shape[:2], cells.shape[-1], y.shape[-1] // len(walks)
    h0, dh_n = (zeros_if_none(a, (len(walks), B, P), dtype) for a in (h0, dh_n))
    c0, dc_n = (zeros_if_none(a, (len(walks), B, H), dtype) for a in (c0, dc_n))

    dx = np.zeros_like(x) if needs & NEEDS_X else None
    dh0, dc0, dweights = [], [], []
    for d, (walk, w) in enumerate(zip(walks, per_direction, strict=True)):
        columns = slice(d * P, (d + 1) * P)
        dcells_d = None if dcells is None else time_major.pad(dcells[d])
        dx_d, dh0_d, dc0_d, dw = direction_backward(
            walk.order(dy[..., columns]),
            dh_n[d],
            dc_n[d],
            walk.order(zeros_if_none(dcells_d, (T, B, H), dtype)),
            walk.order(x),
            h0[d],
            c0[d],
            w,
            walk.order(y[..., columns]),
            walk.order(plain(time_major.pad(cells[d]), dtype)),
            walk.order(plain(time_major.pad(gates[d]), dtype)),
            walk,
            needs,
        )
        if dx is not None and dx_d is not None:
            dx += walk.order(dx_d)
        dh0.append(dh0_d)
        dc0.append(dc0_d)
        dweights += [a.astype(result) for a in dw or () if a is not None]
    return (
        None if dx is None else plain(layout.unpad(dx), result),
        np.stack(dh0).astype(result, copy=False) if needs & NEEDS_H0 else None,
        np.stack(dc0).astype(result, copy=False) if needs & NEEDS_C0 else None,
        dweights if needs & NEEDS_WEIGHTS else None,
    )


def cell_forward(
    x: Array,
    h: Array | None,
    c: Array | None,
    w_ih: Array,
    w_hh: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
) -> tuple[Array, Array]:
    """One step of x [B, I] from the state h, c [B, H] (None is zeros) to (h', c')."""
    result, dtype = x.dtype.newbyteorder("="), compute_dtype(x.dtype)
    state_shape = (len(x), w_hh.shape[1])
    h, c = zeros_if_none(h, state_shape, dtype), zeros_if_none(c, state_shape, dtype)
    gates = plain(x, dtype) @ plain(w_ih, dtype).T + h @ plain(w_hh, dtype).T
    if b_ih is not None and b_hh is not None:
        gates += plain(b_ih, dtype) + plain(b_hh, dtype)
    h_next, c_next = cell_step(gates, c)
    return h_next.astype(result, copy=False), c_next.astype(result, copy=False)
