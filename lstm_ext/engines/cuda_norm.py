"""What a cell that normalises has besides on a GPU: what needs no loop over the steps, in torch.

    forward    x W_ih' normalised and scaled, if it is by itself (Norm.ROWS)         -> the steps
    backward   what the steps had normalised, again: one large product of all h      -> the steps
               the gradients of x W_ih' and of gamma and beta                        <- what the steps leave

No sums are kept from the forward pass: they are four times as many numbers as a step's cells, in float32 also for half
types, and to multiply again takes a small part of the time of the steps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..call import CellWeights, LayerCall
from ..cell import Cell, Norm
from .composed import compute_dtype


class Normed(NamedTuple):
    """What each step has normalised: the sums of h (Norm.ROWS), or whole ones by gate; see csrc/ops/ops.h."""

    values: Tensor  # [D, .., 4H]
    scales: Tensor  # [D, .., 1], or by gate [D, .., 4]


class FromSteps(NamedTuple):
    """What the steps back leave of each direction, as rows of all times."""

    d_pre: Tensor  # [.., 4H], of the gates before their activation
    products: Tensor  # [.., 4H], the same times what was normalised
    d_seen: Tensor | None  # [.., H], of c as the output sees it; None where gradients of weights are not needed
    d_gamma_h: Tensor | None  # [.., H], the same times the normalised c


def norm_of(call: LayerCall) -> Norm:
    """Which there is."""
    return Norm.NONE if call.cell is None else call.cell.norm


def multiply(rows: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    """rows w' in what a layer computes in: [N, 4H] of w [4H, K]."""
    wide = compute_dtype(rows.dtype)
    if out is None:
        out = rows.new_empty(rows.shape[0], w.shape[0], dtype=wide)
    if wide == rows.dtype:
        return torch.mm(rows, w.t(), out=out)
    return torch.mm(rows, w.t(), out_dtype=wide, out=out)


def gates_of(cell: Cell | None, a: Tensor) -> tuple[Tensor, ...]:
    """i, f, g and o of [.., 4H] in the order of the weights."""
    i, second, third, o = a.chunk(4, -1)
    return (i, third, second, o) if cell is not None and cell.tensorflow else (i, second, third, o)


def as_laid_out(cell: Cell, a: Tensor) -> Tensor:
    """Gates [.., 4H] in the order i, f, g, o as the weights have them; and the way back."""
    return torch.cat(gates_of(cell, a), -1) if cell.tensorflow else a


def _gamma_of_x(cell: Cell, w: CellWeights) -> Tensor:
    """In the order of the weights, as wide as the sums."""
    assert w.gamma is not None
    return as_laid_out(cell, w.gamma[0]).to(compute_dtype(w.gamma.dtype))


def normalise_inputs(call: LayerCall, xw: Tensor) -> Tensor:
    """x W_ih' [D, .., 4H] as the steps are to have it."""
    if norm_of(call) == Norm.ROWS and call.cell is not None:
        for d, w in enumerate(call.split_as_laid_out()):
            xw[d] = F.layer_norm(xw[d], xw.shape[-1:], _gamma_of_x(call.cell, w), None, call.cell.norm_epsilon)
    return xw


def again(call: LayerCall, rows: Tensor, h: Tensor) -> Normed:
    """What the steps normalised, from the rows of x and h [D, .., P] as each step found it."""
    cell, split = call.cell, call.split_as_laid_out()
    assert cell is not None
    sums = h.new_empty(*h.shape[:-1], 4 * call.widths[0], dtype=compute_dtype(h.dtype))
    for d, w in enumerate(split):
        of_d = multiply(h[d].flatten(0, -2), w.w_hh, sums[d].flatten(0, -2))
        if cell.norm == Norm.GATES:
            of_d += multiply(rows, w.w_ih)
            for bias in (w.b_ih, w.b_hh):
                if bias is not None:
                    of_d += bias
    groups = sums.unflatten(-1, (1 if cell.norm == Norm.ROWS else 4, -1))
    values, _, scales = torch.native_layer_norm(groups, groups.shape[-1:], None, None, cell.norm_epsilon)
    return Normed(values.flatten(-2), scales.flatten(-2))


def input_grads(call: LayerCall, rows: Tensor, w: CellWeights, d_pre: Tensor) -> tuple[Tensor, Tensor]:
    """Of x W_ih' [.., 4H], normalised by itself, and of its gamma [4H]."""
    assert call.cell is not None
    sums, gamma = multiply(rows, w.w_ih), _gamma_of_x(call.cell, w)
    width = sums.shape[-1:]
    normed, mean, scale = torch.native_layer_norm(sums, width, None, None, call.cell.norm_epsilon)
    backward = torch.ops.aten.native_layer_norm_backward
    d_sums = backward(d_pre, sums, width, mean, scale, gamma, None, (True, False, False))[0]
    return d_sums.to(rows.dtype), (d_pre * normed).sum(0)


def weight_grads(call: LayerCall, d: FromSteps, d_gamma_of_x: Tensor | None) -> list[Tensor]:
    """Of gamma, beta (Norm.GATES), gamma_h and beta_h, one direction's."""
    cell, dtype = call.cell, call.x.dtype
    assert cell is not None
    assert d.d_seen is not None
    assert d.d_gamma_h is not None
    d_gamma = as_laid_out(cell, d.products.sum(0))
    if d_gamma_of_x is not None:
        found = [torch.stack([as_laid_out(cell, d_gamma_of_x), d_gamma])]
    else:
        found = [d_gamma, as_laid_out(cell, d.d_pre.sum(0))]
    return [a.to(dtype) for a in (*found, d.d_gamma_h.sum(0), d.d_seen.sum(0))]
