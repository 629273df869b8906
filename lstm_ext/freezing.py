"""`freeze`: makes frozen modules of others, and copies of models with all of theirs frozen."""

from __future__ import annotations

import copy
import warnings
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules import rnn as torch_rnn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from . import nn
from .call import FORWARD, LayerCall
from .cell import Cell, Norm
from .frozen import Frozen, FrozenLSTM, FrozenLSTMCell, FrozenTensorFlowCell
from .frozen_stack import WEIGHTS, Spec, Stack, quantized, run_layers
from .swap import plain_class
from .tensorflow import TensorFlowCell

M = TypeVar("M", bound=Module)

_CLASSES: tuple[Any, ...] = (torch_rnn.LSTM, torch_rnn.LSTMCell, nn.LSTM, nn.LSTMCell, TensorFlowCell)


@overload
def freeze(module: torch_rnn.LSTM | nn.LSTM, weights: str | None = None) -> FrozenLSTM: ...
@overload
def freeze(module: torch_rnn.LSTMCell, weights: str | None = None) -> FrozenLSTMCell: ...
@overload
def freeze(module: TensorFlowCell, weights: str | None = None) -> FrozenTensorFlowCell: ...
@overload
def freeze(module: M, weights: str | None = None) -> M: ...
def freeze(module: Module, weights: str | None = None) -> Any:
    """For inference: the same computation with its weights packed once, for the CPU.

    Args:
        module: `torch.nn.LSTM`, `LSTMCell`, those of lstm_ext, `BasicLSTMCell` or `LayerNormBasicLSTMCell`; or a
            model, of which a copy is made in which all such modules are frozen, and which is in `eval()` mode. All
            are taken as in that mode: without dropouts. What is frozen already stays as it is.
        weights: how the matrices are stored: "float32", "bfloat16" or "int8" (with a scale for each row of weights,
            h and x as integers of up to 16 bits, x of 128 inputs and more of 8, sums in int32, gates in float32); x,
            the state and the output are float32 then. None is the dtype of the module.

    Returns:
        A `FrozenLSTM`, `FrozenLSTMCell` or `FrozenTensorFlowCell`; or the copy of the model. Where the weights cannot
        be packed (on a GPU, without compiled kernels) it keeps them all the same and runs the ordinary engines, and
        its `engine` says so.

    Raises:
        TypeError: not a module, or one that cannot be frozen.
        ValueError: an unknown kind of weights; int8 of weights with NaN; int8 or bfloat16 on a GPU, whose kernels
            multiply what x is; a frozen module that has other weights; weights without contents, on the meta device.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.LSTM(28, 64))
        >>> lstm_ext.freeze(model)[0].engine
        'cpu, packed float32'
    """
    if not isinstance(module, Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    if weights is not None and weights not in WEIGHTS:
        raise ValueError(f"weights: expected None, {', '.join(map(repr, WEIGHTS))}, got {weights!r}")
    if isinstance(module, Frozen):
        if obstacle := _other_weights(module, weights):
            raise ValueError(f"weights: expected those that it has: {obstacle}")
        return module
    if isinstance(module, _CLASSES):
        if obstacle := _obstacle(module):
            raise TypeError(f"module: expected one that can be frozen: {obstacle}")
        alone = _freeze_one(module, weights)
        _copy_hooks(module, alone, None)
        return alone
    memo: dict[int, Any] = {}
    found = False
    for path, each in module.named_modules():
        is_frozen = isinstance(each, Frozen)
        if not is_frozen and (not isinstance(each, _CLASSES) or id(each) in memo):
            continue
        if obstacle := _other_weights(each, weights) if is_frozen else _obstacle(each):
            warnings.warn(f"freeze leaves {path} alone: {obstacle}", stacklevel=2)
        elif not is_frozen:
            memo[id(each)] = _freeze_one(each, weights)
        found |= is_frozen or not obstacle
    if not found:
        warnings.warn(f"freeze found no LSTM to freeze in {type(module).__name__}", stacklevel=2)
    frozen_ones = [(each, memo[id(each)]) for each in module.modules() if id(each) in memo]
    frozen = copy.deepcopy(module, memo).eval()
    for each, its in frozen_ones:
        _copy_hooks(each, its, memo)
    return frozen


def _other_weights(frozen: Frozen, weights: str | None) -> str:
    """Why a frozen module cannot have these; "" if it has them."""
    if weights is None or weights == frozen.weights:
        return ""
    return f"it is frozen with weights {frozen.weights!r} already: freeze the module that it was made from"


def _obstacle(module: Module) -> str:
    """Why a module cannot be frozen; "" if it can."""
    cls = plain_class(module)
    if cls.__module__.partition(".")[0] not in ("torch", "lstm_ext"):
        return f"{cls.__name__} is a subclass, which may compute something else"
    if "forward" in vars(module):
        return "its forward method was replaced"
    if isinstance(module, TensorFlowCell):
        if module.has_uninitialized_params():
            return "its weights are not made yet: call it once, or give input_size"
        if module._cells[0] is None:
            return f"its activation is a function of its own: {module.activation!r}"
    return ""


def _cell_of_module(module: Any) -> Cell | None:
    """What it computes without training, in torch's layout of weights; None is the plain LSTM."""
    if isinstance(module, TensorFlowCell):
        cell: Cell | None = module._cells[0]
        assert cell is not None
        return cell._replace(tensorflow=False, candidate_dropout=0.0).simplified()
    options = getattr(module, "_options", None)
    return None if options is None else options.cells[0]


def _weights_of(module: Any) -> list[list[Tensor]]:
    """The weights of each layer and direction, in torch's layout."""
    if isinstance(module, TensorFlowCell):
        call = LayerCall(None, None, None, module._weights(), None, None, None, FORWARD, False, module._cells[0])
        w = call.split_cell()[0]
        w = w._replace(b_hh=w.w_ih.new_zeros(len(w.w_ih)))  # torch has two biases
        return [[a for a in w if a is not None]]
    if isinstance(module, torch_rnn.LSTMCell):
        own = nn.LSTMCell._weights(module)  # type: ignore[arg-type]
        extra = getattr(module, "_options", None)
        return [[*own, *(getattr(module, name) for name in (extra.extra_weights if extra else ()))]]
    return [[getattr(module, name) for name in names] for names in module._all_weights]


@torch.no_grad()
def _freeze_one(module: Any, weights: str | None) -> Frozen:
    _make_weights(module)
    own = _weights_of(module)[0][0]
    dtype = _dtype_of(own, weights)
    cell, flat = _plain(module, dtype)
    spec = _spec_of(module, cell, flat, weights or _name(dtype))
    tensors = _stored(spec, flat)
    exact = torch.promote_types(own.dtype, dtype)
    error = _error_of(spec, tensors, flat if exact == dtype else _plain(module, exact)[1], exact)
    classes = {"LSTM": FrozenLSTM, "LSTMCell": FrozenLSTMCell, "TensorFlowCell": FrozenTensorFlowCell}
    return classes[spec.kind](spec, tensors, error)


# Hooks before a call that make the weights, each from parameters of its own.
_MAKERS = (BasePruningMethod, SpectralNorm, WeightNorm)
_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_PRE_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")


def _makers(module: Module) -> dict[int, Any]:
    """Those of a module."""
    return {key: hook for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _MAKERS)}


def _make_weights(module: Module) -> None:
    """As a call would, in eval."""
    makers, training = _makers(module), module.training
    module.training = False  # of itself alone: they ask nothing else
    try:
        for hook in makers.values():
            hook(module, ())
    finally:
        module.training = training


def _copy_hooks(module: Any, frozen: Frozen, memo: dict[int, Any] | None) -> None:
    """All but those that made its weights. With a memo they are copied as the model is, else they are the same."""
    left_out = set(_makers(module))
    if lazy := getattr(module, "_initialize_hook", None):
        left_out.add(lazy.id)
    for name in (*_HOOKS, *_PRE_HOOKS):
        kept = {key: hook for key, hook in getattr(module, name).items() if name in _HOOKS or key not in left_out}
        getattr(frozen, name).update(kept if memo is None else copy.deepcopy(kept, memo))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype_of(own: Tensor, weights: str | None) -> torch.dtype:
    """That of x, if a module with weights like `own` is frozen so."""
    if own.device.type == "meta":
        raise ValueError("module: expected weights with contents, got some on the meta device")
    if weights is None or weights == _name(own.dtype):
        return own.dtype
    if weights != "float32" and own.device.type != "cpu":
        way = "module.bfloat16()" if weights == "bfloat16" else "module.cpu()"
        raise ValueError(
            f"weights: expected those of the module on {own.device}, where kernels multiply numbers of one dtype, got "
            f"{weights!r}: freeze {way}"
        )
    return torch.float32


def _plain(module: Any, dtype: torch.dtype) -> tuple[Cell | None, list[Tensor]]:
    """What a module computes, and copies of its weights; a forget bias, which counts at each step, is in its bias."""
    cell, by_direction = _cell_of_module(module), _weights_of(module)
    copies = [[a.detach().to(dtype, copy=True).contiguous() for a in w] for w in by_direction]
    if cell is not None and cell.forget_bias and _has_bias(module) and cell.norm == Norm.NONE:
        H = copies[0][1].shape[0] // 4
        for w in copies:
            w[2][H : 2 * H] += cell.forget_bias
        cell = cell._replace(forget_bias=0.0).simplified()
    return cell, [a for w in copies for a in w]


def _has_bias(module: Any) -> bool:
    return isinstance(module, TensorFlowCell) or bool(module.bias)


def _spec_of(module: Any, cell: Cell | None, flat: list[Tensor], weights: str) -> Spec:
    tensorflow, is_cell = isinstance(module, TensorFlowCell), not isinstance(module, torch_rnn.RNNBase)
    return Spec(
        kind="TensorFlowCell" if tensorflow else "LSTMCell" if is_cell else "LSTM",
        input_size=flat[0].shape[1],
        hidden_size=flat[1].shape[0] // 4,
        num_layers=1 if is_cell else module.num_layers,
        bidirectional=not is_cell and module.bidirectional,
        bias=_has_bias(module),
        proj_size=0 if is_cell else module.proj_size,
        batch_first=not is_cell and module.batch_first,
        dtype=_name(flat[0].dtype),
        weights=weights,
        cell=None if cell is None else tuple(float(number) for number in cell),
        extra=() if cell is None else cell.extra_weights,
        state_is_tuple=not tensorflow or module.state_is_tuple,
    )


def _stored(spec: Spec, flat: list[Tensor]) -> list[Tensor]:
    """The weights in the order of `spec.names()`, as they are stored."""
    if not spec.narrow:
        return flat
    names = [name for name in spec.names() if "_scale" not in name]
    stored: list[Tensor] = []
    for name, a in zip(names, flat, strict=True):
        if not name.startswith("weight"):
            stored.append(a)
        elif spec.weights == "int8":
            stored += quantized(name, a)
        else:
            stored.append(a.to(torch.bfloat16))
    return stored


def _error_of(spec: Spec, tensors: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> float:
    """The largest difference to the output with the weights of the module, on some random sequences."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, spec.input_size) if spec.kind != "LSTM" else (8, 2, spec.input_size)
    x = torch.randn(shape, generator=generator, device="cpu").to(exact[0].device, getattr(torch, spec.dtype))
    call = LayerCall(x, None, None, [], None, None, None, FORWARD, False)
    expected = run_layers(call._replace(x=x.to(dtype)), exact, spec._replace(dtype=_name(dtype)))[0]
    difference = (Stack(spec, tensors).run(call)[0] - expected).abs()
    return float(difference.max()) if difference.numel() else 0.0
