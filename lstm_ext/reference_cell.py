"""One direction of a layer with another cell than the plain one, in NumPy, forward and backward: see `lstm_ext.cell`.

The arguments and results are those of the functions of the same names in `lstm_ext.reference`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .call import CellWeights, Needs
from .cell import Activation, Cell, Norm
from .masks import Mask, happens
from .walk import Walk, linear, outer_sum, sigmoid, split_gates

Array = npt.NDArray[Any]


# Activations and norms -----------------------------------------------------------------------------------------------


def activate(kind: Activation, alpha: float, beta: float, x: Array) -> Array:
    """See `cell.Activation`."""
    one = x.dtype.type(1)
    if kind == Activation.TANH:
        return np.tanh(x)
    if kind == Activation.SIGMOID:
        return sigmoid(x)
    if kind == Activation.HARD_SIGMOID:
        return np.clip(x.dtype.type(alpha) * x + x.dtype.type(beta), 0, 1)
    if kind == Activation.RELU:
        return np.maximum(x, 0)
    if kind == Activation.LEAKY_RELU:
        return np.where(x > 0, x, x.dtype.type(alpha) * x)
    if kind == Activation.ELU:
        return np.where(x > 0, x, x.dtype.type(alpha) * np.expm1(np.minimum(x, 0)))
    if kind == Activation.SOFTSIGN:
        return x / (one + np.abs(x))
    if kind == Activation.SOFTPLUS:
        return np.logaddexp(x, 0 * one)
    return x


def slope(kind: Activation, alpha: float, y: Array) -> Array:
    """The derivative where `activate` gave y."""
    dtype = y.dtype.type
    if kind == Activation.TANH:
        return 1 - y * y
    if kind == Activation.SIGMOID:
        return y * (1 - y)
    if kind == Activation.HARD_SIGMOID:
        return np.where((y > 0) & (y < 1), dtype(alpha), dtype(0))
    if kind == Activation.RELU:
        return (y > 0).astype(dtype)
    if kind == Activation.LEAKY_RELU:
        return np.where(y > 0, dtype(1), dtype(alpha))
    if kind == Activation.ELU:
        return np.where(y > 0, dtype(1), y + dtype(alpha))
    if kind == Activation.SOFTSIGN:
        return (1 - np.abs(y)) ** 2
    if kind == Activation.SOFTPLUS:
        return -np.expm1(-y)
    return np.ones_like(y)


class Normed(NamedTuple):
    """x [..., N] less its mean, divided by its deviation."""

    value: Array
    scale: Array  # [..., 1], 1 / deviation

    def backward(self, d: Array) -> Array:
        """The gradient of x, by that of `value`."""
        inner = (d * self.value).mean(-1, keepdims=True)
        return self.scale * (d - d.mean(-1, keepdims=True) - self.value * inner)

    def at(self, s: int) -> Normed:
        """Those of one step."""
        return Normed(self.value[s], self.scale[s])


def normalise(x: Array, epsilon: float) -> Normed:
    """`x` normalised over its last axis."""
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred * centred).mean(-1, keepdims=True)
    scale = 1 / np.sqrt(variance + x.dtype.type(epsilon))
    return Normed(centred * scale, scale)


def _by_gate(a: Array) -> Array:
    """[..., 4H] as [..., 4, H]."""
    return a.reshape(*a.shape[:-1], 4, a.shape[-1] // 4)


# Masks ---------------------------------------------------------------------------------------------------------------


class Masks:
    """Those of one direction, in step order; None where there are none."""

    def __init__(self, cell: Cell, seed: Array | None, direction: int, walk: Walk, sizes: tuple[int, ...], dtype: Any):
        T, B, H, P = sizes
        rows, times = np.arange(B), walk.times(T, B)

        def draw(kind: Mask, p: float, width: int, times: Array = times) -> Array | None:
            if seed is None or not (cell.training and p):
                return None
            return happens(seed, kind, direction, times, rows, np.arange(width), p)

        def scaled(dropped: Array | None, p: float) -> Array | None:
            return (
                None if dropped is None else np.where(dropped, dtype.type(0), dtype.type(1 / (1 - p) if p < 1 else 0))
            )

        self.h_before = draw(Mask.ZONEOUT_H, cell.zoneout_h, P)  # [T, B, P], where zoneout holds h
        self.c_before = draw(Mask.ZONEOUT_C, cell.zoneout_c, H)
        self.candidate = scaled(draw(Mask.CANDIDATE_DROPOUT, cell.candidate_dropout, H), cell.candidate_dropout)
        recurrent = draw(Mask.RECURRENT_DROPOUT, cell.recurrent_dropout, P, np.zeros(1, np.int64))
        self.recurrent = scaled(recurrent, cell.recurrent_dropout)  # [B, P]
        self.mixed = (
            dtype.type(0 if cell.training else cell.zoneout_h),
            dtype.type(0 if cell.training else cell.zoneout_c),
        )

    def drop_h(self, h: Array) -> Array:
        """h as the recurrent product takes it."""
        return h if self.recurrent is None else h * self.recurrent


def _hold(held: Array | None, mixed: Any, before: Array, after: Array) -> Array:
    """What zoneout makes of a state: `held` where masks are drawn, else mixed by its mean."""
    if held is not None:
        return np.where(held, before, after)
    return mixed * before + (1 - mixed) * after if mixed else after


def _hold_backward(held: Array | None, mixed: Any, d: Array) -> tuple[Array, Array]:
    """The gradients by `before` and `after`."""
    if held is not None:
        return np.where(held, d, d.dtype.type(0)), np.where(held, d.dtype.type(0), d)
    return (mixed * d, (1 - mixed) * d) if mixed else (np.zeros_like(d), d)


# A direction ---------------------------------------------------------------------------------------------------------


class Functions:
    """The activations of a cell, and its clips."""

    def __init__(self, cell: Cell):
        self.cell = cell

    def act(self, x: Array) -> Array:
        """Of a candidate, and of c."""
        return activate(self.cell.activation, self.cell.activation_alpha, self.cell.activation_beta, x)

    def act_slope(self, y: Array) -> Array:
        """Where `act` gave y."""
        return slope(self.cell.activation, self.cell.activation_alpha, y)

    def gate(self, x: Array) -> Array:
        """Of a gate."""
        return activate(self.cell.recurrent_activation, self.cell.recurrent_alpha, self.cell.recurrent_beta, x)

    def gate_slope(self, y: Array) -> Array:
        """Where `gate` gave y."""
        return slope(self.cell.recurrent_activation, self.cell.recurrent_alpha, y)


def _clip(a: Array, limit: float) -> Array:
    return np.clip(a, -limit, limit) if limit else a


def _clip_backward(d: Array, a: Array, limit: float) -> Array:
    """Nothing passes where `a` was cut."""
    return np.where(np.abs(a) <= limit, d, d.dtype.type(0)) if limit else d


def _scaled(w: CellWeights, n: Normed) -> Array:
    """c as the output sees it."""
    return w.gamma_h * n.value + w.beta_h


def _input_products(x: Array, w: CellWeights, cell: Cell) -> tuple[Array, Normed | None]:
    """What x brings to the gates' sums [T, B, 4H], with the biases; and x W_ih' normalised."""
    products, normed = linear(x, w.w_ih), None
    if cell.norm == Norm.ROWS and w.gamma is not None:
        normed = normalise(products, cell.norm_epsilon)
        products = w.gamma[0] * normed.value
    for bias in (w.b_ih, w.b_hh):
        if bias is not None:
            products = products + bias
    return products, normed


def _sums(products: Array, of_h: Array, w: CellWeights, cell: Cell) -> tuple[Array, Normed | None]:
    """The gates' sums [..., 4H] from what x and h bring; what was normalised for them: of h, or of all [..., 4, H]."""
    if cell.norm == Norm.ROWS and w.gamma is not None:
        normed = normalise(of_h, cell.norm_epsilon)
        return products + w.gamma[1] * normed.value, normed
    total = products + of_h
    if cell.norm == Norm.GATES and w.gamma is not None and w.beta is not None:
        normed = normalise(_by_gate(total), cell.norm_epsilon)
        return w.gamma * normed.value.reshape(total.shape) + w.beta, normed
    return total, None


def direction_forward(
    x: Array, h: Array, c: Array, w: CellWeights, walk: Walk, cell: Cell, seed: Array | None, direction: int
) -> tuple[Array, Array, Array, Array, Array]:
    """y [T, B, P], h_n, c_n, cells [T, B, H] and gates [T, B, 4H], the sequences in step order."""
    functions = Functions(cell)
    T, B = x.shape[:2]
    masks = Masks(cell, seed, direction, walk, (T, B, c.shape[1], h.shape[1]), x.dtype)
    gates, _ = _input_products(walk.mask(x), w, cell)
    y, cells = np.empty((T, B, h.shape[1]), x.dtype), np.empty((T, B, c.shape[1]), x.dtype)
    for s in range(T):
        h, c = walk.forget(s, h), walk.forget(s, c)
        gates[s], _ = _sums(gates[s], masks.drop_h(h) @ w.w_hh.T, w, cell)
        i, f, g, o = split_gates(gates[s])
        if w.peephole is not None:
            i += w.peephole[0] * c
            f += w.peephole[1] * c
        f[...] = functions.gate(f + f.dtype.type(cell.forget_bias))
        i[...] = 1 - f if cell.coupled else functions.gate(i)
        g[...] = functions.act(g)
        candidate = g if masks.candidate is None else g * masks.candidate[s]
        c_next = _clip(f * c + i * candidate, cell.cell_clip)
        o[...] = functions.gate(o if w.peephole is None else o + w.peephole[2] * c_next)
        seen = _scaled(w, normalise(c_next, cell.norm_epsilon)) if cell.norm else c_next
        c_next = seen if cell.norm == Norm.GATES else c_next
        h_next = o * functions.act(seen)
        if w.w_hr is not None:
            h_next = _clip(h_next @ w.w_hr.T, cell.proj_clip)
        h_next = _hold(None if masks.h_before is None else masks.h_before[s], masks.mixed[0], h, h_next)
        c_next = _hold(None if masks.c_before is None else masks.c_before[s], masks.mixed[1], c, c_next)
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
    w: CellWeights,
    cells: Array,
    gates: Array,
    y: Array,
    walk: Walk,
    needs: Needs,
    cell: Cell,
    seed: Array | None,
    direction: int,
) -> tuple[Array | None, Array, Array, CellWeights | None]:
    """The gradients of `direction_forward`; y is that of the forward pass."""
    functions, (T, B, H), P = Functions(cell), cells.shape, h0.shape[1]
    masks = Masks(cell, seed, direction, walk, (T, B, H, P), x.dtype)

    # What the forward pass had at each step.
    i, f, g, o = split_gates(gates)
    c_prev = walk.mask(walk.forget(slice(None), np.concatenate([c0[None], cells[:-1]])))
    candidate = g if masks.candidate is None else g * masks.candidate
    c_raw = f * c_prev + i * candidate
    c_new = _clip(c_raw, cell.cell_clip)
    c_normed = normalise(c_new, cell.norm_epsilon) if cell.norm else None
    act_c = functions.act(c_new if c_normed is None else _scaled(w, c_normed))
    hidden = o * act_c
    h_raw = hidden if w.w_hr is None else linear(hidden, w.w_hr)
    h_in = masks.drop_h(walk.mask(walk.forget(slice(None), np.concatenate([h0[None], y[:-1]]))))
    products, x_normed = _input_products(walk.mask(x), w, cell) if cell.norm else (gates, None)
    normed = _sums(products, linear(h_in, w.w_hh), w, cell)[1] if cell.norm else None

    d_pre = np.empty_like(gates)  # of the sums, after what normalises them
    d_of_h = np.empty_like(gates)  # of h_in W_hh'
    d_seen = np.empty_like(cells)  # of c as the output sees it
    d_projected = np.empty((T, B, P), x.dtype)
    for s in reversed(range(T)):
        dh_prev, dh_new = _hold_backward(
            None if masks.h_before is None else masks.h_before[s], masks.mixed[0], dh + dy[s]
        )
        dc_prev, dc_new = _hold_backward(
            None if masks.c_before is None else masks.c_before[s], masks.mixed[1], dc + dcells[s]
        )
        d_projected[s] = dh_new
        if w.w_hr is not None:
            d_projected[s] = _clip_backward(dh_new, h_raw[s], cell.proj_clip)
            dh_new = d_projected[s] @ w.w_hr
        d_seen[s] = dh_new * o[s] * functions.act_slope(act_c[s])
        if c_normed is None or w.gamma_h is None:
            dc_new = dc_new + d_seen[s]
        elif cell.norm == Norm.GATES:
            d_seen[s] += dc_new
            dc_new = c_normed.at(s).backward(d_seen[s] * w.gamma_h)
        else:
            dc_new = dc_new + c_normed.at(s).backward(d_seen[s] * w.gamma_h)

        di, df, dg, do = split_gates(d_pre[s])
        do[...] = dh_new * act_c[s] * functions.gate_slope(o[s])
        if w.peephole is not None:
            dc_new = dc_new + do * w.peephole[2]
        dc_new = _clip_backward(dc_new, c_raw[s], cell.cell_clip)
        dg[...] = dc_new * i[s] * functions.act_slope(g[s])
        if masks.candidate is not None:
            dg *= masks.candidate[s]
        of_i, of_f = dc_new * candidate[s], dc_new * c_prev[s]
        di[...] = 0 if cell.coupled else of_i * functions.gate_slope(i[s])
        df[...] = (of_f - of_i if cell.coupled else of_f) * functions.gate_slope(f[s])
        dc_prev = dc_prev + dc_new * f[s]
        if w.peephole is not None:
            dc_prev = dc_prev + di * w.peephole[0] + df * w.peephole[1]

        d_of_h[s] = d_pre[s]
        if normed is not None and w.gamma is not None:
            if cell.norm == Norm.ROWS:
                d_of_h[s] = normed.at(s).backward(d_pre[s] * w.gamma[1])
            else:
                d_of_h[s] = normed.at(s).backward(_by_gate(d_pre[s] * w.gamma)).reshape(d_pre[s].shape)
        dh_prev = dh_prev + masks.drop_h(d_of_h[s] @ w.w_hh)
        dh = walk.advance(s, walk.forget(s, dh_prev), dh)
        dc = walk.advance(s, walk.forget(s, dc_prev), dc)

    d_pre, d_of_h, d_seen, d_projected = (walk.mask(a) for a in (d_pre, d_of_h, d_seen, d_projected))
    d_of_x = d_of_h
    if x_normed is not None and w.gamma is not None:
        d_of_x = x_normed.backward(d_pre * w.gamma[0])
    dx = linear(d_of_x, w.w_ih.T) if needs & Needs.X else None
    if not needs & Needs.WEIGHTS:
        return dx, dh, dc, None

    both = (0, 1)
    db = (d_of_h if cell.norm == Norm.GATES else d_pre).sum(both)
    d_peephole = d_gamma = None
    if w.peephole is not None:
        di, df, _, do = split_gates(d_pre)
        d_peephole = np.stack([(di * c_prev).sum(both), (df * c_prev).sum(both), (do * c_new).sum(both)])
    if normed is not None:
        d_gamma = (d_pre * normed.value.reshape(d_pre.shape)).sum(both)
        if x_normed is not None:
            d_gamma = np.stack([(d_pre * x_normed.value).sum(both), d_gamma])
    return (
        dx,
        dh,
        dc,
        CellWeights(
            outer_sum(d_of_x, walk.mask(x)),
            outer_sum(d_of_h, h_in),
            None if w.b_ih is None else db,
            None if w.b_hh is None else db,
            None if w.w_hr is None else outer_sum(d_projected, hidden),
            d_peephole,
            d_gamma,
            d_pre.sum(both) if cell.norm == Norm.GATES else None,
            None if c_normed is None else (d_seen * c_normed.value).sum(both),
            None if c_normed is None else d_seen.sum(both),
        ),
    )
