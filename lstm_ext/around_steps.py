"""What the CUDA kernels leave to others, in NumPy in float64: the large products before and after the steps of a layer.

For checks of the kernels by themselves; `engines/cuda.py` does the same in torch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .call import CellWeights, LayerCall
from .cell import Norm
from .reference_cell import Array, normalise
from .testing import to_float64


def norm_of(call: LayerCall) -> Norm:
    """Which there is."""
    return Norm.NONE if call.cell is None else call.cell.norm


def as_laid_out(call: LayerCall, a: Array) -> Array:
    """Gates [.., 4H] in the order i, f, g, o as the weights have them; and the way back."""
    if call.cell is None or not call.cell.tensorflow:
        return a
    gates = a.reshape(*a.shape[:-1], 4, a.shape[-1] // 4)
    return np.ascontiguousarray(gates[..., [0, 2, 1, 3], :]).reshape(a.shape)


def _gamma_of_x(call: LayerCall, w: CellWeights) -> Array:
    assert w.gamma is not None
    return as_laid_out(call, to_float64(w.gamma[0]))


def input_products(call: LayerCall, x: Array) -> Array:
    """x W_ih' of each direction [D, .., 4H], for x [.., I]; normalised and scaled where a cell does that by itself."""
    products = []
    for w in call.split_as_laid_out():
        product = x @ to_float64(w.w_ih).T
        if norm_of(call) == Norm.ROWS and call.cell is not None:
            product = _gamma_of_x(call, w) * normalise(product, call.cell.norm_epsilon).value
        products.append(product)
    return np.stack(products)


def normed_again(call: LayerCall, x: Array, h: Any) -> tuple[Array, Array]:
    """What the steps normalised [D, .., 4H] and 1 / its deviations, from x [.., I] and the h [D, .., P] they found."""
    cell, values, scales = call.cell, [], []
    assert cell is not None
    for d, w in enumerate(call.split_as_laid_out()):
        sums = to_float64(h[d]) @ to_float64(w.w_hh).T
        if cell.norm == Norm.GATES:
            sums = sums + x @ to_float64(w.w_ih).T
            for bias in (w.b_ih, w.b_hh):
                sums = sums if bias is None else sums + to_float64(bias)
        groups = 1 if cell.norm == Norm.ROWS else 4
        normed = normalise(sums.reshape(*sums.shape[:-1], groups, sums.shape[-1] // groups), cell.norm_epsilon)
        values.append(normed.value.reshape(sums.shape))
        scales.append(normed.scale[..., 0])
    return np.stack(values), np.stack(scales)


class _SumGrads(NamedTuple):
    """Gradients of one direction's sums [rows, 4H]; of x and of h they differ where each is normalised by itself."""

    of_x: Array
    of_h: Array
    of_bias: Array
    d_pre: Array
    of_norm: tuple[Array, ...] = ()


def _rows(a: Any) -> Array:
    a = to_float64(a)
    return a.reshape(int(np.prod(a.shape[:-1])), a.shape[-1])


def _through_norm(call: LayerCall, x: Array, d: int, d_sums: Array, products: Any, of_norm: list[Any]) -> _SumGrads:
    """From what the steps of a cell that normalises leave of direction d; `d_sums` are of what they normalised."""
    cell, w = call.cell, call.split_as_laid_out()[d]
    assert cell is not None
    all_d_pre, d_seen, d_gamma_h = of_norm
    d_pre, d_gamma = _rows(all_d_pre[d]), as_laid_out(call, _rows(products[d]).sum(0))
    of_c = [_rows(a[d]).sum(0) for a in (d_gamma_h, d_seen) if a is not None]  # none where they are not needed
    if cell.norm == Norm.GATES:
        return _SumGrads(d_sums, d_sums, d_sums, d_pre, (d_gamma, as_laid_out(call, d_pre.sum(0)), *of_c))
    normed = normalise(x @ to_float64(w.w_ih).T, cell.norm_epsilon)
    d_gamma_of_x = as_laid_out(call, (d_pre * normed.value).sum(0))
    of_x = normed.backward(d_pre * _gamma_of_x(call, w))
    return _SumGrads(of_x, d_sums, d_pre, d_pre, (np.stack([d_gamma_of_x, d_gamma]), *of_c))


def from_steps(call: LayerCall, x: Array, results: Any, products: Any = None) -> tuple[Array, list[Array]]:
    """dx [rows, I] and the gradients of the weights from what a backward pass of the kernels leaves.

    x [rows, I] is in the order of time, zero where a row rests; `products` is what became of `normed`.
    """
    d_gates, h_prev, d_h, hidden, hidden_prev, _, _, c_prev, c_new, *of_norm = results
    dx, dweights = np.zeros_like(x), []
    for d, w in enumerate(call.split_as_laid_out()):
        d_sums, h = _rows(d_gates[d]), _rows(h_prev[d])
        g = _SumGrads(d_sums, d_sums, d_sums, d_sums)
        if products is not None:
            g = _through_norm(call, x, d, d_sums, products, of_norm)
        if hidden_prev is not None:
            h = h + _rows(hidden_prev[d]) @ to_float64(w.w_hr).T
        dx += g.of_x @ to_float64(w.w_ih)
        tensorflow = call.cell is not None and call.cell.tensorflow
        dweights += [np.concatenate([x.T @ g.of_x, h.T @ g.of_h])] if tensorflow else [g.of_x.T @ x, g.of_h.T @ h]
        dweights += [g.of_bias.sum(0) for bias in (w.b_ih, w.b_hh) if bias is not None]
        if d_h is not None:
            dweights.append(_rows(d_h[d]).T @ _rows(hidden[d]))
        if c_prev is not None:
            i, f, _, o = np.split(as_laid_out(call, g.d_pre), 4, axis=-1)
            before, after = _rows(c_prev[d]), _rows(c_new[d])
            dweights.append(np.stack([(i * before).sum(0), (f * before).sum(0), (o * after).sum(0)]))
        dweights += g.of_norm
    return dx, dweights
