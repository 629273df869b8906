"""A layer in torch's own operations: on any device, differentiable to any order, step by step and thus slow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..call import Grads, LayerCall, Needs, OutputGrads, Outputs, Save, Weights
from ..cell import Activation, Cell, Norm
from ..masks import Mask, happens


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a layer of this dtype computes in, and keeps its cells in."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


Step = tuple[Tensor, Tensor, tuple[Tensor, ...]]  # h [B, P] and c [B, H] after it, and its gates i, f, g, o [B, H]


class Grid:
    """The rows of a call as [T, B, …], whatever their layout, and which of them are valid."""

    def __init__(self, call: LayerCall):
        device = call.x.device
        self.batch_first = call.batch_first
        self.lengths = None if call.lengths is None else call.lengths.to(device)  # [B]
        self.valid: Tensor | None = None  # [T, B]
        self.rows: Tensor | None = None  # of the valid ones, where they are packed [N]
        if call.batch_sizes is not None:
            self.valid = torch.arange(call.batch_size(), device=device) < call.batch_sizes.to(device)[:, None]
            self.lengths, self.rows = self.valid.sum(0), self.valid.flatten().nonzero()[:, 0]
        elif self.lengths is not None:
            self.valid = torch.arange(call.num_steps(), device=device)[:, None] < self.lengths

    def pad(self, a: Tensor) -> Tensor:
        """[T, B, …] as it is; of packed rows [N, …] with zeros between."""
        if self.rows is None or self.valid is None:
            return a
        zeros = a.new_zeros(self.valid.numel(), *a.shape[1:])
        return zeros.index_copy(0, self.rows, a).reshape(*self.valid.shape, *a.shape[1:])

    def unpad(self, a: Tensor) -> Tensor:
        """The way back from `pad`."""
        if self.rows is None or self.valid is None:
            return a
        return a.reshape(self.valid.numel(), *a.shape[2:]).index_select(0, self.rows)

    def take(self, a: Tensor) -> Tensor:
        """What is laid out as x."""
        return a.transpose(0, 1) if self.batch_first else self.pad(a)

    def give(self, a: Tensor) -> Tensor:
        """The way back from `take`."""
        return a.transpose(0, 1) if self.batch_first else self.unpad(a)


class PlainSteps:
    """The steps of one direction of a plain cell over x [T, B, I]."""

    def __init__(self, w: Weights, x: Tensor):
        self.w = w
        self.products = F.linear(x, w.w_ih, None if w.b_ih is None or w.b_hh is None else w.b_ih + w.b_hh)  # [T, B, 4H]

    def take(self, t: int, h: Tensor, c: Tensor) -> Step:
        """See `Steps`."""
        i, f, g, o = (self.products[t] + F.linear(h, self.w.w_hh)).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * c + i * g
        h = o * c.tanh()
        return (h if self.w.w_hr is None else F.linear(h, self.w.w_hr)), c, (i, f, g, o)


# Other cells than the plain one --------------------------------------------------------------------------------------


def activate(kind: Activation, alpha: float, beta: float, x: Tensor) -> Tensor:
    """See `cell.Activation`."""
    if kind == Activation.HARD_SIGMOID:
        return (alpha * x + beta).clamp(0, 1)
    if kind == Activation.LEAKY_RELU:
        return F.leaky_relu(x, alpha)
    if kind == Activation.ELU:
        return F.elu(x, alpha)
    plain: dict[Activation, Any] = {
        Activation.TANH: torch.tanh,
        Activation.SIGMOID: torch.sigmoid,
        Activation.RELU: F.relu,
        Activation.SOFTSIGN: F.softsign,
        Activation.SOFTPLUS: F.softplus,
    }
    return plain[kind](x) if kind in plain else x


def _normalised(x: Tensor, epsilon: float) -> Tensor:
    """x [..., N] less its mean, divided by its deviation."""
    return F.layer_norm(x, x.shape[-1:], eps=epsilon)


class Steps:
    """The steps of one direction of a call with a cell; `w` is its CellWeights."""

    def __init__(self, call: LayerCall, cell: Cell, w: Any, direction: int, x: Tensor):
        self.cell, self.w, self.direction, self.seed = cell, w, direction, call.seed
        self.rows = torch.arange(x.shape[1], device=x.device)
        products = F.linear(x, w.w_ih)
        if cell.norm == Norm.ROWS:
            products = w.gamma[0] * _normalised(products, cell.norm_epsilon)
        for bias in (w.b_ih, w.b_hh):
            products = products if bias is None else products + bias
        self.products = products  # [T, B, 4H]
        self.recurrent_keeps: Tensor | None = None  # [B, P]
        if cell.training and cell.recurrent_dropout:
            dropped = self._happens(Mask.RECURRENT_DROPOUT, 0, w.w_hh.shape[1], cell.recurrent_dropout)
            self.recurrent_keeps = self._scaled(~dropped, cell.recurrent_dropout)

    def _happens(self, kind: Mask, t: int, width: int, p: float) -> Tensor:
        """[B, width] at the time t."""
        times, units = self.rows.new_full((1,), t), torch.arange(width, device=self.rows.device)
        return happens(self.seed, kind, self.direction, times, self.rows, units, p)

    def _scaled(self, keeps: Tensor, p: float) -> Tensor:
        """1 / (1 - p) where a unit is kept, else 0."""
        return keeps.to(self.products.dtype) * (0.0 if p == 1 else 1 / (1 - p))

    def _gate(self, x: Tensor) -> Tensor:
        cell = self.cell
        return activate(cell.recurrent_activation, cell.recurrent_alpha, cell.recurrent_beta, x)

    def _act(self, x: Tensor) -> Tensor:
        return activate(self.cell.activation, self.cell.activation_alpha, self.cell.activation_beta, x)

    def _sums(self, t: int, h: Tensor) -> tuple[Tensor, ...]:
        """i, f, g, o [B, H] before their activation."""
        cell, w = self.cell, self.w
        of_h = F.linear(h if self.recurrent_keeps is None else h * self.recurrent_keeps, w.w_hh)
        if cell.norm == Norm.ROWS:
            of_h = w.gamma[1] * _normalised(of_h, cell.norm_epsilon)
        sums = (self.products[t] + of_h).chunk(4, -1)
        if cell.norm == Norm.GATES:
            scales, shifts = w.gamma.chunk(4), w.beta.chunk(4)
            each = zip(sums, scales, shifts, strict=True)
            return tuple(scale * _normalised(a, cell.norm_epsilon) + shift for a, scale, shift in each)
        return sums

    def _held(self, kind: Mask, t: int, p: float, before: Tensor, after: Tensor) -> Tensor:
        """`after`, or what zoneout leaves of it."""
        if p == 0:
            return after
        if not self.cell.training:
            return p * before + (1 - p) * after
        return torch.where(self._happens(kind, t, after.shape[-1], p), before, after)

    def take(self, t: int, h: Tensor, c: Tensor) -> Step:
        """What comes of the step at time t from h [B, P], c [B, H]."""
        cell, w = self.cell, self.w
        i, f, g, o = self._sums(t, h)
        if w.peephole is not None:
            i, f = i + w.peephole[0] * c, f + w.peephole[1] * c
        f = self._gate(f + cell.forget_bias)
        i = 1 - f if cell.coupled else self._gate(i)
        g = kept_g = self._act(g)
        if cell.training and (p := cell.candidate_dropout):
            g = g * self._scaled(~self._happens(Mask.CANDIDATE_DROPOUT, t, g.shape[-1], p), p)
        c_new = f * c + i * g
        if cell.cell_clip:
            c_new = c_new.clamp(-cell.cell_clip, cell.cell_clip)
        o = self._gate(o if w.peephole is None else o + w.peephole[2] * c_new)
        seen = c_new
        if cell.norm:
            seen = w.gamma_h * _normalised(c_new, cell.norm_epsilon) + w.beta_h
            c_new = seen if cell.norm == Norm.GATES else c_new
        h_new = o * self._act(seen)
        if w.w_hr is not None:
            h_new = F.linear(h_new, w.w_hr)
            h_new = h_new.clamp(-cell.proj_clip, cell.proj_clip) if cell.proj_clip else h_new
        h = self._held(Mask.ZONEOUT_H, t, cell.zoneout_h, h, h_new)
        return h, self._held(Mask.ZONEOUT_C, t, cell.zoneout_c, c, c_new), (i, f, kept_g, o)


def _direction(
    steps: PlainSteps | Steps,
    h: Tensor,
    c: Tensor,
    active: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
    save: Save,
) -> tuple[Tensor | None, ...]:
    """y [T, B, P], h_n, c_n, cells [T, B, H] and, with `Save.ALL`, gates [T, B, 4H].

    In reverse a row rests until its last valid step comes.
    """
    T = len(steps.products)
    ys: list[Any] = [None] * T
    cells: list[Any] = [None] * T
    gates: list[Any] = [None] * T
    for t in reversed(range(T)) if reverse else range(T):
        h_prev, c_prev = h, c
        if resets is not None:
            h_prev, c_prev = h.masked_fill(resets[t], 0), c.masked_fill(resets[t], 0)
        h_next, c_next, own_gates = steps.take(t, h_prev, c_prev)
        gates[t] = torch.cat(own_gates, -1) if save == Save.ALL else None
        if active is None:
            h, c = ys[t], cells[t] = h_next, c_next
        else:
            h, c = torch.where(active[t], h_next, h), torch.where(active[t], c_next, c)
            kept = (h_next, c_next, gates[t])
            ys[t], cells[t], gates[t] = (None if a is None else a.masked_fill(~active[t], 0) for a in kept)
    return torch.stack(ys), h, c, torch.stack(cells), torch.stack(gates) if save == Save.ALL else None


def forward(call: LayerCall, save: Save) -> Outputs:
    """The outputs, always with the cells, which cost nothing here; arguments are taken as checked."""
    if call.is_step:
        return forward(call.with_time(), save).without_time(call)
    result, dtype, grid = call.x.dtype, compute_dtype(call.x.dtype), Grid(call)
    x = grid.take(call.x)
    resets = None if call.resets is None else grid.take(call.resets)[..., None]
    active = None if grid.valid is None else grid.valid[..., None]
    if active is not None:
        x = x.masked_fill(~active, 0)
        resets = None if resets is None else resets & active

    wide = call._replace(weights=[w.to(dtype) for w in call.weights])
    split: list[Any] = wide.split() if call.cell is None else wide.split_cell()
    results = []
    for d, (reverse, w) in enumerate(zip(call.directions.reversals, split, strict=True)):
        h = x.new_zeros(x.shape[1], w.w_hh.shape[1], dtype=dtype) if call.h0 is None else call.h0[d].to(dtype)
        c = x.new_zeros(x.shape[1], w.w_hh.shape[0] // 4, dtype=dtype) if call.c0 is None else call.c0[d].to(dtype)
        steps = PlainSteps(w, x.to(dtype)) if call.cell is None else Steps(call, call.cell, w, d, x.to(dtype))
        results.append(_direction(steps, h, c, active, resets, reverse, save))
    ys, h_ns, c_ns, cells, gates = zip(*results, strict=True)
    y, all_cells = grid.give(torch.cat(ys, -1)), torch.stack([grid.unpad(c) for c in cells])
    all_gates = torch.stack([grid.unpad(a) for a in gates]).to(result) if save == Save.ALL else None
    return Outputs(y.to(result), torch.stack(h_ns).to(result), torch.stack(c_ns).to(result), all_cells, all_gates)


# Derivatives of other cells, to any order: torch's own, by going through all of it again ------------------------------


def first(call: LayerCall, grads: OutputGrads, needs: Needs) -> Grads:
    """The gradients of a layer by those of its outputs, themselves differentiable."""
    arguments: list[Any] = [*call[:3], *call.weights]
    places = [n for n, a in enumerate(arguments) if a is not None and needs & (Needs.WEIGHTS if n > 2 else 1 << n)]
    given = [n for n, g in enumerate(grads) if g is not None]

    def outputs(*chosen: Tensor) -> tuple[Any, ...]:
        x, h0, c0, *weights = _with(arguments, places, chosen)
        found = forward(call._replace(x=x, h0=h0, c0=c0, weights=weights), Save.CELLS)
        return tuple(found[n] for n in given)

    pull: Any = torch.func.vjp(outputs, *(arguments[n] for n in places))[1]
    found: list[Any] = _with([None] * len(arguments), places, pull(tuple(grads[n] for n in given)))
    dx, dh0, dc0, *dweights = found
    return Grads(dx, dh0, dc0, dweights if needs & Needs.WEIGHTS else None)


def second(
    call: LayerCall, grads: OutputGrads, wanted: Sequence[Any], of_grads: bool, needs: Needs
) -> tuple[OutputGrads, Grads]:
    """The derivatives of the scalar sum(wanted * gradients of the layer): see `derivatives.second`.

    `wanted` are those by x, h0, c0 and the weights in a row; None for zeros.
    """
    arguments: list[Any] = [*grads, *call[:3], *call.weights]
    asked = [of_grads] * 4 + [bool(needs & bit) for bit in (Needs.X, Needs.H0, Needs.C0)]
    asked += [bool(needs & Needs.WEIGHTS)] * len(call.weights)
    places = [n for n, a in enumerate(arguments) if a is not None and asked[n]]
    given = [n for n, v in enumerate(wanted) if v is not None]
    inner = Needs.of(0 in given, 1 in given, 2 in given, any(n > 2 for n in given))

    def gradients(*chosen: Tensor) -> tuple[Tensor, ...]:
        dy, dh_n, dc_n, dcells, x, h0, c0, *weights = _with(arguments, places, chosen)
        at = call._replace(x=x, h0=h0, c0=c0, weights=weights)
        dx, dh0, dc0, dweights = first(at, OutputGrads(dy, dh_n, dc_n, dcells), inner)
        found = [dx, dh0, dc0, *(dweights or [])]
        return tuple(found[n] for n in given)

    pull: Any = torch.func.vjp(gradients, *(arguments[n] for n in places))[1]
    found = _with([None] * len(arguments), places, pull(tuple(wanted[n] for n in given)))
    dy, dh_n, dc_n, dcells, dx, dh0, dc0, *dweights = found
    return OutputGrads(dy, dh_n, dc_n, dcells), Grads(dx, dh0, dc0, dweights if needs & Needs.WEIGHTS else None)


def _with(arguments: Sequence[Any], places: Sequence[int], values: Sequence[Any]) -> list[Any]:
    """The arguments with other values at these places."""
    changed = list(arguments)
    for n, value in zip(places, values, strict=True):
        changed[n] = value
    return changed
