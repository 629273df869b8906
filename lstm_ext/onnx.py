"""Exports to ONNX: what `torch.onnx.export` does by itself with a module, for programs that are exported already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .call import Directions, LayerCall, Save
from .engines import onnx


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What puts ONNX's LSTM in the place of our op, in a program that names it.

    `torch.onnx.export(module, arguments, dynamo=True)` does so by itself. A program that `torch.export` has made gets
    it by `program.run_decompositions(lstm_ext.onnx.decompositions())`.
    """

    def layer_forward(*arguments: Any) -> tuple[Tensor, ...]:
        *arrays, directions, batch_first, save = arguments
        call = LayerCall._make((*arrays, Directions(directions), batch_first))
        outputs = onnx.forward(call, Save.CELLS if save else Save.NOTHING)
        empty = arguments[0].new_empty(0)
        return outputs.y, outputs.h_n, outputs.c_n, empty, empty

    return {torch.ops.lstm_ext.layer_forward.default: layer_forward}
