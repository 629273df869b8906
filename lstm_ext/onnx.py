"""Exports to ONNX: what `torch.onnx.export` does by itself with a module, for programs that are exported already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .call import Save
from .engines import onnx
from .frozen_stack import frozen_forward, layer_by_layer
from .torch_op import forward_of, layer_forward


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What puts ONNX's LSTM in the place of our ops, in a program that names them.

    `torch.onnx.export(module, arguments, dynamo=True)` does so by itself. A program that `torch.export` has made gets
    it by `program.run_decompositions(lstm_ext.onnx.decompositions())`.
    """

    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        call, save = forward_of(arguments)
        outputs = onnx.forward(call, Save.CELLS if save else Save.NOTHING)
        empty = call.x.new_empty(0)
        return outputs.y, outputs.h_n, outputs.c_n, empty, empty

    def frozen(*arguments: Any) -> tuple[Tensor, ...]:
        return layer_by_layer(onnx.forward, arguments)

    return {layer_forward: forward, frozen_forward: frozen}
