"""The layer as torch sees it: custom ops with shape, autograd and vmap rules, and the short path for plain CPU tensors.

A layer that no transform, mode or compiler watches goes straight to the backend (with gradients: through one
`autograd.Function`). Everything else goes through the ops `lstm_ext::layer_forward` and `lstm_ext::layer_backward`.
Derivatives beyond the first differentiate `composed_layer`, the same layer in torch's own operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _is_any_autocast_enabled, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import TransformType, get_interpreter_stack, is_legacy_batchedtensor, peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter

from . import _native, reference
from .backend import choose, warn_once
from .composed import HALF, composed_layer, torch_layer
from .functional import check, check_cell, check_kind, weight_names
from .reference import BOTH, FORWARD, NEEDS_C0, NEEDS_H0, NEEDS_WEIGHTS, NEEDS_X, REVERSE

_REFUSALS = (TypeError, ValueError, RuntimeError)  # what the native core raises for arguments it does not take
_NOT_TENSORS = (*_REFUSALS, AttributeError)
_PLAIN = frozenset({Tensor, Parameter, NoneType})
DTYPES = HALF | {torch.float32, torch.float64}
_INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})

if not hasattr(Tensor, "__dlpack_c_exchange_api__"):
    raise ImportError(f"lstm_ext needs torch 2.11 or newer for tensors, got {torch.__version__}")

_C: Any = _native.C
if _C is not None:
    _C.take_tensor_types(Tensor, Parameter)
    _C.share_openmp_threads("libtorch_cpu.so")

_get_num_threads = torch.get_num_threads
_is_grad_enabled = torch.is_grad_enabled


# Backends on plain CPU tensors ---------------------------------------------------------------------------------------


def _as_int64(lengths: Tensor, x: Tensor) -> Tensor:
    """Integer lengths as the backends take them; other dtypes as they are, for the checks to refuse."""
    return lengths.to(x.device, torch.int64) if lengths.dtype in _INTEGERS else lengths


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any([a is not None and a.requires_grad for a in tensors])  # noqa: C419 (a list is faster than a generator)


def _to_numpy(a: Tensor | None) -> Any:
    """A view as an array; NumPy has no bfloat16, float32 stands in."""
    if a is None:
        return None
    a = a.detach().resolve_neg()
    return (a.float() if a.dtype == torch.bfloat16 else a).numpy()


def _from_numpy(a: Any, dtype: torch.dtype) -> Any:
    return None if a is None else torch.from_numpy(a).to(dtype)


def _backend_name(x: Tensor) -> str:
    choice = choose("cpu", x.dtype)
    if choice.name is None:
        raise RuntimeError(f"x: no backend takes dtype {x.dtype} ({choice.reason})")
    if choice.name == "numpy" and _native.C is None:
        warn_once(f"lstm_ext computes in NumPy, slowly: the compiled kernels are missing ({_native.reason})")
    return choice.name


def _run_forward(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    batch_sizes: Tensor | None,
    directions: int,
    batch_first: bool,
    save: int,
) -> tuple[Any, ...]:
    """(y, h_n, c_n, cells, gates) on the backend chosen; what `save` leaves out is None."""
    if _backend_name(x) == "cpu":
        try:
            return _C.layer_forward(
                *(x, h0, c0, weights, lengths, resets, batch_sizes, directions, batch_first, save),
                _get_num_threads(),
            )
        except _REFUSALS:
            check(x, h0, c0, weights, lengths, resets, batch_sizes, directions, batch_first)
            raise
    check(x, h0, c0, weights, lengths, resets, batch_sizes, directions, batch_first)
    arrays = [_to_numpy(a) for a in (x, h0, c0, lengths, resets, batch_sizes)]
    y, h_n, c_n, cells, gates = reference.layer_forward(
        *(*arrays[:3], [_to_numpy(w) for w in weights], *arrays[3:], directions, batch_first, save)
    )
    kept = torch.float32 if x.dtype in HALF else x.dtype
    return *(_from_numpy(a, x.dtype) for a in (y, h_n, c_n)), _from_numpy(cells, kept), _from_numpy(gates, x.dtype)


def _run_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dcells: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    y: Tensor,
    cells: Tensor,
    gates: Tensor,
    lengths: Tensor | None,
    resets: Tensor | None,
    batch_sizes: Tensor | None,
    directions: int,
    batch_first: bool,
    needs: int,
) -> tuple[Any, Any, Any, list[Tensor] | None]:
    """(dx, dh0, dc0, dweights) on the backend chosen; None for what is not needed."""
    tensors = (dy, dh_n, dc_n, dcells, x, h0, c0, weights, y, cells, gates, lengths, resets, batch_sizes)
    if _backend_name(x) == "cpu":
        return _C.layer_backward(*tensors, directions, batch_first, needs, _get_num_threads())
    arrays = ([_to_numpy(w) for w in a] if isinstance(a, list) else _to_numpy(a) for a in tensors)
    arguments: tuple[Any, ...] = (*arrays, directions, batch_first, needs)
    dx, dh0, dc0, dweights = reference.layer_backward(*arguments)
    given = None if dweights is None else [_from_numpy(a, x.dtype) for a in dweights]
    return *(_from_numpy(a, x.dtype) for a in (dx, dh0, dc0)), given


def _plain(arguments: Sequence[Any]) -> list[Any]:
    """The arguments with tensors of subclasses as the plain tensors that they are here, below all dispatch."""

    def plain(a: Any) -> Any:
        if isinstance(a, (list, tuple)):
            return [plain(b) for b in a]
        return a.as_subclass(Tensor) if isinstance(a, Tensor) and type(a) not in _PLAIN else a

    return [plain(a) for a in arguments]


# The ops -------------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "lstm_ext::layer_forward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? lengths, Tensor? resets, Tensor? batch_sizes, "
    "int directions, bool batch_first, int save) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def layer_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """`reference.layer_forward` as an op; what is not saved is an empty tensor."""
    return tuple(x.new_empty(0) if a is None else a for a in _run_forward(*_plain((x, *arguments))))


@torch.library.custom_op(
    "lstm_ext::layer_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells, Tensor x, Tensor? h0, Tensor? c0, "
    "Tensor[] weights, Tensor y, Tensor cells, Tensor gates, Tensor? lengths, Tensor? resets, Tensor? batch_sizes, "
    "int directions, bool batch_first, int needs) -> (Tensor, Tensor, Tensor, Tensor[])",
)
def layer_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """`reference.layer_backward` as an op; what is not needed is an empty tensor or list."""
    *gradients, dweights = _run_backward(*_plain(arguments))
    dx, dh0, dc0 = (arguments[4].new_empty(0) if a is None else a for a in gradients)
    return dx, dh0, dc0, dweights or []


def _batch_size(x: Tensor, batch_sizes: Tensor | None, batch_first: bool, *states: Tensor | None) -> Any:
    """B; of packed rows whichever state shows it, else what the contents of batch_sizes will be."""
    if batch_sizes is None:
        return x.shape[0 if batch_first else 1]
    for state in states:
        if state is not None:
            return state.shape[1]
    return int(batch_sizes[0]) if type(batch_sizes) is Tensor else torch.library.get_ctx().new_dynamic_size()


@layer_forward.register_fake
def _(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    batch_sizes: Tensor | None,
    directions: int,
    batch_first: bool,
    save: int,
) -> tuple[Tensor, ...]:
    D = 2 if directions == BOTH else 1
    B = _batch_size(x, batch_sizes, batch_first, h0, c0)
    check(x, h0, c0, weights, lengths, resets, batch_sizes, directions, batch_first, values=False)
    H, P = weights[1].shape[0] // 4, weights[1].shape[1]
    if len(weights) // D % 2:
        P = weights[-1].shape[0]
    rows = (x.shape[0],) if batch_sizes is not None else (x.shape[1], x.shape[0]) if batch_first else x.shape[:2]
    kept = torch.float32 if x.dtype in HALF else x.dtype
    return (
        x.new_empty(*x.shape[:-1], D * P),
        x.new_empty(D, B, P),
        x.new_empty(D, B, H),
        x.new_empty((D, *rows, H), dtype=kept) if save >= 1 else x.new_empty(0),
        x.new_empty(D, *rows, 4 * H) if save >= 2 else x.new_empty(0),
    )


@layer_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    x, weights, y, cells, needs = arguments[4], arguments[7], arguments[8], arguments[9], arguments[16]
    D, H, P = cells.shape[0], cells.shape[-1], y.shape[-1] // cells.shape[0]
    B = _batch_size(x, arguments[13], arguments[15], *arguments[5:7], *arguments[1:3])
    return (
        x.new_empty(x.shape) if needs & NEEDS_X else x.new_empty(0),
        x.new_empty(D, B, P) if needs & NEEDS_H0 else x.new_empty(0),
        x.new_empty(D, B, H) if needs & NEEDS_C0 else x.new_empty(0),
        [w.new_empty(w.shape) for w in weights] if needs & NEEDS_WEIGHTS else [],
    )


# First derivative ----------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], y: Tensor, cells: Tensor, gates: Tensor) -> None:
    x, h0, c0, weights, lengths, resets, batch_sizes, directions, batch_first = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, h0, c0, y, cells, gates, lengths, resets, batch_sizes, *weights)
    ctx.directions, ctx.batch_first = directions, batch_first


def _needs(x: bool, h0: bool, c0: bool, weights: Sequence[bool]) -> int:
    return NEEDS_X * x + NEEDS_H0 * h0 + NEEDS_C0 * c0 + NEEDS_WEIGHTS * any(weights)


def _first_derivative(
    saved: Sequence[Any],
    layout: tuple[int, bool],
    gradients: tuple[Any, ...],
    needs: int,
    backward: Callable[..., Any],
) -> tuple[Any, Any, Any, list[Any] | None]:
    """(dx, dh0, dc0, dweights) from those of y, h_n, c_n and cells; `saved` and `layout` are what `_save` keeps."""
    x, h0, c0, y, cells, gates, lengths, resets, batch_sizes, *weights = saved
    masks = (lengths, resets, batch_sizes, *layout)
    if gates.dim() == 1:  # the forward was not asked to save
        cells, gates = layer_forward(x, h0, c0, weights, *masks, 2)[3:]
    dx, dh0, dc0, dweights = backward(*gradients, x, h0, c0, weights, y, cells, gates, *masks, needs)
    return (
        dx if needs & NEEDS_X else None,
        dh0 if needs & NEEDS_H0 else None,
        dc0 if needs & NEEDS_C0 else None,
        dweights if needs & NEEDS_WEIGHTS else None,
    )


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    y, _, _, cells, gates = output
    _save(ctx, inputs[:9], y, cells, gates)
    ctx.mark_non_differentiable(gates, *([cells] if cells.dim() == 1 else []))


def _backward_of_forward(ctx: Any, dy: Any, dh_n: Any, dc_n: Any, dcells: Any, _: Any) -> tuple[Any, ...]:
    needs = _needs(*ctx.needs_input_grad[:4])
    dx, dh0, dc0, dweights = _first_derivative(
        ctx.saved_tensors, (ctx.directions, ctx.batch_first), (dy, dh_n, dc_n, dcells), needs, layer_backward
    )
    return dx, dh0, dc0, dweights or [None] * len(ctx.needs_input_grad[3]), *[None] * 6


layer_forward.register_autograd(_backward_of_forward, setup_context=_setup_forward)


class _Layer(torch.autograd.Function):
    """The short path with gradients: (y, h_n, c_n, cells)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        batch_sizes: Tensor | None,
        directions: int,
        batch_first: bool,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        inputs = (x, h0, c0, list(weights), lengths, resets, batch_sizes, directions, batch_first)
        y, h_n, c_n, cells, gates = _run_forward(*inputs, 2)
        _save(ctx, inputs, y, cells, gates)
        return y, h_n, c_n, cells

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        needed = (*ctx.needs_input_grad[:3], *ctx.needs_input_grad[8:])
        layout = (ctx.directions, ctx.batch_first)
        dx, dh0, dc0, *dweights = _short_derivative(ctx.saved_tensors, layout, gradients, needed)
        return dx, dh0, dc0, None, None, None, None, None, *dweights


def _short_derivative(
    saved: Sequence[Any], layout: tuple[int, bool], gradients: tuple[Any, ...], needed: tuple[bool, ...]
) -> list[Any]:
    """[dx, dh0, dc0, *dweights], None where not needed, straight from the backend if nothing watches."""
    if any([g is not None and is_legacy_batchedtensor(g) for g in gradients]):  # noqa: C419
        return _derivative_of_composed(saved, layout, gradients, needed)
    plain = not _is_grad_enabled() and _watched_by_nobody()
    needs = _needs(needed[0], needed[1], needed[2], needed[3:])
    *own, dweights = _first_derivative(saved, layout, gradients, needs, _run_backward if plain else layer_backward)
    return [*own, *(dweights or [None] * len(needed[3:]))]


def _one_step(x: Tensor, h: Tensor | None, c: Tensor | None, *weights: Tensor | None) -> tuple[Any, Any, Any, Any]:
    """The x, h0, c0 and weights of a layer of one step that does what a cell does."""
    state = [None if a is None else a.unsqueeze(0) for a in (h, c)]
    return x.unsqueeze(0), state[0], state[1], [w for w in weights if w is not None]


class _Cell(torch.autograd.Function):
    """The short path of a cell with gradients: (h', c')."""

    @staticmethod
    def forward(ctx: Any, *tensors: Any) -> tuple[Tensor, Tensor]:
        y, _, c_n, cells, gates = _run_forward(*_one_step(*tensors), None, None, None, FORWARD, False, 2)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, y, cells, gates)
        return y[0], c_n[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        *tensors, y, cells, gates = ctx.saved_tensors
        x, h0, c0, weights = _one_step(*tensors)
        dh_n, dc_n = (None if g is None else g.unsqueeze(0) for g in gradients)
        saved = (x, h0, c0, y, cells, gates, None, None, None, *weights)
        needed = ctx.needs_input_grad[: 3 + len(weights)]
        dx, dh0, dc0, *dweights = _short_derivative(saved, (FORWARD, False), (None, dh_n, dc_n, None), needed)
        state = (None if d is None else d.squeeze(0) for d in (dx, dh0, dc0))
        return *state, *dweights, *[None] * (len(tensors) - 3 - len(weights))


def _derivative_of_composed(
    saved: Sequence[Any], layout: tuple[int, bool], gradients: tuple[Any, ...], needed: tuple[bool, ...]
) -> list[Any]:
    """For gradients batched by `is_grads_batched`, an older vmap than the one that the ops have rules for."""
    x, h0, c0, _, _, _, lengths, resets, batch_sizes, *weights = saved
    inputs: list[Any] = [
        None if a is None else a.detach().requires_grad_(n) for a, n in zip((x, h0, c0, *weights), needed, strict=True)
    ]
    with torch.enable_grad():
        outputs = composed_layer(inputs[0], inputs[1], inputs[2], inputs[3:], lengths, resets, batch_sizes, *layout)
    given = [(a, g) for a, g in zip(outputs, gradients, strict=True) if g is not None]
    wanted = [n for n, needs in enumerate(needed) if needs]
    derivatives = torch.autograd.grad(
        [a for a, _ in given], [inputs[n] for n in wanted], [g for _, g in given], allow_unused=True
    )
    by_input = dict(zip(wanted, derivatives, strict=True))
    return [by_input.get(n) for n in range(len(needed))]


# Further derivatives -------------------------------------------------------------------------------------------------


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *gradients, x, h0, c0, weights, _, _, _, lengths, resets, batch_sizes, directions, batch_first, needs = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients, x, h0, c0, lengths, resets, batch_sizes, *weights)
    ctx.directions, ctx.batch_first = directions, batch_first
    ctx.mark_non_differentiable(
        *(a for bit, a in zip((NEEDS_X, NEEDS_H0, NEEDS_C0), output[:3], strict=True) if not needs & bit)
    )


def _backward_of_backward(ctx: Any, g_x: Any, g_h0: Any, g_c0: Any, g_weights: list[Any]) -> tuple[Any, ...]:
    """Differentiates the gradients of `composed_layer`; y, cells and gates count as functions of the other inputs."""
    *tensors, lengths, resets, batch_sizes = ctx.saved_tensors[:10]
    tensors += ctx.saved_tensors[10:]  # dy, dh_n, dc_n, dcells, x, h0, c0, *weights
    masks = (lengths, resets, batch_sizes, ctx.directions, ctx.batch_first)
    given = [n for n, a in enumerate(tensors) if a is not None]

    def gradients(*arguments: Tensor) -> list[Tensor]:
        """Those of the inputs given, in the order of `tensors[4:]`."""
        full: list[Any] = [None] * len(tensors)
        for n, a in zip(given, arguments, strict=True):
            full[n] = a
        inputs = [n for n in given if n >= 4]

        def outputs(*values: Tensor) -> tuple[Tensor, ...]:
            every = list(full)
            for n, a in zip(inputs, values, strict=True):
                every[n] = a
            results = composed_layer(every[4], every[5], every[6], every[7:], *masks)
            return tuple(a for a, d in zip(results, full[:4], strict=True) if d is not None)

        pull: Any = torch.func.vjp(outputs, *(full[n] for n in inputs))[1]
        return list(pull(tuple(d for d in full[:4] if d is not None)))

    vjp: Any = torch.func.vjp(gradients, *(tensors[n] for n in given))
    first, pull = vjp
    wanted = [g_x, g_h0, g_c0, *(g_weights or [None] * (len(tensors) - 7))]
    cotangents = [
        torch.zeros_like(d) if wanted[n - 4] is None else wanted[n - 4]
        for n, d in zip((n for n in given if n >= 4), first, strict=True)
    ]
    second: list[Any] = [None] * len(tensors)
    for n, a in zip(given, pull(cotangents), strict=True):
        second[n] = a
    return *second[:7], second[7:], *[None] * 9


layer_backward.register_autograd(_backward_of_backward, setup_context=_setup_backward)


# vmap ----------------------------------------------------------------------------------------------------------------


def _one_by_one(op: Callable[..., Any], size: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> Any:
    """Calls the op for each entry of the mapped dimension and stacks the results in front."""

    def entry(a: Any, dim: Any, n: int) -> Any:
        if isinstance(a, (list, tuple)):
            dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(a)
            return [entry(b, d, n) for b, d in zip(a, dims, strict=True)]
        return a if dim is None else a.select(dim, n)

    results = [op(*(entry(a, d, n) for a, d in zip(arguments, in_dims, strict=True))) for n in range(size)]
    columns = zip(*results, strict=True)
    stacked = [
        [torch.stack(b) for b in zip(*column, strict=True)] if isinstance(column[0], list) else torch.stack(column)
        for column in columns
    ]
    return tuple(stacked), tuple([0] * len(a) if isinstance(a, list) else 0 for a in stacked)


@layer_forward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    """Mapped rows with shared weights are one larger batch."""
    size = info.batch_size
    x, h0, c0, weights, lengths, resets, batch_sizes, directions, batch_first, save = arguments
    shared = all(d is None for d in in_dims[3]) if isinstance(in_dims[3], (list, tuple)) else in_dims[3] is None
    if not shared or batch_sizes is not None or size == 0:
        return _one_by_one(layer_forward, size, in_dims, arguments)
    batch = 0 if batch_first else 1

    def fold(a: Tensor | None, dim: int | None, axis: int) -> Tensor | None:
        if a is None:
            return None
        a = a.unsqueeze(axis).expand(*a.shape[:axis], size, *a.shape[axis:]) if dim is None else a.movedim(dim, axis)
        return a.flatten(axis, axis + 1)

    y, h_n, c_n, cells, gates = layer_forward(
        fold(x, in_dims[0], batch),
        fold(h0, in_dims[1], 1),
        fold(c0, in_dims[2], 1),
        weights,
        fold(lengths, in_dims[4], 0),
        fold(resets, in_dims[5], batch),
        None,
        directions,
        batch_first,
        save,
    )
    saved = [(a.unflatten(2, (size, -1)), 2) if a.dim() > 1 else (a, None) for a in (cells, gates)]
    outputs = [(a.unflatten(dim, (size, -1)), dim) for a, dim in ((y, batch), (h_n, 1), (c_n, 1))] + saved
    return tuple(a for a, _ in outputs), tuple(dim for _, dim in outputs)


@layer_backward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    return _one_by_one(layer_backward, info.batch_size, in_dims, arguments)


# Entries -------------------------------------------------------------------------------------------------------------


def _watched_by_nobody() -> bool:
    """No compiler, trace, transform, mode or forward-mode differentiation sees this call."""
    return not (
        is_compiling()
        or peek_interpreter_stack() is not None
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def _differentiated_by_transform() -> bool:
    """torch.func.grad, vjp, jvp and forward-mode duals do not reach into the op."""
    if forward_ad._current_level >= 0:
        return True
    return any(i.key() in (TransformType.Grad, TransformType.Jvp) for i in get_interpreter_stack() or ())


def _autocast(x: Tensor, *others: Any) -> list[Any]:
    """The arguments as autocast would have them, where it is on for their device."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return [x, *others]
    dtype = torch.get_autocast_dtype(device)

    def cast(a: Any) -> Any:
        if isinstance(a, list):
            return [cast(b) for b in a]
        return a.to(dtype) if a is not None and a.is_floating_point() and a.dtype != torch.float64 else a

    return [cast(a) for a in (x, *others)]


def serves(x: Tensor) -> bool:
    """Whether a kernel runs for x, or its shape rule for meta tensors; if not, torch's own LSTM does, and says so."""
    if x.is_meta:
        return True
    if is_compiling():
        return x.is_cpu and x.dtype in DTYPES
    choice = choose(x.device.type, x.dtype)
    if choice.name is None:
        warn_once(f"lstm_ext runs torch's own LSTM on {x.device.type} tensors of {x.dtype}: {choice.reason}")
    return choice.name is not None


def _watched_layer(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    batch_sizes: Tensor | None,
    directions: int,
    batch_first: bool,
    cells_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`layer` where something watches, or no kernel serves: through the op, or in torch's own operations."""
    layout = (lengths, resets, batch_sizes, directions, batch_first)
    if not is_compiling():
        named = zip(weight_names(weights, directions), weights, strict=True)
        for name, a in (*named, ("h0", h0), ("c0", c0), ("resets", resets)):
            if a is not None:
                check_kind(name, a, x)
    served = serves(x)
    if served and (is_compiling() or not _differentiated_by_transform()):
        tracing = not is_compiling() and _get_tracing_state() is not None  # a trace serves with gradients or without
        differentiable = _is_grad_enabled() and not tracing and _any_requires_grad(x, h0, c0, *weights)
        save = 2 if differentiable else int(cells_wanted)
        y, h_n, c_n, cells, _ = torch.ops.lstm_ext.layer_forward(x, h0, c0, weights, *layout, save)
    elif served or lengths is not None or resets is not None or cells_wanted or directions == REVERSE:
        check(x, h0, c0, weights, *layout, values=x.is_cpu)
        y, h_n, c_n, cells = composed_layer(x, h0, c0, weights, *layout)
    else:
        y, h_n, c_n = torch_layer(x, h0, c0, weights, batch_sizes, directions, batch_first)
        cells = None
    return y, h_n, c_n, cells if cells_wanted else None


def quick_layer(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    batch_sizes: Tensor | None,
    directions: int,
    batch_first: bool,
    cells_wanted: bool,
) -> tuple[Any, ...] | None:
    """`layer` where plain CPU tensors go straight to the kernel; else None, for `layer` to see why."""
    if _is_any_autocast_enabled() or not _watched_by_nobody() or not x.is_cpu:
        return None
    save, threads = 1 if cells_wanted else 0, _get_num_threads()
    try:
        if choose("cpu", x.dtype).name != "cpu" or (_is_grad_enabled() and _any_requires_grad(x, h0, c0, *weights)):
            return None
        return _C.layer_forward(
            x, h0, c0, weights, lengths, resets, batch_sizes, directions, batch_first, save, threads
        )[:4]
    except _NOT_TENSORS:  # an argument is wrong, or is more than a plain tensor
        return None


def layer(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    batch_sizes: Tensor | None,
    directions: int,
    batch_first: bool,
    cells_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(y, h_n, c_n, cells), the last as `reference.layer_forward` lays it out, by the shortest way open."""
    quick = quick_layer(x, h0, c0, weights, lengths, resets, batch_sizes, directions, batch_first, cells_wanted)
    if quick is not None:
        return quick
    if _is_any_autocast_enabled():
        x, h0, c0, weights = _autocast(x, h0, c0, weights)
    if lengths is not None:
        check_kind("lengths", lengths, x)
        lengths = _as_int64(lengths, x)
    if not (
        _watched_by_nobody()
        and x.is_cpu
        and x.dtype in DTYPES
        and _PLAIN.issuperset(map(type, (x, h0, c0, lengths, resets, batch_sizes, *weights)))
    ):
        return _watched_layer(x, h0, c0, weights, lengths, resets, batch_sizes, directions, batch_first, cells_wanted)
    if _is_grad_enabled() and _any_requires_grad(x, h0, c0, *weights):
        y, h_n, c_n, cells = _Layer.apply(x, h0, c0, lengths, resets, batch_sizes, directions, batch_first, *weights)
        return y, h_n, c_n, cells if cells_wanted else None
    return _run_forward(x, h0, c0, weights, lengths, resets, batch_sizes, directions, batch_first, int(cells_wanted))[
        :4
    ]


def _cell_autocast(x: Tensor, h: Tensor | None, c: Tensor | None, *weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """torch's cell under autocast takes any mixture and returns the dtype of c; ours computes in that dtype."""
    dtype = x.dtype if c is None else c.dtype
    with torch.autocast(x.device.type, enabled=False):
        return cell(*(None if a is None else a.to(dtype) for a in (x, h, c, *weights)))  # type: ignore[arg-type]


def quick_cell(
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """(h', c') where plain CPU tensors go straight to the kernel, x [B, I] or [I]; else None, for `cell` to see why."""
    if _is_any_autocast_enabled() or not _watched_by_nobody() or not x.is_cpu:
        return None
    try:
        if choose("cpu", x.dtype).name != "cpu":
            return None
        if _is_grad_enabled() and _any_requires_grad(x, h, c, w_ih, w_hh, b_ih, b_hh):
            return None
        return _C.cell_forward(x, h, c, w_ih, w_hh, b_ih, b_hh, _get_num_threads())
    except _NOT_TENSORS:  # an argument is wrong, or is more than a plain tensor
        return None


def cell(
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(h', c') of x [B, I] where `quick_cell` gives none: with gradients, watched, under autocast, or not served."""
    if _is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        return _cell_autocast(x, h, c, w_ih, w_hh, b_ih, b_hh)
    tensors = (x, h, c, w_ih, w_hh, b_ih, b_hh)
    if _watched_by_nobody() and x.is_cpu and _PLAIN.issuperset(map(type, tensors)):
        try:
            return _Cell.apply(*tensors)
        except _REFUSALS:
            check_cell(*tensors)
            raise
    if not is_compiling():
        check_cell(*tensors)
    h_n, c_n = layer(*_one_step(*tensors), None, None, None, FORWARD, False, False)[1:3]
    return h_n.squeeze(0), c_n.squeeze(0)
