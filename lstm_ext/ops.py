"""The operators `torch.ops.lstm_ext`, under the name by which programs that were exported with them import them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, track_tensor_tree

from ._torch_private import tree_map
from .call import FORWARD, REVERSE, LayerCall, OutputGrads, Outputs, Save
from .engines import composed, derivatives
from .frozen_stack import Spec, dequantized, frozen_forward, run_layers
from .torch_op import backward_of, forward_of, layer_backward, layer_forward, or_empty

__all__ = ["decompositions", "frozen_forward", "layer_backward", "layer_forward"]


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What our operators are in torch's: a table for programs that are to run without lstm_ext.

        program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},))
        program = program.run_decompositions(lstm_ext.ops.decompositions())

    A layer becomes `aten.lstm`, torch's own LSTM, also for dynamic sizes. What that cannot do (lengths, resets, cells
    of each step, a backward pass) becomes elementary operations of each step of the example, whose number of steps is
    then the only one. To decompose all else too, add the table to `torch.export.default_decompositions()`.

    Returns:
        A function for each operator.
    """
    return {layer_forward: _forward, layer_backward: _backward, frozen_forward: _frozen}


def _frozen(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A call of `layer_forward` for each layer, with weights of the dtype of x."""
    x, h0, c0, weights, lengths, resets, batch_sizes, batch_first, text = arguments
    spec = Spec.from_text(text)
    call = LayerCall(x, h0, c0, [], lengths, resets, batch_sizes, FORWARD, batch_first)
    y, h_n, c_n = run_layers(call, dequantized(weights, spec), spec)
    return y, or_empty(h_n, y), c_n


def _wide(call: LayerCall) -> LayerCall:
    return call.cast(composed.compute_dtype(call.x.dtype))


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    call, save = forward_of(arguments)
    x = call.x
    if call.cell is not None:  # `_backward` looks at nothing that is saved
        y, h_n, c_n, cells, gates = composed.forward(call, Save.CELLS)
    elif not call.masked and not save:
        y, h_n, c_n, cells, gates = _stock_forward(call)
    else:
        y, h_n, c_n, cells, gates = composed.forward(_wide(call), Save.CELLS)
        if save == Save.ALL and cells is not None:
            gates = derivatives.gates(_wide(call), y, cells).to(x.dtype)
    return y.to(x.dtype), h_n.to(x.dtype), c_n.to(x.dtype), or_empty(cells, x), or_empty(gates, x)


def _stock_forward(call: LayerCall) -> Outputs:
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


def _backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    call, saved, grads, needs = backward_of(arguments)
    x, wide = call.x, _wide(call)
    dtype = wide.x.dtype
    if call.cell is not None:
        dx, dh0, dc0, dweights = composed.first(call, grads, needs)
        return or_empty(dx, x), or_empty(dh0, x), or_empty(dc0, x), dweights or []
    wide_grads = OutputGrads(*(None if g is None else g.to(dtype) for g in grads))
    dx, dh0, dc0, dweights = derivatives.first(wide, wide_grads, saved.cells, saved.gates.to(dtype), needs)
    dx, dh0, dc0 = (or_empty(None if d is None else d.to(x.dtype), x) for d in (dx, dh0, dc0))
    return dx, dh0, dc0, [d.to(x.dtype) for d in dweights or []]
