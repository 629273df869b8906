"""Fused LSTM layers and cells for PyTorch and NumPy, as drop-ins for `torch.nn.LSTM` and `torch.nn.LSTMCell`.

The functions work on NumPy arrays, torch tensors and, by DLPack, on the arrays of other libraries such as JAX; the
modules need torch, imported at their first use.

    LSTM, LSTMCell             in the place of torch's, with lengths, resets and cells        torch
    BasicLSTMCell, dynamic_rnn TensorFlow 1's cell, and its loop over one                     torch
    LayerNormBasicLSTMCell     its cell with layer normalisation; MultiRNNCell stacks cells   torch
    replace_lstm, to_torch     put our modules into a model, and torch's back                 torch
    freeze                     pack weights once, for inference; streams that keep their state torch
    lstm, lstm_cell            the functions underneath: one layer, one step
    convert                    weights from and to TensorFlow, Keras, Flax, ONNX and others
    onnx, ops                  for programs that are exported already                         torch
    backends, use_backend      what can compute here, and which of it does
    build_info, plan           how this was built; how a layer would run, and why so
    tune                       measure which way is fastest on this GPU                       torch
    set_sm_margin              leave multiprocessors of a GPU to others, such as NCCL
    testing                    cases, inputs and tolerances for tests of kernels

`python -m lstm_ext` checks this installation.

    >>> import numpy as np
    >>> import lstm_ext
    >>> x, w_ih, w_hh = np.ones((50, 16, 28)), np.ones((4 * 64, 28)), np.ones((4 * 64, 64))
    >>> y, (h_n, c_n) = lstm_ext.lstm(x, None, w_ih, w_hh)
    >>> y.shape, h_n.shape, c_n.shape
    ((50, 16, 64), (16, 64), (16, 64))
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__
from .engines import backends, build_info, use_backend
from .functional import lstm, lstm_cell
from .plans import Plan, plan, set_sm_margin

if TYPE_CHECKING:
    from . import convert as convert
    from . import onnx as onnx
    from . import ops as ops
    from . import testing as testing
    from .freezing import freeze
    from .frozen import FrozenLSTM, FrozenLSTMCell, FrozenTensorFlowCell, Stream
    from .nn import LSTM, LSTMCell
    from .swap import replace_lstm, to_torch
    from .tensorflow import BasicLSTMCell, LayerNormBasicLSTMCell, LSTMStateTuple, MultiRNNCell, dynamic_rnn
    from .tuning import tune

__all__ = [
    "LSTM",
    "BasicLSTMCell",
    "FrozenLSTM",
    "FrozenLSTMCell",
    "FrozenTensorFlowCell",
    "LSTMCell",
    "LSTMStateTuple",
    "LayerNormBasicLSTMCell",
    "MultiRNNCell",
    "Plan",
    "Stream",
    "backends",
    "build_info",
    "dynamic_rnn",
    "freeze",
    "lstm",
    "lstm_cell",
    "plan",
    "replace_lstm",
    "set_sm_margin",
    "to_torch",
    "tune",
    "use_backend",
]

# Imported once somebody names them.
_MODULES = frozenset({"convert", "onnx", "ops", "testing"})
_PLACES = {
    **dict.fromkeys(("LSTM", "LSTMCell"), "nn"),
    **dict.fromkeys(
        ("BasicLSTMCell", "LayerNormBasicLSTMCell", "LSTMStateTuple", "MultiRNNCell", "dynamic_rnn"), "tensorflow"
    ),
    **dict.fromkeys(("replace_lstm", "to_torch"), "swap"),
    **dict.fromkeys(("FrozenLSTM", "FrozenLSTMCell", "FrozenTensorFlowCell", "Stream"), "frozen"),
    "freeze": "freezing",
    "tune": "tuning",
}
_NEED_TORCH = {*_PLACES, "onnx", "ops"}


def _has_torch() -> bool:
    return sys.modules["torch"] is not None if "torch" in sys.modules else find_spec("torch") is not None


if not _has_torch():
    __all__ = [name for name in __all__ if name not in _NEED_TORCH]


def __getattr__(name: str) -> Any:
    if name not in _MODULES and name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        if name in _MODULES:
            return import_module(f"{__name__}.{name}")
        place = import_module(f"{__name__}.{_PLACES[name]}")
    except ImportError as error:
        text = f"lstm_ext.{name} needs PyTorch (torch>=2.11); lstm_ext.lstm works on NumPy arrays"
        if (error.name or "").partition(".")[0] != "torch":
            text = str(error)
        # `from lstm_ext import LSTM` would have words of its own for an AttributeError.
        imported = sys._getframe(1).f_code.co_name == "_handle_fromlist"
        raise (ImportError if imported else AttributeError)(text) from error
    globals()[name] = getattr(place, name)
    return globals()[name]


def __dir__() -> list[str]:
    public = {*__all__, *(_MODULES if _has_torch() else _MODULES - _NEED_TORCH)}
    return sorted({*public, *(name for name in globals() if name.startswith("__"))})
