"""A layer on a GPU: what is one large product over all steps in torch, the steps themselves in the kernels.

The arguments are those of `reference.layer_forward` and `reference.layer_backward`, as tensors on one CUDA device
(batch_sizes on the CPU). Everything runs on the current stream; nothing waits for the device. float32 multiplies as
TF32 where torch allows it: in the steps as it does for recurrent layers, in the products here as for any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import _native
from .composed import compute_dtype
from .reference import BOTH, NEEDS_H0, NEEDS_WEIGHTS, NEEDS_X

_C: Any = _native.C

_strategy = ""


@contextmanager
def use_strategy(name: str) -> Iterator[None]:
    """Runs the layers inside the `with` block by one strategy: "block", "cluster", "grid" or "step"; "" chooses.

    For tests and benchmarks. It counts for the whole process: autograd runs backward passes on threads of its own.
    """
    global _strategy
    former, _strategy = _strategy, name
    try:
        yield
    finally:
        _strategy = former


def tf32_allowed() -> bool:
    """Whether torch lets float32 recurrent layers multiply as TF32."""
    precision: Any = torch._C._get_fp32_precision_getter
    return bool(precision("cuda", "rnn") == "tf32")


def _walk(
    lengths: Tensor | None, batch_sizes: Tensor | None, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """The length of each row [B], or None; and where the rows of each time start [T], None if padded."""
    if batch_sizes is None:
        return None if lengths is None else lengths.contiguous(), None
    lengths = (batch_sizes[:, None] > torch.arange(int(batch_sizes[0]))).sum(0)
    starts = batch_sizes.cumsum(0) - batch_sizes
    return lengths.to(device, non_blocking=True), starts.to(device, non_blocking=True)


def _split(weights: Sequence[Tensor], directions: int) -> tuple[list[Tensor], list[Tensor]]:
    """w_ih of each direction; and what the kernels read, direction after direction."""
    each = len(weights) // (2 if directions == BOTH else 1)
    kept = [w.contiguous() for n, w in enumerate(weights) if n % each]
    return list(weights[::each]), kept


def _rows(x: Tensor, batch_first: bool) -> Tensor:
    """[T, B, ..], [B, T, ..] or packed rows [N, ..] as rows [T * B, ..] or [N, ..], in the order of the kept arrays."""
    x = x.transpose(0, 1) if batch_first else x
    return x if x.dim() == 2 else x.reshape(x.shape[0] * x.shape[1], x.shape[2])


def layer_forward(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    batch_sizes: Tensor | None,
    directions: int,
    batch_first: bool,
    save: int,
) -> tuple[Any, ...]:
    """(y, h_n, c_n, cells, gates); what `save` leaves out is None."""
    if batch_sizes is not None and (lengths is not None or resets is not None or batch_first):
        raise ValueError("lengths, resets, batch_first: expected none of them with batch_sizes, got one")
    lengths, offsets = _walk(lengths, batch_sizes, x.device)
    w_ih, kept = _split(weights, directions)
    steps = x.shape[:1] if batch_sizes is not None else (x.shape[1], x.shape[0]) if batch_first else x.shape[:2]
    rows = _rows(x, batch_first)
    wide = compute_dtype(x.dtype)
    xw = x.new_empty(len(w_ih), *steps, w_ih[0].shape[0], dtype=wide)
    for d, w in enumerate(w_ih):
        out = xw[d].view(rows.shape[0], w.shape[0])
        if wide == x.dtype:
            torch.mm(rows, w.t(), out=out)
        else:
            torch.mm(rows, w.t(), out_dtype=wide, out=out)
    result: tuple[Any, ...] = _C.cuda_layer_forward(
        *(xw, h0, c0, kept, lengths, resets, offsets, directions, batch_first, save),
        *(tf32_allowed(), _strategy),
    )
    return result


def layer_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dcells: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    y: Tensor,
    cells: Tensor,
    gates: Tensor,
    lengths: Tensor | None,
    resets: Tensor | None,
    batch_sizes: Tensor | None,
    directions: int,
    batch_first: bool,
    needs: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor] | None]:
    """(dx, dh0, dc0, dweights); None for what is not needed."""
    lengths, offsets = _walk(lengths, batch_sizes, x.device)
    w_ih, kept = _split(weights, directions)
    # One step of all rows, as a cell's: one launch, which multiplies nothing; the gradient of h0 is one more product.
    alone = y.shape[1 if batch_first else 0] == 1 and lengths is None and resets is None
    d_gates, h_prev, d_h, hidden, dh0, dc0 = _C.cuda_layer_backward(
        *(dy, dh_n, dc_n, dcells, h0, c0, kept, y, cells, gates, lengths, resets, offsets),
        *(directions, batch_first, needs & ~NEEDS_H0 if alone else needs, tf32_allowed()),
        _strategy or ("step" if alone else ""),
    )
    if alone and needs & NEEDS_H0:
        w_hh = kept[:: len(kept) // len(w_ih)]
        dh0 = torch.stack([d_gates[d].flatten(0, -2) @ w for d, w in enumerate(w_hh)])
    by_direction = [(d_gates[d].flatten(0, -2), w) for d, w in enumerate(w_ih)]
    dx = None
    if needs & NEEDS_X:
        total = by_direction[0][0] @ w_ih[0]
        for g, w in by_direction[1:]:
            total = total.addmm_(g, w)
        dx = total.view(x.shape) if not batch_first else total.view(x.shape[1], x.shape[0], -1).transpose(0, 1)
        dx = dx.contiguous()
    if not needs & NEEDS_WEIGHTS:
        return dx, dh0, dc0, None
    rows = _rows(_masked(x, lengths, batch_first) if offsets is None else x, batch_first)
    biased, dweights = len(weights) // len(w_ih) >= 4, []
    for d, (g, _) in enumerate(by_direction):
        dweights += [g.t() @ rows, g.t() @ h_prev[d].flatten(0, -2)]
        if biased:
            db = g.sum(0)
            dweights += [db, db.clone()]
        if d_h is not None:
            dweights.append(d_h[d].flatten(0, -2).t() @ hidden[d].flatten(0, -2))
    return dx, dh0, dc0, dweights


def _masked(x: Tensor, lengths: Tensor | None, batch_first: bool) -> Tensor:
    """x with zeros past each length, whatever stood there."""
    if lengths is None:
        return x
    steps = torch.arange(x.shape[1 if batch_first else 0], device=x.device)
    past = steps >= lengths[:, None] if batch_first else steps[:, None] >= lengths
    return x.masked_fill(past[..., None], 0)


def cell_forward(
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One step in one launch, nothing kept for a backward pass: (h', c')."""
    result: tuple[Tensor, Tensor] = _C.cuda_cell_forward(x, h, c, w_ih, w_hh, b_ih, b_hh, tf32_allowed())
    return result
