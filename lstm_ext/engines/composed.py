"""A layer in torch's own operations: on any device, differentiable to any order, step by step and thus slow."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..call import LayerCall, Outputs, Save, Weights


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a layer of this dtype computes in, and keeps its cells in."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


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
    x, result, dtype = call.x, call.x.dtype, compute_dtype(call.x.dtype)
    lengths, resets = call.lengths, call.resets
    valid_rows = None
    if call.batch_sizes is not None:
        batch_sizes = call.batch_sizes.to(x.device)
        valid = torch.arange(call.batch_size(), device=x.device) < batch_sizes[:, None]
        lengths, valid_rows = valid.sum(0), valid.flatten().nonzero()[:, 0]
        x = x.new_zeros(valid.numel(), x.shape[1]).index_copy(0, valid_rows, x).unflatten(0, valid.shape)
    elif call.batch_first:
        x, resets = x.transpose(0, 1), None if resets is None else resets.transpose(0, 1)
    active = None
    if lengths is not None:
        active = (torch.arange(len(x), device=x.device)[:, None] < lengths.to(x.device))[..., None]
        x = x.masked_fill(~active, 0)
        resets = None if resets is None else resets & active[..., 0]
    resets = None if resets is None else resets[..., None]

    split = call._replace(weights=[w.to(dtype) for w in call.weights]).split()
    results = []
    for d, (reverse, w) in enumerate(zip(call.directions.reversals, split, strict=True)):
        h = x.new_zeros(x.shape[1], w.w_hh.shape[1], dtype=dtype) if call.h0 is None else call.h0[d].to(dtype)
        c = x.new_zeros(x.shape[1], w.w_hh.shape[0] // 4, dtype=dtype) if call.c0 is None else call.c0[d].to(dtype)
        results.append(composed_direction(x.to(dtype), h, c, w, active, resets, reverse))
    ys, h_ns, c_ns, cells = zip(*results, strict=True)
    y, all_cells = torch.cat(ys, -1), torch.stack(cells)
    if valid_rows is not None:
        y, all_cells = y.flatten(0, 1)[valid_rows], all_cells.flatten(1, 2)[:, valid_rows]
    elif call.batch_first:
        y = y.transpose(0, 1)
    return Outputs(y.to(result), torch.stack(h_ns).to(result), torch.stack(c_ns).to(result), all_cells, None)
