"""A layer in torch's operations with all that the ops promise, below autograd: for calls that no kernel takes.

`aten.lstm` where it computes what is asked, else step by step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, track_tensor_tree

from .._torch_private import tree_map
from ..call import FORWARD, REVERSE, Grads, LayerCall, Needs, OutputGrads, Outputs, Save, Saved
from . import composed, derivatives


def forward(call: LayerCall, save: Save) -> Outputs:
    """The outputs of a checked call with a time axis."""
    if call.cell is not None or call.masked or save:
        outputs = composed.forward(call, save)
        return outputs._replace(y=outputs.y.contiguous(), cells=outputs.cells if save else None)
    if call.directions != REVERSE:
        return _aten_lstm(call)
    grid, axis = composed.Grid(call), 1 if call.batch_first else 0
    walk = derivatives.Walk(call, grid, reverse=True)

    def turn(a: Tensor) -> Tensor:
        return a.flip(axis) if grid.rows is None else grid.unpad(walk.turn(grid.pad(a)))

    outputs = _aten_lstm(call._replace(x=turn(call.x), directions=FORWARD))
    return outputs._replace(y=turn(outputs.y))


def _aten_lstm(call: LayerCall) -> Outputs:
    """`aten.lstm`; where a graph is recorded, by our own rule for its shapes: torch's walks through all steps."""
    x, w, D, batch_sizes = call.x, call.split()[0], call.num_directions, call.batch_sizes
    B = call.batch_size() if batch_sizes is None else batch_sizes[0].item()
    zeros = [x.new_zeros(D, B, width) for width in (w.w_hh.shape[1], w.w_hh.shape[0] // 4)]
    hx = [zero if a is None else a for a, zero in zip((call.h0, call.c0), zeros, strict=True)]
    options: tuple[Any, ...] = (call.weights, w.b_ih is not None, 1, 0.0, False, D == 2)
    if batch_sizes is None:
        op, arguments = torch.ops.aten.lstm.input, (x, hx, *options, call.batch_first)
    else:
        op, arguments = torch.ops.aten.lstm.data, (x, batch_sizes, hx, *options)
    if (mode := get_proxy_mode()) is None:
        y, h_n, c_n = op(*arguments)
    else:
        tracer: Any = mode.tracer
        with disable_proxy_modes_tracing():
            y = x.new_empty(*x.shape[:-1], D * hx[0].shape[-1])
            if call.batch_first:  # as torch's is laid out in memory
                y = y.transpose(0, 1).contiguous().transpose(0, 1)
            outputs = y, hx[0].clone(), hx[1].clone()
        node = tracer.create_proxy("call_function", op, tree_map(tracer.unwrap_proxy, arguments), {})
        y, h_n, c_n = track_tensor_tree(outputs, node, constant=None, tracer=tracer)
    return Outputs(y.contiguous(), h_n, c_n, None, None)


def backward(call: LayerCall, saved: Saved, grads: OutputGrads, needs: Needs) -> Grads:
    """The gradients of what `forward`, or an engine, computes with `Save.ALL`."""
    if call.cell is not None:
        return composed.first(call, grads, needs)
    dtype, own = composed.compute_dtype(call.x.dtype), call.x.dtype
    wide_grads = OutputGrads(*(None if g is None else g.to(dtype) for g in grads))
    found = derivatives.first(call.cast(dtype), wide_grads, saved.cells, saved.gates.to(dtype), needs)
    dx, dh0, dc0 = (None if d is None else d.to(own) for d in found[:3])
    return Grads(dx, dh0, dc0, [d.to(own) for d in found.dweights] if found.dweights else None)
