"""The layer as torch sees it: custom ops with shape, autograd and vmap rules, and the short path for plain tensors.

A layer that no transform, mode or compiler watches goes straight to the backend (with gradients: through one
`autograd.Function`). Everything else goes through the ops `lstm_ext::layer_forward` and `lstm_ext::layer_backward`.
Derivatives beyond the first differentiate `composed_layer`, the same layer in torch's own operations.
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
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._functorch import (
    TransformType,
    get_dynamic_layer_stack_depth,
    get_interpreter_stack,
    get_unwrapped,
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
    peek_interpreter_stack,
)
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.compiler import assume_constant_result, is_compiling, is_exporting
from torch.nn import Parameter

from . import _native, gpu, onnx, reference
from .backend import backends, choose, warn_once
from .composed import HALF, composed_layer, compute_dtype, torch_layer
from .functional import check, check_cell, check_kind, check_values, weight_names
from .reference import BOTH, FORWARD, NEEDS_C0, NEEDS_H0, NEEDS_WEIGHTS, NEEDS_X, REVERSE

_REFUSALS = (TypeError, ValueError, RuntimeError)  # what the native core raises for arguments it does not take
_NOT_TENSORS = (*_REFUSALS, AttributeError)
_NATIVE = frozenset({"cpu", "cuda"})
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


# Backends on plain tensors -------------------------------------------------------------------------------------------


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
    choice = choose(x.device.type, x.dtype)
    if choice.name is None:
        raise RuntimeError(f"x: no backend takes dtype {x.dtype} ({choice.reason})")
    if choice.name == "numpy" and _native.C is None:
        warn_once(f"lstm_ext computes in NumPy, slowly: the compiled kernels are missing ({_native.reason})")
    return choice.name


def _runs(x: Tensor) -> bool:
    """Whether a backend computes on plain tensors like x: always on the CPU, with kernels on a GPU."""
    return x.is_cpu or (x.is_cuda and choose("cuda", x.dtype).name is not None)


def _gpu_forward(*arguments: Any) -> tuple[Any, ...]:
    """`gpu.layer_forward`; what packed rows lead a kernel to is checked first, all else by what it calls."""
    if arguments[6] is not None:
        check(*arguments[:-1])
    return gpu.layer_forward(*arguments)


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
    name = _backend_name(x)
    if name != "numpy":
        arguments = (x, h0, c0, weights, lengths, resets, batch_sizes, directions, batch_first, save)
        try:
            return _gpu_forward(*arguments) if name == "cuda" else _C.layer_forward(*arguments, _get_num_threads())
        except _REFUSALS:
            check(*arguments[:-1], values=x.is_cpu)
            raise
    check(x, h0, c0, weights, lengths, resets, batch_sizes, directions, batch_first)
    arrays = [_to_numpy(a) for a in (x, h0, c0, lengths, resets, batch_sizes)]
    y, h_n, c_n, cells, gates = reference.layer_forward(
        *(*arrays[:3], [_to_numpy(w) for w in weights], *arrays[3:], directions, batch_first, save)
    )
    kept = compute_dtype(x.dtype)
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
    if type(a) in _PLAIN:
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
    y, h_n, c_n, cells, gates = _run_forward(*[_plain(a) for a in arguments])
    return y, h_n, c_n, _or_empty(cells, y), _or_empty(gates, y)


@torch.library.impl("lstm_ext::layer_backward", ("cpu", "cuda"))
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """`reference.layer_backward` as an op; what is not needed is an empty tensor or list."""
    dx, dh0, dc0, dweights = _run_backward(*[_plain(a) for a in arguments])
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
        _save(ctx, (*flat[:3], flat[9:], *flat[3:8]), y, cells, gates)
        ctx.mark_non_differentiable(gates, *([cells] if cells.dim() == 1 else []))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[1:]
        needs = _needs(needed[0], needed[1], needed[2], needed[9:])
        layout = (ctx.directions, ctx.batch_first)
        dx, dh0, dc0, dweights = _first_derivative(ctx.saved_tensors, layout, gradients[:4], needs, layer_backward)
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
        if _watched_by_nobody() and not (recording and torch._C._any_requires_grad(*arguments)):
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


def autocast(dtype: torch.dtype, *arguments: Any) -> list[Any]:
    """Tensors and lists of them as autocast casts: floating-point ones to the dtype, but float64 stays as it is."""

    def cast(a: Any) -> Any:
        if isinstance(a, (list, tuple)):
            return [cast(b) for b in a]
        return a.to(dtype) if a is not None and a.is_floating_point() and a.dtype != torch.float64 else a

    return [cast(a) for a in arguments]


def autocast_state_dtype(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor | None]
) -> torch.dtype:
    """That of the c which torch's cell returns under autocast.

    On the CPU it multiplies in autocast's dtype and adds the products to c, which stays as wide as it was.
    """
    for name, a in (("hx[0]", h0), *(("weights", w) for w in weights)):
        if a is not None and (a.dtype == torch.float64) != (x.dtype == torch.float64):
            raise RuntimeError(f"{name}: expected dtype float64 if and only if x has it, got {a.dtype} and {x.dtype}")
    dtype = x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(x.device.type)
    return torch.promote_types(dtype, x.dtype if c0 is None else c0.dtype) if x.is_cpu else dtype


@assume_constant_result
def _in_forward_mode() -> bool:
    """Whether forward-mode duals may come, by themselves or from torch.func.jvp: compilers ask as they trace."""
    transforms = get_interpreter_stack() or ()
    return forward_ad._current_level >= 0 or any(each.key() is TransformType.Jvp for each in transforms)


@assume_constant_result
def _has_gpu_kernels() -> bool:
    return backends()["cuda"].available


def serves(x: Tensor) -> bool:
    """Whether a kernel runs for x, or its shape rule for meta tensors; if not, torch's own LSTM does, and says so."""
    if x.is_meta:
        return True
    if is_compiling():
        return (x.is_cpu or (x.is_cuda and _has_gpu_kernels())) and x.dtype in DTYPES
    choice = choose(x.device.type, x.dtype)
    if choice.name is None:
        warn_once(f"lstm_ext runs torch's own LSTM on {x.device.type} tensors of {x.dtype}: {choice.reason}")
    return choice.name is not None


def _check_watched(x: Tensor, h0: Any, c0: Any, weights: Any, lengths: Any, resets: Any, *layout: Any) -> None:
    """`check`; the values too where they can be seen: on the CPU, below vmap and the other transforms of torch.func."""
    batch_sizes, directions, batch_first = layout
    check(x, h0, c0, weights, lengths, resets, batch_sizes, directions, batch_first, values=False)
    if x.is_cpu and not is_compiling() and not _len_torch_dispatch_stack():
        num_steps = x.shape[1 if batch_first else 0] if batch_sizes is None else len(batch_sizes)
        check_values(_unwrapped(lengths), _unwrapped(batch_sizes), num_steps, x.shape[0])


def _unwrapped(a: Tensor | None) -> Tensor | None:
    while a is not None and is_functorch_wrapped_tensor(a):
        a = get_unwrapped(a)
    return a


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
    if onnx.is_exporting():
        check(x, h0, c0, weights, *layout, values=False)
        return *onnx.layer(x, h0, c0, weights, *layout, cells_wanted), None
    served = serves(x)
    if served and not _in_forward_mode():
        # What is traced or exported serves with gradients or without: who asks for them has the forward run again.
        recorded = is_exporting() if is_compiling() else _get_tracing_state() is not None
        # vmap hides whether what it maps asks for gradients.
        asked = _is_grad_enabled() and (get_dynamic_layer_stack_depth() > 0 or _any_requires_grad(x, h0, c0, *weights))
        save = 2 if asked and not recorded else int(cells_wanted)
        y, h_n, c_n, cells, _ = layer_forward(x, h0, c0, weights, *layout, save)
    elif served or lengths is not None or resets is not None or cells_wanted or directions == REVERSE:
        _check_watched(x, h0, c0, weights, *layout)
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
    """`layer` where plain tensors go straight to the kernel; else None, for `layer` to see why."""
    if _is_any_autocast_enabled() or not _watched_by_nobody() or not (x.is_cpu or x.is_cuda):
        return None
    save, threads = 1 if cells_wanted else 0, _get_num_threads()
    try:
        name = choose("cpu" if x.is_cpu else "cuda", x.dtype).name
        if name not in _NATIVE or (_is_grad_enabled() and _any_requires_grad(x, h0, c0, *weights)):
            return None
        if name == "cuda":
            return _gpu_forward(x, h0, c0, weights, lengths, resets, batch_sizes, directions, batch_first, save)[:4]
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
    if _is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        x, h0, c0, weights = autocast(torch.get_autocast_dtype(x.device.type), x, h0, c0, weights)
    if lengths is not None:
        check_kind("lengths", lengths, x)
        lengths = _as_int64(lengths, x)
    if not (
        _watched_by_nobody()
        and _runs(x)
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


def quick_cell(
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """(h', c') where plain tensors go straight to the kernel, x [B, I] or [I]; else None, for `cell` to see why."""
    if _is_any_autocast_enabled() or not _watched_by_nobody() or not (x.is_cpu or x.is_cuda):
        return None
    try:
        name = choose("cpu" if x.is_cpu else "cuda", x.dtype).name
        if name not in _NATIVE:
            return None
        if _is_grad_enabled() and _any_requires_grad(x, h, c, w_ih, w_hh, b_ih, b_hh):
            return None
        if name == "cuda":
            return gpu.cell_forward(x, h, c, w_ih, w_hh, b_ih, b_hh)
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
        cast = autocast(autocast_state_dtype(x, h, c, (w_ih, w_hh)), x, h, c, w_ih, w_hh, b_ih, b_hh)
        with torch.autocast(x.device.type, enabled=False):
            return cell(*cast)
    tensors = (x, h, c, w_ih, w_hh, b_ih, b_hh)
    if _watched_by_nobody() and _runs(x) and _PLAIN.issuperset(map(type, tensors)):
        try:
            return _Cell.apply(*tensors)
        except _REFUSALS:
            check_cell(*tensors)
            raise
    if not is_compiling():
        check_cell(*tensors)
    h_n, c_n = layer(*_one_step(*tensors), None, None, None, FORWARD, False, False)[1:3]
    return h_n.squeeze(0), c_n.squeeze(0)
