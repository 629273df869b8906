"""A layer for ONNX: one standard `LSTM` node, both directions in it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .._torch_private import constant_to_compilers
from ..call import BOTH, FORWARD, REVERSE, CellWeights, LayerCall, Outputs, Save
from ..cell import PLAIN, Activation, Cell, Norm
from ..checks import check
from . import stock

_DIRECTIONS = {FORWARD: "forward", REVERSE: "reverse", BOTH: "bidirectional"}


@constant_to_compilers
def is_exporting() -> bool:
    """`torch.onnx.is_in_onnx_export`, which strict tracing takes for False; who exports has imported it."""
    if "torch.onnx" not in sys.modules:
        return False
    import torch.onnx  # which waits where another thread is just doing so

    return torch.onnx.is_in_onnx_export()


def _refuse(call: LayerCall, save: Save) -> None:
    """An error for what an ONNX LSTM cannot do."""
    for name, given, expected in (
        *_refused_options(call.cell or PLAIN),
        ("proj_size", call.projected, "0"),
        ("resets", call.resets is not None, "None"),
        ("return_cells", save > Save.NOTHING, "False"),
        ("input", call.batch_sizes is not None, "a padded sequence, with lengths, and not a packed one"),
    ):
        if given:
            raise NotImplementedError(f"{name}: expected {expected}, since the LSTM of ONNX has nothing like it")


def _refused_options(cell: Cell) -> list[tuple[str, bool, str]]:
    """Of a cell: ONNX's clip cuts what an activation is given, and its gate i is the one that f is coupled to."""
    same = cell.recurrent_activation == Activation.SIGMOID or (
        cell.recurrent_activation == Activation.HARD_SIGMOID and cell.recurrent_beta == 0.5
    )
    return [
        ("cell_clip", cell.cell_clip > 0, "None"),
        ("layer_norm", cell.norm != Norm.NONE, "False"),
        ("zoneout", cell.zoneout_h > 0 or cell.zoneout_c > 0, "0"),
        ("recurrent_dropout, candidate_dropout", cell.draws, "module.eval()"),
        ("coupled, recurrent_activation", cell.coupled and not same, "sigmoid, or hard_sigmoid with beta = 0.5"),
    ]


# The names in ONNX, and how many parameters each takes.
_ACTIVATIONS = {
    Activation.TANH: ("Tanh", 0),
    Activation.SIGMOID: ("Sigmoid", 0),
    Activation.HARD_SIGMOID: ("HardSigmoid", 2),
    Activation.RELU: ("Relu", 0),
    Activation.LEAKY_RELU: ("LeakyRelu", 1),
    Activation.ELU: ("Elu", 1),
    Activation.SOFTSIGN: ("Softsign", 0),
    Activation.SOFTPLUS: ("Softplus", 0),
    Activation.LINEAR: ("Affine", 2),
}


def _attributes(cell: Cell, num_directions: int) -> dict[str, Any]:
    """What the node says of a cell; nothing for the plain one."""
    if cell == PLAIN:
        return {}
    names, alphas, betas = [], [], []
    for kind, alpha, beta in (cell[3:6], cell[:3], cell[:3]):  # of the gates, of g, of c
        name, count = _ACTIVATIONS[kind]
        names.append(name)
        of_line = kind == Activation.LINEAR
        alphas += [1.0 if of_line else alpha] * (count > 0)
        betas += [0.0 if of_line else beta] * (count > 1)
    found: dict[str, Any] = {"activations": names * num_directions}
    found |= {"activation_alpha": alphas * num_directions} if alphas else {}
    found |= {"activation_beta": betas * num_directions} if betas else {}
    return found | {"input_forget": 1} if cell.coupled else found


def _as_onnx(w: CellWeights, cell: Cell) -> CellWeights:
    """With the forget bias in b_ih, and where the gates are coupled i as the one that f follows: 1 - f of ours."""
    if not (cell.forget_bias or cell.coupled or w.peephole is not None):
        return w
    H = w.w_hh.shape[0] // 4
    b_ih = w.w_hh.new_zeros(4 * H) if w.b_ih is None else w.b_ih
    b_hh = torch.zeros_like(b_ih) if w.b_hh is None else w.b_hh
    i, f, *others = b_ih.split(H)
    b_ih = torch.cat([i, f + cell.forget_bias, *others])
    if not cell.coupled:
        return w._replace(b_ih=b_ih, b_hh=b_hh)

    def turned(a: Tensor) -> Tensor:
        _, f, *others = a.split(H)
        return torch.cat([-f, f, *others])

    p = w.peephole if w.peephole is None else torch.stack([-w.peephole[1], w.peephole[1], w.peephole[2]])
    return CellWeights(turned(w.w_ih), turned(w.w_hh), turned(b_ih), turned(b_hh), peephole=p)


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
        if call.lengths is not None or call.directions == REVERSE or call.cell is not None:
            raise NotImplementedError("lengths, reverse, options: expected torch.onnx.export with dynamo=True")
        return stock.forward(call, save)
    cell = call.cell or PLAIN
    split = [_as_onnx(w, cell) for w in call.split_cell()]
    w_ih, w_hh = _stack([w.w_ih for w in split]), _stack([w.w_hh for w in split])
    bias = None
    # [D, 3H], in the order i, o, f
    peepholes = [w.peephole[[0, 2, 1]].flatten() for w in split if w.peephole is not None]
    if split[0].b_ih is not None:
        bias = torch.cat([_stack([w.b_ih for w in split]), _stack([w.b_hh for w in split])], 1)
    x = call.x.transpose(0, 1) if call.batch_first else call.x  # ORT knows the attribute `layout` only where it is 0
    T, B, D, H = x.shape[0], x.shape[1], call.num_directions, w_hh.shape[-1]
    y, h_n, c_n = torch.onnx.ops.symbolic_multi_out(
        "LSTM",
        (x, w_ih, w_hh, bias, None if call.lengths is None else call.lengths.int(), call.h0, call.c0)
        + ((torch.stack(peepholes),) if peepholes else ()),
        {"hidden_size": H, "direction": _DIRECTIONS[call.directions], **_attributes(cell, D)},
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
