"""The first and the second derivative of a layer in torch's own operations, themselves differentiable to any order.

docs/math.md says why the second is this: the tangent of the forward pass, which is a linear recurrence, and that of the
backward pass, which is the transposed one. A step is one small product and few pointwise operations; all else is done
for all steps at once. The older vmap, by which torch.autograd batches, lacks `flatten` and `unflatten`: none is here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..call import Grads, LayerCall, Needs, OutputGrads, Weights
from .composed import Grid

Steps = list[Tensor]  # [B, …] of each

# Walks -------------------------------------------------------------------------------------------------------------
#
# The arrays of a direction are [T, B, …] in the order in which it walks, so that each row rests at its end.


class Walk:
    """One direction of a call: its order, and where its rows rest or start anew."""

    def __init__(self, call: LayerCall, grid: Grid, reverse: bool):
        self.grid, self.reverse, self.index = grid, reverse, None
        self.rests = self.last = self.keeps = None  # [T, B, 1], where there are any
        if grid.lengths is not None and grid.valid is not None:
            steps = torch.arange(len(grid.valid), device=grid.lengths.device)[:, None]
            self.rests, self.last = ~grid.valid[..., None], (steps == grid.lengths - 1)[..., None]
            if reverse:  # what it does to the order, done twice, is nothing
                self.index = torch.where(grid.valid, grid.lengths - 1 - steps, steps)[..., None]
        if call.resets is not None:
            resets = grid.take(call.resets)
            self.keeps = ~self.turn((resets if grid.valid is None else resets & grid.valid)[..., None])

    def turn(self, a: Tensor) -> Tensor:
        """From the order of time to that of the walk, and back."""
        if not self.reverse:
            return a
        return a.flip(0) if self.index is None else a.gather(0, self.index.expand_as(a))

    def take(self, a: Tensor) -> Tensor:
        """[T, B, …] in the order of time; 0 where a row rests, whatever stood there."""
        return self.rested(self.turn(a), 0)

    def give(self, a: Tensor) -> Tensor:
        """The way back, with zeros too."""
        return self.turn(self.rested(a, 0))

    def rested(self, a: Tensor, value: float) -> Tensor:
        """A value where a row rests."""
        return a if self.rests is None else a.masked_fill(self.rests, value)

    def previous(self, initial: Tensor, a: Tensor) -> Tensor:
        """What each step starts from, of what each step leaves."""
        return self.kept(torch.cat([initial[None], a[:-1]]))

    def kept(self, a: Tensor) -> Tensor:
        """0 where a reset stands."""
        return a if self.keeps is None else a * self.keeps

    def final(self, initial: Tensor, a: Tensor) -> Tensor:
        """What the last step of each row leaves; of a row without any what was there initially."""
        if self.last is None or self.grid.lengths is None:
            return a[-1]
        left = a.masked_fill(~self.last, 0).sum(0)
        return torch.where(self.grid.lengths[:, None] == 0, initial, left)

    def add_final(self, a: Tensor, d_final: Tensor) -> Tensor:
        """The transpose of `final`, but for rows without a step, added to a."""
        if self.last is None:
            return torch.cat([a[:-1], a[-1:] + d_final])
        return a + d_final * self.last


# Steps ---------------------------------------------------------------------------------------------------------------


class Primal(NamedTuple):
    """What a forward pass computes, in the order of the walk."""

    x: Tensor  # [T, B, I]
    h_prev: Tensor  # [T, B, P]: what a step starts from
    c_prev: Tensor  # [T, B, H]
    gates: Tensor  # [T, B, 4H], after their activation
    c_tanh: Tensor  # [T, B, H]
    hidden: Tensor  # [T, B, H]: h before a projection
    carry: Tensor  # [T, B, H]: f; 1 where a row rests, 0 where a reset stands


class Factors(NamedTuple):
    """The derivatives of one step. With p the sums before the activations, of which i, f and g go into c and o into h,

    c' = carry c_prev' + sum of (pre p') of i, f, g
    hidden' = (pre p') of o + out c'
    """

    pre: Tensor  # [B, 4H]
    out: Tensor  # [B, H]
    carry: Tensor  # [B, H]


def _by_step(*arrays: Tensor) -> list[Factors]:
    return list(map(Factors, *(a.unbind() for a in arrays)))


def _factors(a: Primal) -> list[Factors]:
    """Of each step."""
    i, f, g, o = a.gates.chunk(4, -1)
    pre = torch.cat([g * (i * (1 - i)), a.c_prev * (f * (1 - f)), i * (1 - g * g), a.c_tanh * (o * (1 - o))], -1)
    return _by_step(pre, o * (1 - a.c_tanh * a.c_tanh), a.carry)


def _factor_tangents(a: Primal, walk: Walk, p: Tensor, c: Tensor, c_prev: Tensor) -> list[Factors]:
    """The tangents of `_factors`, of those of p, c and c_prev."""
    i, f, g, o = a.gates.chunk(4, -1)
    pi, pf, pg, po = p.chunk(4, -1)
    di, df, dg, do, d_tanh = i * (1 - i), f * (1 - f), 1 - g * g, o * (1 - o), 1 - a.c_tanh * a.c_tanh
    ti, tf, tg, to, t_tanh = di * pi, df * pf, dg * pg, do * po, d_tanh * c
    pre = torch.cat(
        [
            di * tg + g * (1 - 2 * i) * ti,
            df * c_prev + a.c_prev * (1 - 2 * f) * tf,
            dg * ti - 2 * i * g * tg,
            do * t_tanh + a.c_tanh * (1 - 2 * o) * to,
        ],
        -1,
    )
    return _by_step(pre, to * d_tanh - 2 * o * a.c_tanh * t_tanh, walk.kept(tf))


class Tangents(NamedTuple):
    """Of what is inside of the steps."""

    p: Steps
    c: Steps
    hidden: Steps
    h: Steps


def _tangent_steps(
    at: list[Factors], walk: Walk, w: Weights, p_in: Tensor, h_in: Tensor | None, h: Tensor, c: Tensor
) -> Tangents:
    """From the first step to the last.

    Args:
        at: the derivatives of each step.
        walk: its order.
        w: the weights.
        p_in: what comes to p from elsewhere than the previous h [T, B, 4H].
        h_in: what comes to h from a tangent of w_hr [T, B, P].
        h: the tangent of the initial h.
        c: the tangent of the initial c.
    """
    H, w_hh = c.shape[-1], w.w_hh.t()
    w_hr = None if w.w_hr is None else w.w_hr.t()
    found = Tangents([], [], [], [])
    for t, (p_t, (pre, out, carry)) in enumerate(zip(p_in.unbind(), at, strict=True)):
        p = torch.addmm(p_t, h if walk.keeps is None else h * walk.keeps[t], w_hh)
        q = p * pre
        c = torch.addcmul(q.view(len(q), 4, H)[:, :3].sum(1), carry, c)
        h = hidden = torch.addcmul(q[:, 3 * H :], out, c)
        if w_hr is not None:
            h = h @ w_hr if h_in is None else torch.addmm(h_in[t], h, w_hr)
        for steps, a in zip(found, (p, c, hidden, h), strict=True):
            steps.append(a)
    return found


class Adjoint(NamedTuple):
    """The derivatives of a loss by what is inside of the steps, and by the initial state."""

    p: Steps
    c: Steps
    hidden: Steps
    h: Steps
    each: Steps  # those by c, c, c and hidden, side by side as the gates are
    h0: Tensor
    c0: Tensor


def _adjoint_steps(at: list[Factors], walk: Walk, w: Weights, h_in: Tensor, c_in: Tensor | None, c: Tensor) -> Adjoint:
    """From the last step to the first: the transpose of `_tangent_steps`.

    Args:
        at: the derivatives of each step.
        walk: its order.
        w: the weights.
        h_in: what comes to h from elsewhere than the next step [T, B, P].
        c_in: the same of c [T, B, H], or None.
        c: what comes to the last c.
    """
    found: list[tuple[Tensor, ...]] = []
    h_ins = h_in.unbind()
    h = h_ins[-1]
    for t in reversed(range(len(at))):
        pre, out, carry = at[t]
        hidden = h if w.w_hr is None else h @ w.w_hr
        c = torch.addcmul(c if c_in is None else c + c_in[t], hidden, out)
        each = torch.cat([c, c, c, hidden], -1)
        p = each * pre
        found.append((p, c, hidden, h, each))
        c = c * carry
        if t and walk.keeps is None:
            h = torch.addmm(h_ins[t - 1], p, w.w_hh)
        else:
            h = p @ w.w_hh
            h = h if walk.keeps is None else h * walk.keeps[t]
            h = h_ins[t - 1] + h if t else h
    ps, cs, hiddens, hs, eachs = (list(steps[::-1]) for steps in zip(*found, strict=True))
    return Adjoint(ps, cs, hiddens, hs, eachs, h, c)


def _adjoint_tangents(
    at: list[Factors], walk: Walk, w: Weights, d: Adjoint, tangents: list[Factors], v: Weights
) -> Adjoint:
    """The tangents of `_adjoint_steps`, in which the loss itself has none.

    Args:
        at: the derivatives of each step.
        walk: its order.
        w: the weights.
        d: what `_adjoint_steps` found.
        tangents: of `at`.
        v: the tangents of the weights, None for zeros.
    """
    to_h = None if v.w_hh is None else torch.stack(d.p) @ v.w_hh
    to_hidden = None if v.w_hr is None else torch.stack(d.h) @ v.w_hr
    found: list[tuple[Tensor, ...]] = []
    h, c = torch.zeros_like(d.h[0]), torch.zeros_like(d.c[0])
    for t in reversed(range(len(at))):
        (pre, out, carry), (t_pre, t_out, t_carry) = at[t], tangents[t]
        hidden = h
        if w.w_hr is not None:
            hidden = h @ w.w_hr if to_hidden is None else torch.addmm(to_hidden[t], h, w.w_hr)
        c = torch.addcmul(torch.addcmul(c, d.hidden[t], t_out), hidden, out)
        p = torch.addcmul(d.each[t] * t_pre, torch.cat([c, c, c, hidden], -1), pre)
        found.append((p, c, hidden, h))
        c = torch.addcmul(d.c[t] * t_carry, c, carry)
        h = p @ w.w_hh if to_h is None else torch.addmm(to_h[t], p, w.w_hh)
        h = h if walk.keeps is None else h * walk.keeps[t]
    ps, cs, hiddens, hs = (list(steps[::-1]) for steps in zip(*found, strict=True))
    return Adjoint(ps, cs, hiddens, hs, [], h, c)


# A layer -------------------------------------------------------------------------------------------------------------


def _by_rows(a: Tensor, b: Tensor) -> Tensor:
    """The sum of a' b over all steps and sequences."""
    rows = a.shape[0] * a.shape[1]
    return a.reshape(rows, a.shape[2]).transpose(0, 1) @ b.reshape(rows, b.shape[2])


def _add(*terms: Tensor | None) -> Any:
    """The sum of those that are there; None of none."""
    total = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return total


class _Direction(NamedTuple):
    """One direction of a call."""

    n: int
    w: Weights
    walk: Walk
    h0: Tensor  # [B, P]
    c0: Tensor  # [B, H]
    a: Primal
    at: list[Factors]


def _directions(call: LayerCall, grid: Grid, cells: Tensor, gates: Tensor | None, y: Tensor | None) -> list[_Direction]:
    """What each direction computed, from the cells and either gates or y of its forward pass."""
    found, x, D = [], grid.take(call.x), call.num_directions
    for n, (reverse, w) in enumerate(zip(call.directions.reversals, call.split(), strict=True)):
        walk = Walk(call, grid, reverse)
        own_x = walk.take(x)
        H, P = w.w_hh.shape[0] // 4, w.w_hh.shape[1]
        h0 = x.new_zeros(x.shape[1], P) if call.h0 is None else call.h0[n]
        c0 = x.new_zeros(x.shape[1], H) if call.c0 is None else call.c0[n]
        c = walk.take(grid.pad(cells[n]))
        c_tanh = c.tanh()
        if gates is not None:
            own_gates = walk.take(grid.pad(gates[n]))
            hidden = own_gates[..., 3 * H :] * c_tanh
            h_prev = walk.previous(h0, hidden if w.w_hr is None else F.linear(hidden, w.w_hr))
        else:
            assert y is not None
            h_prev = walk.previous(h0, walk.take(grid.take(y).chunk(D, -1)[n]))
            p = F.linear(own_x, w.w_ih, _add(w.b_ih, w.b_hh)) + F.linear(h_prev, w.w_hh)
            i_f, g, o = p.split([2 * H, H, H], -1)
            own_gates = walk.rested(torch.cat([i_f.sigmoid(), g.tanh(), o.sigmoid()], -1), 0)
            hidden = own_gates[..., 3 * H :] * c_tanh
        carry = walk.kept(walk.rested(own_gates[..., H : 2 * H], 1))
        a = Primal(own_x, h_prev, walk.previous(c0, c), own_gates, c_tanh, hidden, carry)
        found.append(_Direction(n, w, walk, h0, c0, a, _factors(a)))
    return found


def _first(call: LayerCall, grid: Grid, each: _Direction, grads: OutputGrads) -> Adjoint:
    """The derivatives of the loss inside of one direction."""
    n, walk = each.n, each.walk
    if grads.dy is None:
        dy = torch.zeros_like(each.a.h_prev)
    else:
        dy = walk.take(grid.take(grads.dy).chunk(call.num_directions, -1)[n])
    if grads.dh_n is not None:
        dy = walk.add_final(dy, grads.dh_n[n])
    dcells = None if grads.dcells is None else walk.take(grid.pad(grads.dcells[n]))
    dc_n = torch.zeros_like(each.c0) if grads.dc_n is None else grads.dc_n[n]
    found = _adjoint_steps(each.at, walk, each.w, dy, dcells, dc_n)
    if grads.dh_n is None or grid.lengths is None:
        return found
    return found._replace(h0=found.h0 + grads.dh_n[n] * (grid.lengths == 0)[:, None])


def _weight_gradients(w: Weights, p: Tensor, h: Steps, a: Primal) -> Weights:
    """The gradients of the weights, of the derivatives by p and h of all steps."""
    bias = None if w.b_ih is None else p.sum((0, 1))
    projection = None if w.w_hr is None else _by_rows(torch.stack(h), a.hidden)
    return Weights(_by_rows(p, a.x), _by_rows(p, a.h_prev), bias, bias, projection)


def _joined(grid: Grid, dx: Any, states: list[tuple[Tensor, Tensor]], dweights: list[Tensor], needs: Needs) -> Grads:
    """The gradients of all directions."""
    dh0, dc0 = (torch.stack(a) for a in zip(*states, strict=True))
    return Grads(
        grid.give(dx) if needs & Needs.X else None,
        dh0 if needs & Needs.H0 else None,
        dc0 if needs & Needs.C0 else None,
        dweights if needs & Needs.WEIGHTS else None,
    )


def gates(call: LayerCall, y: Tensor, cells: Tensor) -> Tensor:
    """The gates [D, T, B, 4H] (packed: [D, N, 4H]) of a forward pass that left y and the cells."""
    grid = Grid(call)
    return torch.stack([grid.unpad(d.walk.give(d.a.gates)) for d in _directions(call, grid, cells, None, y)])


def first(call: LayerCall, grads: OutputGrads, cells: Tensor, gates: Tensor, needs: Needs) -> Grads:
    """The gradients of a layer; all arguments are of the dtype in which it computes."""
    grid = Grid(call)
    dx: Any = None
    states, dweights = [], list[Tensor]()
    for each in _directions(call, grid, cells, gates, None):
        d = _first(call, grid, each, grads)
        p = torch.stack(d.p)
        if needs & Needs.X:
            dx = _add(dx, each.walk.give(p @ each.w.w_ih))
        states.append((d.h0, d.c0))
        if needs & Needs.WEIGHTS:
            dweights += [a for a in _weight_gradients(each.w, p, d.h, each.a) if a is not None]
    return _joined(grid, dx, states, dweights, needs)


def second(
    call: LayerCall,
    grads: OutputGrads,
    wanted: LayerCall,
    cells: Tensor,
    gates: Tensor | None,
    y: Tensor | None,
    of_grads: bool,
    needs: Needs,
) -> tuple[OutputGrads, Grads]:
    """The derivatives of the scalar sum(wanted * gradients of the layer).

    All arguments are of the dtype in which the layer computes.

    Args:
        call: the call.
        grads: the gradients of its outputs.
        wanted: as a call: what the gradients by x, h0, c0 and the weights are multiplied by; None for zeros.
        cells: of its forward pass.
        gates: of its forward pass; or None, where further derivatives look through them, and instead
        y: the same, a function of the call as cells are then.
        of_grads: whether the first item is asked for.
        needs: which of the second.

    Returns:
        The derivatives by `grads`, which are the tangents of the outputs; and by the arrays of the call.
    """
    grid = Grid(call)
    wanted_x = None if wanted.x is None else grid.take(wanted.x)
    outputs: list[tuple[Tensor, ...]] = []
    ddx: Any = None
    states, ddweights = [], list[Tensor]()
    for each, v in zip(_directions(call, grid, cells, gates, y), wanted.split(), strict=True):
        n, w, walk, _, _, a, at = each
        vx = None if wanted_x is None else walk.take(wanted_x)
        vh0 = torch.zeros_like(each.h0) if wanted.h0 is None else wanted.h0[n]
        vc0 = torch.zeros_like(each.c0) if wanted.c0 is None else wanted.c0[n]
        p_in = _add(
            None if vx is None else F.linear(vx, w.w_ih),
            None if v.w_ih is None else F.linear(a.x, v.w_ih),
            None if v.w_hh is None else F.linear(a.h_prev, v.w_hh),
            _add(v.b_ih, v.b_hh),
        )
        p_in = torch.zeros_like(a.gates) if p_in is None else p_in.expand_as(a.gates)
        h_in = None if v.w_hr is None else F.linear(a.hidden, v.w_hr)
        t = _tangent_steps(at, walk, w, p_in, h_in, vh0, vc0)
        th, tc = torch.stack(t.h), torch.stack(t.c)
        if of_grads:
            outputs.append((walk.give(th), walk.final(vh0, th), t.c[-1], grid.unpad(walk.give(tc))))
        if not needs:
            continue

        d = _first(call, grid, each, grads)
        t_at = _factor_tangents(a, walk, torch.stack(t.p), tc, walk.previous(vc0, tc))
        dd = _adjoint_tangents(at, walk, w, d, t_at, v)
        states.append((dd.h0, dd.c0))
        p, tp = torch.stack(d.p), torch.stack(dd.p)
        if needs & Needs.X:
            ddx = _add(ddx, walk.give(_add(tp @ w.w_ih, None if v.w_ih is None else p @ v.w_ih)))
        if needs & Needs.WEIGHTS:
            dw = _weight_gradients(w, tp, dd.h, a)
            db, dw_hr = dw.b_ih, dw.w_hr
            dw_hh = dw.w_hh + _by_rows(p, walk.previous(vh0, th))
            dw_ih = dw.w_ih if vx is None else dw.w_ih + _by_rows(p, vx)
            if dw_hr is not None:
                dw_hr = dw_hr + _by_rows(torch.stack(d.h), torch.stack(t.hidden))
            ddweights += [dw for dw in (dw_ih, dw_hh, db, db, dw_hr) if dw is not None]
    tangents = OutputGrads(None, None, None, None)
    if of_grads:
        ys, h_ns, c_ns, all_cells = zip(*outputs, strict=True)
        tangents = OutputGrads(
            grid.give(torch.cat(ys, -1)), torch.stack(h_ns), torch.stack(c_ns), torch.stack(all_cells)
        )
    return tangents, _joined(grid, ddx, states, ddweights, needs) if needs else Grads(None, None, None, None)
