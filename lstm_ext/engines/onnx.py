"""A layer for ONNX: one standard `LSTM` node, both directions in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import assume_constant_result, is_compiling

from ..call import BOTH, FORWARD, REVERSE, LayerCall, Outputs, Save, check
from . import stock

_DIRECTIONS = {FORWARD: "forward", REVERSE: "reverse", BOTH: "bidirectional"}


@assume_constant_result
def is_exporting() -> bool:
    """`torch.onnx.is_in_onnx_export`, which strict tracing takes for False."""
    return torch.onnx.is_in_onnx_export()


def _refuse(call: LayerCall, save: Save) -> None:
    """An error for what an ONNX LSTM cannot do."""
    for name, given, expected in (
        ("proj_size", call.split()[0].w_hr is not None, "0"),
        ("resets", call.resets is not None, "None"),
        ("return_cells", save > Save.NOTHING, "False"),
        ("input", call.batch_sizes is not None, "a padded sequence, with lengths, and not a packed one"),
    ):
        if given:
            raise NotImplementedError(f"{name}: expected {expected}, since the LSTM of ONNX has nothing like it")


def _stack(weights: Sequence[Any]) -> Tensor:
    """One weight of each direction, its gates from i, f, g, o to ONNX's i, o, f, c: [D, 4H, …]."""
    H = weights[0].shape[0] // 4
    gates = [gate for w in weights for gate in (w[:H], w[3 * H :], w[H : 3 * H])]
    return torch.cat(gates).unflatten(0, (len(weights), 4 * H))


def forward(call: LayerCall, save: Save) -> Outputs:
    """The outputs while `torch.onnx.export` records: an LSTM node.

    Raises:
        NotImplementedError: a projection, resets, cells or a packed sequence.
    """
    check(call, values=False)
    _refuse(call, save)
    if not is_compiling():  # the exporter of TorchScript, which has a rule for torch's own LSTM
        if call.lengths is not None or call.directions == REVERSE:
            raise NotImplementedError("lengths, reverse: expected torch.onnx.export with dynamo=True")
        return stock.forward(call, save)
    split = call.split()
    w_ih, w_hh = _stack([w.w_ih for w in split]), _stack([w.w_hh for w in split])
    bias = None
    if split[0].b_ih is not None:
        bias = torch.cat([_stack([w.b_ih for w in split]), _stack([w.b_hh for w in split])], 1)
    x = call.x.transpose(0, 1) if call.batch_first else call.x  # ORT knows the attribute `layout` only where it is 0
    T, B, D, H = x.shape[0], x.shape[1], call.num_directions, w_hh.shape[-1]
    y, h_n, c_n = torch.onnx.ops.symbolic_multi_out(
        "LSTM",
        (x, w_ih, w_hh, bias, None if call.lengths is None else call.lengths.int(), call.h0, call.c0),
        {"hidden_size": H, "direction": _DIRECTIONS[call.directions]},
        dtypes=[x.dtype] * 3,
        shapes=[(T, D, B, H), (D, B, H), (D, B, H)],
    )
    if call.lengths is not None:  # a row of length 0 keeps its state; ONNX does not say so, onnxruntime returns zeros
        empty = (call.lengths == 0)[:, None]
        h_n, c_n = (
            final if initial is None else torch.where(empty, initial, final)
            for initial, final in ((call.h0, h_n), (call.c0, c_n))
        )
    y = y.transpose(1, 2).flatten(2)  # [T, B, D*H]
    return Outputs(y.transpose(0, 1) if call.batch_first else y, h_n, c_n, None, None)
