"""Fused LSTM layers and cells for PyTorch and NumPy, as drop-ins for `torch.nn.LSTM` and `torch.nn.LSTMCell`.

The functions work on NumPy arrays, torch tensors and, by DLPack, on the arrays of other libraries such as JAX; the
modules need torch, imported at their first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__
from .engines import backends, build_info, use_backend
from .functional import lstm, lstm_cell
from .plans import Plan, plan

if TYPE_CHECKING:
    from .nn import LSTM, BasicLSTMCell, LSTMCell, LSTMStateTuple
    from .swap import replace_lstm, to_torch

__all__ = [
    "LSTM",
    "BasicLSTMCell",
    "LSTMCell",
    "LSTMStateTuple",
    "Plan",
    "backends",
    "build_info",
    "lstm",
    "lstm_cell",
    "plan",
    "replace_lstm",
    "to_torch",
    "use_backend",
]

_NEED_TORCH = {
    **dict.fromkeys(("LSTM", "BasicLSTMCell", "LSTMCell", "LSTMStateTuple"), "nn"),
    **dict.fromkeys(("replace_lstm", "to_torch"), "swap"),
}


_MODULES = frozenset({"convert", "onnx", "ops", "testing"})  # public ones, imported once somebody names them


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f"{__name__}.{_NEED_TORCH[name]}")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            f"lstm_ext.{name} needs PyTorch (torch>=2.11); lstm_ext.lstm works on NumPy arrays"
        ) from error
    globals()[name] = getattr(module, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
