"""The layer for ONNX: one standard `LSTM` node, both directions in it, in the place of each call of our op.

`torch.onnx.export(module, arguments, dynamo=True)` comes here by itself. A program that `torch.export` has made already
names our op; `program.run_decompositions(lstm_ext.onnx.decompositions())` puts the nodes in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import assume_constant_result, is_compiling

from .composed import torch_layer
from .reference import BOTH, FORWARD, REVERSE

_DIRECTIONS = {FORWARD: "forward", REVERSE: "reverse", BOTH: "bidirectional"}


@assume_constant_result
def is_exporting() -> bool:
    """`torch.onnx.is_in_onnx_export`, which strict tracing takes for False."""
    return torch.onnx.is_in_onnx_export()


def _refuse(weights: Sequence[Tensor], resets: Any, batch_sizes: Any, directions: int, cells_wanted: bool) -> None:
    """An error for what an ONNX LSTM cannot do."""
    projected = len(weights) // (2 if directions == BOTH else 1) % 2 == 1
    for name, given, expected in (
        ("proj_size", projected, "0"),
        ("resets", resets is not None, "None"),
        ("return_cells", cells_wanted, "False"),
        ("input", batch_sizes is not None, "a padded sequence, with lengths, and not a packed one"),
    ):
        if given:
            raise NotImplementedError(f"{name}: expected {expected}, since the LSTM of ONNX has nothing like it")


def _stack(weights: Sequence[Tensor]) -> Tensor:
    """One weight of each direction, its gates from i, f, g, o to ONNX's i, o, f, c: [D, 4H, …]."""
    H = weights[0].shape[0] // 4
    gates = [gate for w in weights for gate in (w[:H], w[3 * H :], w[H : 3 * H])]
    return torch.cat(gates).unflatten(0, (len(weights), 4 * H))


def layer(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    batch_sizes: Tensor | None,
    directions: int,
    batch_first: bool,
    cells_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, h_n, c_n) of `dispatch.layer` while `torch.onnx.export` records: an LSTM node.

    Raises:
        NotImplementedError: a projection, resets, cells or a packed sequence.
    """
    _refuse(weights, resets, batch_sizes, directions, cells_wanted)
    if not is_compiling():  # the exporter of TorchScript, which has a rule for torch's own LSTM
        if lengths is not None or directions == REVERSE:
            raise NotImplementedError("lengths, reverse: expected torch.onnx.export with dynamo=True")
        return torch_layer(x, h0, c0, list(weights), None, directions, batch_first)
    D = 2 if directions == BOTH else 1
    per_direction = len(weights) // D
    w_ih, w_hh, *biases = [_stack(weights[n::per_direction]) for n in range(per_direction)]
    x = x.transpose(0, 1) if batch_first else x  # ORT knows the attribute `layout` only where it is 0
    T, B, H = x.shape[0], x.shape[1], w_hh.shape[-1]
    bias, sequence_lens = torch.cat(biases, 1) if biases else None, None if lengths is None else lengths.int()
    y, h_n, c_n = torch.onnx.ops.symbolic_multi_out(
        "LSTM",
        (x, w_ih, w_hh, bias, sequence_lens, h0, c0),
        {"hidden_size": H, "direction": _DIRECTIONS[directions]},
        dtypes=[x.dtype] * 3,
        shapes=[(T, D, B, H), (D, B, H), (D, B, H)],
    )
    if lengths is not None:  # a row of length 0 keeps its state; ONNX does not say so, and onnxruntime returns zeros
        h_n, c_n = (
            final if initial is None else torch.where((lengths == 0)[:, None], initial, final)
            for initial, final in ((h0, h_n), (c0, c_n))
        )
    y = y.transpose(1, 2).flatten(2)  # [T, B, D*H]
    return y.transpose(0, 1) if batch_first else y, h_n, c_n


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What `torch.export.ExportedProgram.run_decompositions` takes to put ONNX's LSTM in the place of our op."""

    def layer_forward(*arguments: Any) -> tuple[Tensor, ...]:
        empty = arguments[0].new_empty(0)
        return *layer(*(*arguments[:9], arguments[9] > 0)), empty, empty

    return {torch.ops.lstm_ext.layer_forward.default: layer_forward}
