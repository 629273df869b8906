"""torch's own LSTM: on devices and dtypes without a kernel of ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.jit import is_tracing  # type: ignore[attr-defined]

from .._torch_private import _VF
from ..call import LayerCall, Outputs, Save, check_shapes


def stack(
    x: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Some layers: (y, h_n, c_n).

    Args:
        x: [T, B, I], [B, T, I] or packed rows [N, I].
        hx: the initial state [L * D, B, P], [L * D, B, H]; None is zeros.
        weights: of all layers, as `torch.nn.LSTM` lists them.
        batch_sizes: of packed rows [T].
        options: has_biases, num_layers, dropout, train, bidirectional and batch_first, as `torch.lstm` takes them.
    """
    batch_first = options.pop("batch_first")
    if hx is None:
        B = x.shape[0 if batch_first else 1] if batch_sizes is None else int(batch_sizes[0])
        LD = options["num_layers"] * (2 if options["bidirectional"] else 1)
        H, own = weights[1].shape[0] // 4, weights[1].shape[1]
        hx = x.new_zeros(LD, B, own), x.new_zeros(LD, B, H)
    if batch_sizes is not None:
        return _VF.lstm(x, batch_sizes, hx, weights, **options)
    return _VF.lstm(x, hx, weights, **options, batch_first=batch_first)


def _step(call: LayerCall) -> Outputs:
    """One step of torch's own cell."""
    if call.x.dim() == 1:
        x, h0, c0 = (None if a is None else a[None] for a in call[:3])
        y, _, c_n, _, _ = _step(call._replace(x=x, h0=h0, c0=c0))
        return Outputs(y[0], None, c_n[0], None, None)
    x, H = call.x, call.weights[1].shape[1]
    zeros = torch.zeros(x.shape[0], H, dtype=x.dtype, device=x.device)  # dense, also where x is sparse
    h, c = (zeros if a is None else a for a in (call.h0, call.c0))
    y, c_n = _VF.lstm_cell(x, (h, c), *call.weights)
    return Outputs(y, None, c_n, None, None)


def forward(call: LayerCall, save: Save) -> Outputs:
    """One layer, forward or both directions, without masks, or one step; nothing is saved."""
    assert not save
    if call.is_step:
        return _step(call)
    if not (is_tracing() or is_compiling()):  # torch's operator checks no sizes, its module does
        check_shapes(call, call.num_steps(), call.batch_size())
    state = None
    if call.h0 is not None or call.c0 is not None:
        B = call.batch_size()
        H, P = call.weights[1].shape[0] // 4, call.weights[1].shape[1]
        zeros = [call.x.new_zeros(call.num_directions, B, width) for width in (P, H)]
        state = zeros[0] if call.h0 is None else call.h0, zeros[1] if call.c0 is None else call.c0
    y, h_n, c_n = stack(
        call.x,
        state,
        call.weights,
        call.batch_sizes,
        has_biases=call.split()[0].b_ih is not None,
        num_layers=1,
        dropout=0.0,
        train=torch.is_grad_enabled() or is_tracing(),  # a trace is run with gradients, and checked without
        bidirectional=call.num_directions == 2,
        batch_first=call.batch_first,
    )
    return Outputs(y, h_n, c_n, None, None)
