"""One layer in torch's own operations: on any device, differentiable to any order, step by step and thus slow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .reference import BOTH, FORWARD, REVERSE

HALF = frozenset({torch.bfloat16, torch.float16})


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a layer of this dtype computes in, and keeps its cells in."""
    return torch.float32 if dtype in HALF else dtype


def split_weights(weights: Sequence[Tensor], num_directions: int) -> list[tuple[Any, ...]]:
    """Per direction (w_ih, w_hh, b or None, w_hr or None), the two biases added."""
    per_direction = len(weights) // num_directions
    split = []
    for d in range(num_directions):
        w = weights[d * per_direction : (d + 1) * per_direction]
        split.append((w[0], w[1], w[2] + w[3] if per_direction >= 4 else None, w[-1] if per_direction % 2 else None))
    return split


def composed_direction(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weights: tuple[Any, ...],
    active: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [T, B, I] → y [T, B, P], h_n, c_n, cells [T, B, H]. In reverse a row rests until its last valid step comes."""
    w_ih, w_hh, bias, w_hr = weights
    projected_x = F.linear(x, w_ih, bias)
    ys: list[Tensor] = []
    cells: list[Tensor] = []
    for t in reversed(range(len(x))) if reverse else range(len(x)):
        h_prev, c_prev = h, c
        if resets is not None:
            h_prev, c_prev = h.masked_fill(resets[t], 0), c.masked_fill(resets[t], 0)
        i, f, g, o = (projected_x[t] + F.linear(h_prev, w_hh)).chunk(4, -1)
        c_next = f.sigmoid() * c_prev + i.sigmoid() * g.tanh()
        h_next = o.sigmoid() * c_next.tanh()
        if w_hr is not None:
            h_next = F.linear(h_next, w_hr)
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


def composed_layer(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    batch_sizes: Tensor | None,
    directions: int,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, h_n, c_n, cells) as `reference.layer_forward` gives them, on any device, differentiable to any order."""
    result, dtype = x.dtype, compute_dtype(x.dtype)
    valid_rows = None
    if batch_sizes is not None:
        batch_sizes = batch_sizes.to(x.device)
        B = int(batch_sizes[0])
        valid = torch.arange(B, device=x.device) < batch_sizes[:, None]
        lengths, valid_rows = valid.sum(0), valid.flatten().nonzero()[:, 0]
        x = x.new_zeros(valid.numel(), x.shape[1]).index_copy(0, valid_rows, x).unflatten(0, valid.shape)
    elif batch_first:
        x, resets = x.transpose(0, 1), None if resets is None else resets.transpose(0, 1)
    active = None
    if lengths is not None:
        active = (torch.arange(len(x), device=x.device)[:, None] < lengths.to(x.device))[..., None]
        x = x.masked_fill(~active, 0)
        resets = None if resets is None else resets & active[..., 0]
    resets = None if resets is None else resets[..., None]

    reversals = {FORWARD: (False,), REVERSE: (True,), BOTH: (False, True)}[directions]
    split = split_weights([w.to(dtype) for w in weights], len(reversals))
    results = []
    for d, (reverse, w) in enumerate(zip(reversals, split, strict=True)):
        h = x.new_zeros(x.shape[1], w[1].shape[1], dtype=dtype) if h0 is None else h0[d].to(dtype)
        c = x.new_zeros(x.shape[1], w[1].shape[0] // 4, dtype=dtype) if c0 is None else c0[d].to(dtype)
        results.append(composed_direction(x.to(dtype), h, c, w, active, resets, reverse))
    ys, h_ns, c_ns, cells = zip(*results, strict=True)
    y, all_cells = torch.cat(ys, -1), torch.stack(cells)
    if valid_rows is not None:
        y, all_cells = y.flatten(0, 1)[valid_rows], all_cells.flatten(1, 2)[:, valid_rows]
    elif batch_first:
        y = y.transpose(0, 1)
    return y.to(result), torch.stack(h_ns).to(result), torch.stack(c_ns).to(result), all_cells


def torch_layer(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    directions: int,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's own LSTM, forward or both directions: (y, h_n, c_n)."""
    D = 2 if directions == BOTH else 1
    B = int(batch_sizes[0]) if batch_sizes is not None else x.shape[0 if batch_first else 1]
    h0 = x.new_zeros(D, B, weights[1].shape[1]) if h0 is None else h0
    c0 = x.new_zeros(D, B, weights[1].shape[0] // 4) if c0 is None else c0
    options = (len(weights) // D >= 4, 1, 0.0, torch.is_grad_enabled(), D == 2)
    if batch_sizes is not None:
        return torch._VF.lstm(x, batch_sizes, (h0, c0), weights, *options)
    return torch._VF.lstm(x, (h0, c0), weights, *options, batch_first)
