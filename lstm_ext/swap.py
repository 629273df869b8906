"""`replace_lstm` and `to_torch`: a module changes its class and stays the same object, with all that refers to it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, overload

from torch.nn import Module
from torch.nn.modules import rnn as torch_rnn
from torch.nn.utils import parametrize

from . import nn
from .tensorflow import TensorFlowCell

M = TypeVar("M", bound=Module)

_logger = logging.getLogger("lstm_ext")


class LSTM(nn.LSTM, torch_rnn.LSTM):
    """What `replace_lstm` makes of a `torch.nn.LSTM`: `lstm_ext.LSTM`, and still an instance of torch's class.

    torch.compile takes no instance of torch's class into a graph, unless `torch._dynamo.config.allow_rnn` is set: it
    breaks the graph there, and our kernel runs between the two parts.
    """


_OURS: dict[type[Module], type[Module]] = {torch_rnn.LSTM: LSTM, torch_rnn.LSTMCell: nn.LSTMCell}
_COMPILABLE: dict[type[Module], type[Module]] = {**_OURS, torch_rnn.LSTM: nn.LSTM, LSTM: nn.LSTM}
_TORCHS: dict[type[Module], type[Module]] = {
    LSTM: torch_rnn.LSTM,
    nn.LSTM: torch_rnn.LSTM,
    nn.LSTMCell: torch_rnn.LSTMCell,
}


@overload
def replace_lstm(module: torch_rnn.LSTM, *, compilable: Literal[False] = False) -> LSTM: ...
@overload
def replace_lstm(module: torch_rnn.LSTM, *, compilable: bool) -> nn.LSTM: ...
@overload
def replace_lstm(module: torch_rnn.LSTMCell, *, compilable: bool = False) -> nn.LSTMCell: ...
@overload
def replace_lstm(module: M, *, compilable: bool = False) -> M: ...
def replace_lstm(module: Module, *, compilable: bool = False) -> Module:
    """Makes each `torch.nn.LSTM` and `torch.nn.LSTMCell` inside `module` one of ours.

    They stay the same objects, with their Parameters, hooks, parametrizations and pruning masks: what refers to them
    elsewhere goes on to. They stay instances of torch's classes too. A warning names what is left alone (subclasses,
    modules whose forward method was replaced), or says that there was nothing to replace. The logger "lstm_ext" tells
    each replacement at the level INFO.

    Args:
        module: a model, or one such module.
        compilable: make them `lstm_ext.LSTM`, which `torch.compile(fullgraph=True)` takes and which is no instance of
            `torch.nn.LSTM`. `LSTMCell` is both.

    Returns:
        `module`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.LSTM(28, 64))
        >>> lstm = lstm_ext.replace_lstm(model)[0]
        >>> isinstance(lstm, lstm_ext.LSTM), isinstance(lstm, torch.nn.LSTM)
        (True, True)
    """
    return _swap("replace_lstm", module, _COMPILABLE if compilable else _OURS)


@overload
def to_torch(module: nn.LSTM) -> torch_rnn.LSTM: ...
@overload
def to_torch(module: nn.LSTMCell) -> torch_rnn.LSTMCell: ...
@overload
def to_torch(module: M) -> M: ...
def to_torch(module: Module) -> Module:
    """The way back from `replace_lstm`: each `LSTM` and `LSTMCell` of ours becomes torch's own, the same object still.

    All is warned of and logged as there. A `BasicLSTMCell`, for which torch has no module, is left alone. Calls that
    give `lengths`, `resets` or `return_cells` fail afterwards.

    Returns:
        `module`.

    Example:
        >>> type(lstm_ext.to_torch(lstm_ext.LSTM(28, 64))) is torch.nn.LSTM
        True
    """

    def why_not(each: Module) -> str:
        return f"torch has no {type(each).__name__}" if isinstance(each, TensorFlowCell) else ""

    return _swap("to_torch", module, _TORCHS, why_not)


def plain_class(module: Module) -> type[Module]:
    """The class of a module; of a parametrized one, the class that it had before."""
    cls = type(module)
    return cls.__bases__[0] if parametrize.is_parametrized(module) else cls


def _change_class(module: Module, cls: type[Module]) -> None:
    if isinstance(module, torch_rnn.RNNBase):
        module._update_flat_weights()  # from here on writes to the list count
        vars(module).pop("_customised", None)
    if parametrize.is_parametrized(module):  # its class, made for it alone, has a property per parametrized tensor
        own = {name: value for name, value in vars(type(module)).items() if name not in ("__dict__", "__weakref__")}
        cls = type(type(module).__name__, (cls,), own)
    module.__class__ = cls
    if isinstance(module, nn.LSTM) and not vars(module).keys().isdisjoint(nn.ASKED):
        module._customised = True


def _obstacle(module: Module, classes: Mapping[type[Module], type[Module]]) -> str:
    """Why a module that is nearly one to replace is left alone; "" if it is none, or nothing is in the way."""
    cls = plain_class(module)
    if cls in classes.values():
        return ""
    if cls not in classes:
        base = next((base for base in classes if issubclass(cls, base)), None)
        return f"{cls.__name__} is a subclass of {_full_name(base)}" if base else ""
    if isinstance(module, (nn.LSTM, nn.LSTMCell)) and module._options and module._options.changing:
        return f"torch has no {', '.join(module._options.changing)}"
    return "its forward method was replaced" if "forward" in vars(module) else ""


def _full_name(cls: type[Module]) -> str:
    package = cls.__module__.partition(".")[0]
    return f"{package}.nn.{cls.__name__}" if package == "torch" else f"{package}.{cls.__name__}"


def _swap(
    who: str,
    root: Module,
    classes: Mapping[type[Module], type[Module]],
    why_not: Callable[[Module], str] = lambda module: "",
) -> Module:
    """Gives each module of a class in `classes` the class that stands there.

    Args:
        who: the function that the messages name.
        root: the model.
        classes: what exactly which class becomes.
        why_not: says why a module of another class is left alone, if that is to be told.

    Returns:
        `root`.
    """
    paths: dict[Module, list[str]] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path or "the module itself")
    replaced, told = 0, False
    for module, where in paths.items():
        cls: Any = classes.get(plain_class(module))
        if obstacle := _obstacle(module, classes) or why_not(module):
            warnings.warn(f"{who} leaves {', '.join(where)} alone: {obstacle}", stacklevel=3)
            told = True
        elif cls is not None:
            _change_class(module, cls)
            replaced += 1
            _logger.info("%s: %s is now %s(%s)", who, ", ".join(where), _full_name(cls), module.extra_repr())
    _logger.info("%s: %d module%s replaced", who, replaced, "" if replaced == 1 else "s")
    if not (replaced or told or any(plain_class(module) in classes.values() for module in paths)):
        names = " and no ".join(dict.fromkeys(map(_full_name, classes)))
        warnings.warn(f"{who} found no {names} in {type(root).__name__}", stacklevel=3)
    return root
