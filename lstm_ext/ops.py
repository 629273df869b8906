"""The operators `torch.ops.lstm_ext`, under the name by which programs that were exported with them import them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .engines import in_torch
from .frozen_stack import frozen_forward, layer_by_layer
from .torch_op import (
    backward_of,
    backward_results,
    forward_of,
    forward_results,
    layer_backward,
    layer_forward,
)

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
    return layer_by_layer(in_torch.forward, arguments)


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    return forward_results(in_torch.forward(*forward_of(arguments)))


def _backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    call, saved, grads, needs = backward_of(arguments)
    return backward_results(in_torch.backward(call, saved, grads, needs), call.x)
