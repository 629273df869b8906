"""A layer in torch's own operations: on any device, differentiable to any order, step by step and thus slow."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..call import LayerCall, Outputs, Save, Weights


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a layer of this dtype computes in, and keeps its cells in."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


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


def composed_direction(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    w: Weights,
    active: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [T, B, I] → y [T, B, P], h_n, c_n, cells [T, B, H]. In reverse a row rests until its last valid step comes."""
    projected_x = F.linear(x, w.w_ih, None if w.b_ih is None or w.b_hh is None else w.b_ih + w.b_hh)
    ys: list[Tensor] = []
    cells: list[Tensor] = []
    for t in reversed(range(len(x))) if reverse else range(len(x)):
        h_prev, c_prev = h, c
        if resets is not None:
            h_prev, c_prev = h.masked_fill(resets[t], 0), c.masked_fill(resets[t], 0)
        i, f, g, o = (projected_x[t] + F.linear(h_prev, w.w_hh)).chunk(4, -1)
        c_next = f.sigmoid() * c_prev + i.sigmoid() * g.tanh()
        h_next = o.sigmoid() * c_next.tanh()
        if w.w_hr is not None:
            h_next = F.linear(h_next, w.w_hr)
        if active is None:
            h, c = h_next, c_next
            ys.append(h)
            cells.append(c)
        else:
            h, c = torch.where(active[t], h_next, h), torch.where(active[t], c_next, c)
            ys.append(h_next.masked_fill(~active[t], 0))
            cells.append(c_next.masked_fill(~active[t], 0))
    if reverse:
        ys.reverse()
        cells.reverse()
    return torch.stack(ys), h, c, torch.stack(cells)


def forward(call: LayerCall, save: Save) -> Outputs:
    """The outputs with the cells, which cost nothing here, but without the gates; arguments are taken as checked."""
    if call.is_step:
        return forward(call.with_time(), save).without_time(call)
    result, dtype, grid = call.x.dtype, compute_dtype(call.x.dtype), Grid(call)
    x = grid.take(call.x)
    resets = None if call.resets is None else grid.take(call.resets)[..., None]
    active = None if grid.valid is None else grid.valid[..., None]
    if active is not None:
        x = x.masked_fill(~active, 0)
        resets = None if resets is None else resets & active

    split = call._replace(weights=[w.to(dtype) for w in call.weights]).split()
    results = []
    for d, (reverse, w) in enumerate(zip(call.directions.reversals, split, strict=True)):
        h = x.new_zeros(x.shape[1], w.w_hh.shape[1], dtype=dtype) if call.h0 is None else call.h0[d].to(dtype)
        c = x.new_zeros(x.shape[1], w.w_hh.shape[0] // 4, dtype=dtype) if call.c0 is None else call.c0[d].to(dtype)
        results.append(composed_direction(x.to(dtype), h, c, w, active, resets, reverse))
    ys, h_ns, c_ns, cells = zip(*results, strict=True)
    y, all_cells = grid.give(torch.cat(ys, -1)), torch.stack([grid.unpad(c) for c in cells])
    return Outputs(y.to(result), torch.stack(h_ns).to(result), torch.stack(c_ns).to(result), all_cells, None)
