"""`lstm_ext.reference` as a backend: slow, and there wherever Python is. Tensors go through it as views."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from .. import reference
from ..call import CallTuple, GradsTuple, LayerCall, Needs, OutputGrads, OutputsTuple, Save, Saved
from ..checks import check, check_backward, is_tensor


def _takes(call: CallTuple, *others: Any) -> bool:
    """Whether all are exactly tensors or exactly ndarrays: a subclass means more than its memory."""
    types = {type(a) for a in (*call[:3], *call[3], *call[4:7], call[10], *others) if a is not None}
    torch = sys.modules.get("torch")
    return types == {np.ndarray} or (torch is not None and types <= {torch.Tensor, torch.nn.Parameter})


def _array(a: Any) -> Any:
    """A tensor as an array that views its memory; NumPy has no bfloat16, float32 stands in."""
    if not is_tensor(a):
        return a
    a = a.detach().resolve_neg()
    return (a.float() if str(a.dtype) == "torch.bfloat16" else a).numpy()


def _like(x: Any, a: Any, wide: bool = False) -> Any:
    """An array as what x is, in its dtype or, if `wide`, in what its half types compute in."""
    if a is None or not is_tensor(x):
        return a
    torch = sys.modules["torch"]
    return torch.from_numpy(a).to(torch.promote_types(x.dtype, torch.float32) if wide else x.dtype)


def _arrays(call: LayerCall) -> LayerCall:
    """The call with arrays in native byte order and for lengths of 64 bits."""
    call = call.map(_array)
    if call.lengths is not None:
        call = call._replace(lengths=np.asarray(call.lengths, np.int64))
    return call


def forward(call: CallTuple, save: Save) -> OutputsTuple:
    """See `engines.Engine`."""
    if not _takes(call):
        return NotImplemented
    asked = LayerCall(*call)
    check(asked)
    y, h_n, c_n, cells, gates = reference.layer_forward(_arrays(asked), save)
    x = asked.x
    return _like(x, y), _like(x, h_n), _like(x, c_n), _like(x, cells, wide=True), _like(x, gates)


def backward(call: LayerCall, saved: Saved, grads: OutputGrads, needs: Needs) -> GradsTuple:
    """See `engines.Engine`."""
    if not _takes(call, *saved, *grads):
        return NotImplemented
    check(call)
    check_backward(call, saved, grads)
    taken = Saved(*map(_array, saved)), OutputGrads(*map(_array, grads))
    dx, dh0, dc0, dweights = reference.layer_backward(_arrays(call), *taken, needs)
    own = None if dweights is None else [_like(call.x, dw) for dw in dweights]
    return _like(call.x, dx), _like(call.x, dh0), _like(call.x, dc0), own


def way(_call: LayerCall, _backward: bool) -> str:
    """How a pass runs, in words."""
    return "step by step in NumPy"
