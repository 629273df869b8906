"""torch's own LSTM: in traces, and on devices and dtypes without a kernel of ours."""

from __future__ import annotations

import torch
from torch.compiler import is_compiling
from torch.jit import is_tracing  # type: ignore[attr-defined]

from .._torch_private import _VF
from ..call import LayerCall, Outputs, Save
from ..checks import check_ranks, check_shapes


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
    if not (is_tracing() or is_compiling()):  # torch's operator checks no sizes, its module does
        check_ranks(call)
        check_shapes(call, call.num_steps(), call.batch_size())
    if call.is_step:
        return _step(call)
    D, w = call.num_directions, call.split()[0]
    B, H, P = call.batch_size(), w.w_hh.shape[0] // 4, w.w_hh.shape[1]
    h0 = call.x.new_zeros(D, B, P) if call.h0 is None else call.h0
    c0 = call.x.new_zeros(D, B, H) if call.c0 is None else call.c0
    train = torch.is_grad_enabled() or is_tracing()  # a trace is run with gradients, and checked without
    has_biases, hx = w.b_ih is not None, (h0, c0)
    if call.batch_sizes is None:
        y, h_n, c_n = _VF.lstm(call.x, hx, call.weights, has_biases, 1, 0.0, train, D == 2, call.batch_first)
    else:
        y, h_n, c_n = _VF.lstm(call.x, call.batch_sizes, hx, call.weights, has_biases, 1, 0.0, train, D == 2)
    return Outputs(y, h_n, c_n, None, None)
