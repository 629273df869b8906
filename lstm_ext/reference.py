"""The LSTM in NumPy, forward and backward: the fallback where nothing was compiled, and the oracle of the tests.

One step, from the gates' weighted sums and the cell c before it (i, f, o squashed by the sigmoid, g by tanh):

    i, f, g, o = x W_ih' + b_ih + h W_hh' + b_hh
    c' = f c + i g
    h' = o tanh(c')        (h' W_hr' with a projection)

What other cells compute is in `lstm_ext.cell`, and their NumPy in `lstm_ext.reference_cell`.
The arguments and results of a layer are described in `lstm_ext.call`. Half types compute in float32. Arguments are
taken as checked; they are never written to.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from . import reference_cell
from .call import CellWeights, Grads, LayerCall, Needs, OutputGrads, Outputs, Save, Saved, Weights
from .walk import Walk, linear, outer_sum, sigmoid, split_gates

Array = npt.NDArray[Any]


# One step ------------------------------------------------------------------------------------------------------------


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
    cells: Array,
    gates: Array,
    walk: Walk,
    needs: Needs,
) -> tuple[Array | None, Array, Array, Weights | None]:
    """The gradients of `direction_forward`, from those of y, h_n, c_n and cells, all sequences in step order.

    Returns dx (None unless needed), dh0, dc0 and the weights' gradients (None unless needed).
    """
    c_prev = walk.mask(walk.forget(slice(None), np.concatenate([c0[None], cells[:-1]])))
    tanh_c = np.tanh(cells)
    dh_total = np.empty((*x.shape[:2], h0.shape[1]), x.dtype)  # with what arrives from later steps
    d_pre = np.empty_like(gates)
    for s in reversed(range(len(x))):
        dh_total[s] = dh + dy[s]
        dh_unprojected = dh_total[s] if w.w_hr is None else dh_total[s] @ w.w_hr
        dc_prev = cell_step_backward(gates[s], c_prev[s], tanh_c[s], dh_unprojected, dc + dcells[s], d_pre[s])
        dh = walk.advance(s, walk.forget(s, d_pre[s] @ w.w_hh), dh)
        dc = walk.advance(s, walk.forget(s, dc_prev), dc)

    d_pre = walk.mask(d_pre)
    dx = linear(d_pre, w.w_ih.T) if needs & Needs.X else None
    if not needs & Needs.WEIGHTS:
        return dx, dh, dc, None
    db = None if w.b_ih is None else d_pre.sum(axis=(0, 1))
    hidden = split_gates(gates)[3] * tanh_c  # h before a projection
    h = hidden if w.w_hr is None else linear(hidden, w.w_hr)
    h_prev = walk.mask(walk.forget(slice(None), np.concatenate([h0[None], h[:-1]])))
    dw_hr = None if w.w_hr is None else outer_sum(walk.mask(dh_total), hidden)
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


def split_weights(call: LayerCall, dtype: np.dtype[Any]) -> list[Any]:
    """The weights by direction, in the dtype: Weights or CellWeights."""
    split: list[Any] = call.split() if call.cell is None else call.split_cell()
    return [type(w)(*(None if a is None else plain(a, dtype) for a in w)) for w in split]


def own_gradients(call: LayerCall, dw: Weights | CellWeights) -> list[Array]:
    """Those of one direction as the call has the weights."""
    if call.cell is None or not call.cell.tensorflow:
        return [a for a in dw if a is not None]
    H = call.widths[0]
    both = np.concatenate([dw.w_ih, dw.w_hh], axis=1)
    own: list[Any] = [both, dw.b_ih]
    kernel, bias = (np.reshape(a, (4, H, -1))[[0, 2, 1, 3]].reshape(4 * H, -1).T for a in own)
    return [kernel, bias[0], *(a for a in dw[5:] if a is not None)]


def make_walks(call: LayerCall, layout: Layout, num_steps: int) -> list[Walk]:
    """That of each direction."""
    lengths: Array | None = call.lengths if layout.valid is None else layout.valid.sum(axis=0)
    resets = None if call.resets is None else layout.pad(call.resets)
    return [Walk(num_steps, lengths, resets, reverse) for reverse in call.directions.reversals]


def layer_forward(call: LayerCall, save: Save) -> Outputs:
    """One or both directions of a layer over a whole sequence, or over one step."""
    if call.is_step:
        return layer_forward(call.with_time(), save).without_time(call)
    result, dtype = call.x.dtype.newbyteorder("="), compute_dtype(call.x.dtype)
    layout, time_major = Layout(call.batch_first, call.batch_sizes), Layout(False, call.batch_sizes)
    x = plain(layout.pad(call.x), dtype)
    walks = make_walks(call, layout, len(x))
    per_direction = split_weights(call, dtype)
    B, H, P = x.shape[1], per_direction[0].w_hh.shape[0] // 4, per_direction[0].w_hh.shape[1]
    h0 = zeros_if_none(call.h0, (len(walks), B, P), dtype)
    c0 = zeros_if_none(call.c0, (len(walks), B, H), dtype)

    ys, h_ns, c_ns, cells, gates = [], [], [], [], []
    for d, (walk, w) in enumerate(zip(walks, per_direction, strict=True)):
        given = (walk.order(x), h0[d], c0[d], w, walk)
        if call.cell is None:
            y, h_n, c_n, cells_d, gates_d = direction_forward(*given)
        else:
            y, h_n, c_n, cells_d, gates_d = reference_cell.direction_forward(*given, call.cell, call.seed, d)
        ys.append(walk.order(y))
        h_ns.append(h_n)
        c_ns.append(c_n)
        if save >= Save.CELLS:
            cells.append(time_major.unpad(walk.order(cells_d)))
        if save >= Save.ALL:
            gates.append(time_major.unpad(walk.order(gates_d)))
    return Outputs(
        plain(layout.unpad(np.concatenate(ys, axis=-1)), result),
        np.stack(h_ns).astype(result, copy=False),
        np.stack(c_ns).astype(result, copy=False),
        np.stack(cells) if save >= Save.CELLS else None,
        np.stack(gates).astype(result, copy=False) if save >= Save.ALL else None,
    )


def layer_backward(call: LayerCall, saved: Saved, grads: OutputGrads, needs: Needs) -> Grads:
    """The gradients of `layer_forward(call, Save.ALL)`, of which `saved` is a part, from those of its outputs."""
    if call.is_step:
        timed = layer_backward(call.with_time(), saved.with_time(call), grads.with_time(call), needs)
        return timed.without_time(call)
    result, dtype = call.x.dtype.newbyteorder("="), compute_dtype(call.x.dtype)
    layout, time_major = Layout(call.batch_first, call.batch_sizes), Layout(False, call.batch_sizes)
    x = plain(layout.pad(call.x), dtype)
    walks = make_walks(call, layout, len(x))
    per_direction = split_weights(call, dtype)
    T, B, H, P = *x.shape[:2], saved.cells.shape[-1], per_direction[0].w_hh.shape[1]
    dy = zeros_if_none(None if grads.dy is None else layout.pad(grads.dy), (T, B, len(walks) * P), dtype)
    h0, dh_n = (zeros_if_none(a, (len(walks), B, P), dtype) for a in (call.h0, grads.dh_n))
    c0, dc_n = (zeros_if_none(a, (len(walks), B, H), dtype) for a in (call.c0, grads.dc_n))

    dx = np.zeros_like(x) if needs & Needs.X else None
    dh0, dc0, dweights = [], [], []
    for d, (walk, w) in enumerate(zip(walks, per_direction, strict=True)):
        columns = slice(d * P, (d + 1) * P)
        dcells = None if grads.dcells is None else time_major.pad(grads.dcells[d])
        given = (
            walk.order(dy[..., columns]),
            dh_n[d],
            dc_n[d],
            walk.order(zeros_if_none(dcells, (T, B, H), dtype)),
            walk.order(x),
            h0[d],
            c0[d],
            w,
            walk.order(plain(time_major.pad(saved.cells[d]), dtype)),
            walk.order(plain(time_major.pad(saved.gates[d]), dtype)),
        )
        dw: Weights | CellWeights | None
        if call.cell is None:
            dx_d, dh0_d, dc0_d, dw = direction_backward(*given, walk, needs)
        else:
            assert saved.y is not None
            y = walk.order(plain(layout.pad(saved.y)[..., columns], dtype))
            dx_d, dh0_d, dc0_d, dw = reference_cell.direction_backward(*given, y, walk, needs, call.cell, call.seed, d)
        if dx is not None and dx_d is not None:
            dx += walk.order(dx_d)
        dh0.append(dh0_d)
        dc0.append(dc0_d)
        if dw is not None:
            dweights += [a.astype(result) for a in own_gradients(call, dw)]
    return Grads(
        None if dx is None else plain(layout.unpad(dx), result),
        np.stack(dh0).astype(result, copy=False) if needs & Needs.H0 else None,
        np.stack(dc0).astype(result, copy=False) if needs & Needs.C0 else None,
        dweights if needs & Needs.WEIGHTS else None,
    )
