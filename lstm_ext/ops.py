"""The layer as torch sees it: the ops `lstm_ext::layer_forward` and `lstm_ext::layer_backward` with their rules.

A program that was exported or compiled with them needs only this module. Derivatives beyond the first differentiate
`composed_layer`, the same layer in torch's own operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _after_autograd_keyset,
    _AutoDispatchBelowAutograd,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._functorch import (
    peek_interpreter_stack,
)
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.compiler import is_compiling
from torch.nn import Parameter

from . import _native, gpu, reference
from .backend import choose, warn_once
from .composed import HALF, composed_layer, compute_dtype
from .functional import check
from .reference import BOTH, NEEDS_C0, NEEDS_H0, NEEDS_WEIGHTS, NEEDS_X

REFUSALS = (TypeError, ValueError, RuntimeError)  # what the native core raises for arguments it does not take
PLAIN = frozenset({Tensor, Parameter, NoneType})
DTYPES = HALF | {torch.float32, torch.float64}

if not hasattr(Tensor, "__dlpack_c_exchange_api__"):
    raise ImportError(f"lstm_ext needs torch 2.11 or newer for tensors, got {torch.__version__}")

_C: Any = _native.C
if _C is not None:
    _C.take_tensor_types(Tensor, Parameter)
    _C.share_openmp_threads("libtorch_cpu.so")

_get_num_threads = torch.get_num_threads
_is_grad_enabled = torch.is_grad_enabled


# Backends on plain tensors -------------------------------------------------------------------------------------------


def watched_by_nobody() -> bool:
    """No compiler, trace, transform, mode or forward-mode differentiation sees this call."""
    return not (
        is_compiling()
        or peek_interpreter_stack() is not None
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def _to_numpy(a: Tensor | None) -> Any:
    """A view as an array; NumPy has no bfloat16, float32 stands in."""
    if a is None:
        return None
    a = a.detach().resolve_neg()
    return (a.float() if a.dtype == torch.bfloat16 else a).numpy()


def _from_numpy(a: Any, dtype: torch.dtype) -> Any:
    return None if a is None else torch.from_numpy(a).to(dtype)


def _backend_name(x: Tensor) -> str:
    choice = choose(x.device.type, x.dtype)
    if choice.name is None:
        raise RuntimeError(f"x: no backend takes dtype {x.dtype} ({choice.reason})")
    if choice.name == "numpy" and _native.C is None:
        warn_once(f"lstm_ext computes in NumPy, slowly: the compiled kernels are missing ({_native.reason})")
    return choice.name


def gpu_forward(*arguments: Any) -> tuple[Any, ...]:
    """`gpu.layer_forward`; what packed rows lead a kernel to is checked first, all else by what it calls."""
    if arguments[6] is not None:
        check(*arguments[:-1])
    return gpu.layer_forward(*arguments)


def run_forward(
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
    name = _backend_name(x)
    if name != "numpy":
        arguments = (x, h0, c0, weights, lengths, resets, batch_sizes, directions, batch_first, save)
        try:
            return gpu_forward(*arguments) if name == "cuda" else _C.layer_forward(*arguments, _get_num_threads())
        except REFUSALS:
            check(*arguments[:-1], values=x.is_cpu)
            raise
    check(x, h0, c0, weights, lengths, resets, batch_sizes, directions, batch_first)
    arrays = [_to_numpy(a) for a in (x, h0, c0, lengths, resets, batch_sizes)]
    y, h_n, c_n, cells, gates = reference.layer_forward(
        *(*arrays[:3], [_to_numpy(w) for w in weights], *arrays[3:], directions, batch_first, save)
    )
    kept = compute_dtype(x.dtype)
    return *(_from_numpy(a, x.dtype) for a in (y, h_n, c_n)), _from_numpy(cells, kept), _from_numpy(gates, x.dtype)


def run_backward(
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
    name = _backend_name(x)
    if name == "cpu":
        return _C.layer_backward(*tensors, directions, batch_first, needs, _get_num_threads())
    if name == "cuda":
        return gpu.layer_backward(*tensors, directions, batch_first, needs)
    arrays = ([_to_numpy(w) for w in a] if isinstance(a, list) else _to_numpy(a) for a in tensors)
    arguments: tuple[Any, ...] = (*arrays, directions, batch_first, needs)
    dx, dh0, dc0, dweights = reference.layer_backward(*arguments)
    given = None if dweights is None else [_from_numpy(a, x.dtype) for a in dweights]
    return *(_from_numpy(a, x.dtype) for a in (dx, dh0, dc0)), given


def _plain(a: Any) -> Any:
    """A tensor of a subclass, or each in a list, as the plain tensor that it is here, below all dispatch."""
    if type(a) in PLAIN:
        return a
    if type(a) is list:
        return [_plain(b) for b in a]
    return a.as_subclass(Tensor) if isinstance(a, Tensor) else a


# The ops -------------------------------------------------------------------------------------------------------------


# `torch.library.custom_op` would take 9 µs more a call: it checks each time that no output is an input.
_library = torch.library.Library("lstm_ext", "FRAGMENT")
_library.define(
    "layer_forward"
    "(Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? lengths, Tensor? resets, Tensor? batch_sizes, "
    "int directions, bool batch_first, int save) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "layer_backward"
    "(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells, Tensor x, Tensor? h0, Tensor? c0, "
    "Tensor[] weights, Tensor y, Tensor cells, Tensor gates, Tensor? lengths, Tensor? resets, Tensor? batch_sizes, "
    "int directions, bool batch_first, int needs) -> (Tensor, Tensor, Tensor, Tensor[])",
    tags=(torch.Tag.pt2_compliant_tag,),
)
layer_forward = torch.ops.lstm_ext.layer_forward.default
layer_backward = torch.ops.lstm_ext.layer_backward.default


@torch.library.impl("lstm_ext::layer_forward", ("cpu", "cuda"))
def _(*arguments: Any) -> tuple[Tensor, ...]:
    """`reference.layer_forward` as an op; what is not saved is an empty tensor."""
    y, h_n, c_n, cells, gates = run_forward(*[_plain(a) for a in arguments])
    return y, h_n, c_n, _or_empty(cells, y), _or_empty(gates, y)


@torch.library.impl("lstm_ext::layer_backward", ("cpu", "cuda"))
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """`reference.layer_backward` as an op; what is not needed is an empty tensor or list."""
    dx, dh0, dc0, dweights = run_backward(*[_plain(a) for a in arguments])
    x = arguments[4]
    return _or_empty(dx, x), _or_empty(dh0, x), _or_empty(dc0, x), dweights or []


def _or_empty(a: Tensor | None, like: Tensor) -> Tensor:
    """`a`, or an empty tensor: an op cannot return None."""
    return like.new_empty(0) if a is None else a


def _batch_size(x: Tensor, batch_sizes: Tensor | None, batch_first: bool, *states: Tensor | None) -> Any:
    """B; of packed rows whichever state shows it, else what the contents of batch_sizes will be."""
    if batch_sizes is None:
        return x.shape[0 if batch_first else 1]
    for state in states:
        if state is not None:
            return state.shape[1]
    return int(batch_sizes[0]) if type(batch_sizes) is Tensor else torch.library.get_ctx().new_dynamic_size()


@torch.library.register_fake("lstm_ext::layer_forward")
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
    kept = compute_dtype(x.dtype)
    return (
        x.new_empty(*x.shape[:-1], D * P),
        x.new_empty(D, B, P),
        x.new_empty(D, B, H),
        x.new_empty((D, *rows, H), dtype=kept) if save >= 1 else x.new_empty(0),
        x.new_empty(D, *rows, 4 * H) if save >= 2 else x.new_empty(0),
    )


@torch.library.register_fake("lstm_ext::layer_backward")
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


def save_for_derivative(ctx: Any, inputs: tuple[Any, ...], y: Tensor, cells: Tensor, gates: Tensor) -> None:
    """Keeps what `first_derivative` needs of a forward pass that saved its gates."""
    x, h0, c0, weights, lengths, resets, batch_sizes, directions, batch_first = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, h0, c0, y, cells, gates, lengths, resets, batch_sizes, *weights)
    ctx.directions, ctx.batch_first = directions, batch_first


def needs_of(x: bool, h0: bool, c0: bool, weights: Sequence[bool]) -> int:
    """The sum of the constants NEEDS_… of what is needed."""
    return NEEDS_X * x + NEEDS_H0 * h0 + NEEDS_C0 * c0 + NEEDS_WEIGHTS * any(weights)


def first_derivative(
    saved: Sequence[Any],
    layout: tuple[int, bool],
    gradients: tuple[Any, ...],
    needs: int,
    backward: Callable[..., Any],
) -> tuple[Any, Any, Any, list[Any] | None]:
    """(dx, dh0, dc0, dweights) from those of y, h_n, c_n and cells, of what `save_for_derivative` has kept."""
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


# The derivatives of the ops ------------------------------------------------------------------------------------------
#
# torch.func.grad cannot see through what `torch.library.register_autograd` would make of these rules. So the ops have
# autograd kernels of their own, each a Function that serves one level of torch.func and hands on to the next, as
# torch's own operations do. A Function, and a rule of vmap, takes no lists: the weights come last there. There is no
# rule for forward mode; torch raises an error then, and `layer` does not come here.


class _Flat:
    """An op that takes its weights after its other arguments, and returns their gradients after its other results."""

    def __init__(self, op: Callable[..., Any], place: int, others: int):
        self.op, self.place, self.others = op, place, others

    def __call__(self, *flat: Any) -> tuple[Tensor, ...]:
        results = self.op(*flat[: self.place], list(flat[self.others :]), *flat[self.place : self.others])
        return (*results[:-1], *results[-1]) if isinstance(results[-1], list) else results

    def arguments(self, arguments: Sequence[Any]) -> list[Any]:
        """Those of the op in the order of a call here."""
        return [*arguments[: self.place], *arguments[self.place + 1 :], *arguments[self.place]]

    def over(self, op: Callable[..., Any]) -> _Flat:
        """Another that takes the same arguments."""
        return _Flat(op, self.place, self.others)


_FORWARD, _BACKWARD = _Flat(layer_forward, 3, 9), _Flat(layer_backward, 7, 16)


class _ForwardRule(_SingleLevelFunction):
    """x, h0, c0, lengths, resets, batch_sizes, directions, batch_first, save, *weights."""

    @staticmethod
    def forward(ctx: Any, below: _Flat, *flat: Any) -> Any:
        outputs = below(*flat)
        y, _, _, cells, gates = outputs
        save_for_derivative(ctx, (*flat[:3], flat[9:], *flat[3:8]), y, cells, gates)
        ctx.mark_non_differentiable(gates, *([cells] if cells.dim() == 1 else []))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[1:]
        needs = needs_of(needed[0], needed[1], needed[2], needed[9:])
        layout = (ctx.directions, ctx.batch_first)
        dx, dh0, dc0, dweights = first_derivative(ctx.saved_tensors, layout, gradients[:4], needs, layer_backward)
        return None, dx, dh0, dc0, *[None] * 6, *(dweights or [None] * len(needed[9:]))


class _BackwardRule(_SingleLevelFunction):
    """dy, dh_n, dc_n, dcells, x, h0, c0, y, cells, gates, lengths, …, batch_first, needs, *weights.

    What is differentiated is the derivative of `composed_layer`: y, cells and gates count as functions of the others.
    """

    @staticmethod
    def forward(ctx: Any, below: _Flat, *flat: Any) -> Any:
        results = below(*flat)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*flat[:7], *flat[10:13], *flat[16:])
        ctx.layout, needs = flat[13:15], flat[15]
        bits = (NEEDS_X, NEEDS_H0, NEEDS_C0)
        ctx.mark_non_differentiable(*(a for bit, a in zip(bits, results[:3], strict=True) if not needs & bit))
        return results

    @staticmethod
    def backward(ctx: Any, *wanted: Any) -> tuple[Any, ...]:
        saved, layout = ctx.saved_tensors, ctx.layout
        tensors = (*saved[:7], *saved[10:])

        def outputs(x: Any, h0: Any, c0: Any, *weights: Any) -> tuple[Tensor, ...]:
            return composed_layer(x, h0, c0, weights, *saved[7:10], *layout)

        def gradients(*tensors: Any) -> list[Any]:
            return _pull(outputs, tensors[4:], tensors[:4])

        asked = [None if a is None else g for a, g in zip_longest(tensors[4:], wanted)]
        second = _pull(gradients, tensors, asked)
        return None, *second[:7], *[None] * 9, *second[7:]


def _pull(f: Callable[..., Any], primals: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
    """What the transposed Jacobian of f makes of the cotangents; entries of both may be None."""
    if all(d is None for d in cotangents):
        return [None] * len(primals)
    present = [n for n, a in enumerate(primals) if a is not None]

    def outputs(*given: Tensor) -> list[Tensor]:
        every = dict(zip(present, given, strict=True))
        results = f(*(every.get(n) for n in range(len(primals))))
        return [a for a, d in zip(results, cotangents, strict=True) if d is not None]

    pull: Any = torch.func.vjp(outputs, *(primals[n] for n in present))[1]
    pulled = dict(zip(present, pull([d for d in cotangents if d is not None]), strict=True))
    return [pulled.get(n) for n in range(len(primals))]


def _register_autograd(flat: _Flat, rule: Any) -> None:
    op: Any = flat.op

    def kernel(keyset: Any, *arguments: Any) -> Any:
        def below(*arguments: Any) -> Any:
            with _AutoDispatchBelowAutograd():
                return op.redispatch(keyset & _after_autograd_keyset, *arguments)

        recording = _is_grad_enabled()
        if watched_by_nobody() and not (recording and torch._C._any_requires_grad(*arguments)):
            return below(*arguments)

        def below_rule(*arguments: Any) -> Any:
            """A Function turns recording off for its own level; the levels outside of it go on."""
            with torch.set_grad_enabled(recording), forward_ad._set_fwd_grad_enabled(True):
                return below(*arguments)

        with enable_single_level_autograd_function():
            results = rule.apply(flat.over(below_rule), *flat.arguments(arguments))
        return results if flat is _FORWARD else (*results[:3], list(results[3:]))

    _library.impl(op.name(), kernel, "Autograd", with_keyset=True)


_register_autograd(_FORWARD, _ForwardRule)
_register_autograd(_BACKWARD, _BackwardRule)


# vmap ----------------------------------------------------------------------------------------------------------------


def _fold(a: Tensor | None, dim: int | None, axis: int, size: int, inner: bool) -> Tensor | None:
    """Makes the mapped dimension part of the axis of the batch: the faster one in it if `inner`, else the slower."""
    if a is None:
        return None
    place = axis + inner
    a = a.unsqueeze(place).expand(*a.shape[:place], size, *a.shape[place:]) if dim is None else a.movedim(dim, place)
    return a.flatten(axis, axis + 1)


def _unfold(a: Tensor, axis: int, size: int, inner: bool) -> tuple[Tensor, int | None]:
    """What `_fold` does taken back, and where the mapped dimension is now; an output left out stays as it is."""
    if a.dim() == 1:
        return a, None
    rows = a.shape[axis] // size
    return a.unflatten(axis, (rows, size) if inner else (size, rows)), axis + inner


def _one_by_one(call: Callable[..., Any], size: int, in_dims: Sequence[Any], arguments: Sequence[Any]) -> Any:
    """Calls for each entry of the mapped dimension and stacks the results in front."""

    def entry(a: Any, dim: int | None, n: int) -> Any:
        if dim is None:
            return a
        return a.select(dim, n) if size else a.new_zeros(a.shape[:dim] + a.shape[dim + 1 :])

    results = [call(*(entry(a, d, n) for a, d in zip(arguments, in_dims, strict=True))) for n in range(max(size, 1))]
    stacked = tuple(torch.stack(column)[:size] for column in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def _foldable(flat: _Flat, size: int, in_dims: Sequence[Any], batch_sizes: int) -> bool:
    """Mapped rows with shared weights are one larger batch."""
    return size > 0 and in_dims[batch_sizes] is None and all(dim is None for dim in in_dims[flat.others :])


def _map_forward(size: int, in_dims: Sequence[Any], arguments: Sequence[Any]) -> Any:
    """vmap of x, h0, c0, lengths, resets, batch_sizes, directions, batch_first, save, *weights."""
    if not _foldable(_FORWARD, size, in_dims, 5):
        return _one_by_one(_FORWARD, size, in_dims, arguments)
    batch_sizes, batch_first = arguments[5], arguments[7]
    packed = batch_sizes is not None  # the rows of a step stay together, so the mapped dimension is the faster one
    batch, rows = 0 if packed or batch_first else 1, 1 if packed else 2
    axes = (batch, 1, 1, 0, batch)
    folded = [_fold(*a, size, packed) for a in zip(arguments[:5], in_dims[:5], axes, strict=True)]
    outputs = _FORWARD(*folded, batch_sizes * size if packed else None, *arguments[6:])
    unfolded = [_unfold(*a, size, packed) for a in zip(outputs, (batch, 1, 1, rows, rows), strict=True)]
    return tuple(a for a, _ in unfolded), tuple(dim for _, dim in unfolded)


def _map_backward(size: int, in_dims: Sequence[Any], arguments: Sequence[Any]) -> Any:
    """vmap of dy, dh_n, dc_n, dcells, x, h0, c0, y, cells, gates, lengths, resets, batch_sizes, …, needs, *weights."""
    batch_sizes, _, batch_first, needs = arguments[12:16]
    if needs & NEEDS_WEIGHTS or not _foldable(_BACKWARD, size, in_dims, 12):  # the kernel adds up over the batch
        return _one_by_one(_BACKWARD, size, in_dims, arguments)
    packed = batch_sizes is not None
    batch, rows = 0 if packed or batch_first else 1, 1 if packed else 2
    axes = (batch, 1, 1, rows, batch, 1, 1, batch, rows, rows, 0, batch)
    folded = [_fold(*a, size, packed) for a in zip(arguments[:12], in_dims[:12], axes, strict=True)]
    outputs = _BACKWARD(*folded, batch_sizes * size if packed else None, *arguments[13:])
    unfolded = [_unfold(*a, size, packed) for a in zip(outputs, (batch, 1, 1), strict=True)]
    return tuple(a for a, _ in unfolded), tuple(dim for _, dim in unfolded)


def _flat_dims(flat: _Flat, in_dims: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """The mapped dimension of each argument, in the order of `flat`."""
    dims = list(in_dims)
    if not isinstance(dims[flat.place], (list, tuple)):
        dims[flat.place] = [dims[flat.place]] * len(arguments[flat.place])
    return flat.arguments(dims)


@torch.library.register_vmap("lstm_ext::layer_forward")
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    return _map_forward(info.batch_size, _flat_dims(_FORWARD, in_dims, arguments), _FORWARD.arguments(arguments))


@torch.library.register_vmap("lstm_ext::layer_backward")
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    dims, given = _flat_dims(_BACKWARD, in_dims, arguments), _BACKWARD.arguments(arguments)
    outputs, out_dims = _map_backward(info.batch_size, dims, given)
    return (*outputs[:3], list(outputs[3:])), (*out_dims[:3], list(out_dims[3:]))
