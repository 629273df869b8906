"""The layer as torch sees it: the ops `lstm_ext::layer_forward` and `lstm_ext::layer_backward` with their rules.

Whatever watches a call sees these: compilers and exporters their shapes, autograd and `torch.func` their derivatives,
vmap one larger batch. Below all of that the op runs the engine. Derivatives beyond the first are those of
`engines/derivatives.py`, in torch's own operations.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling, is_exporting
from torch.nn import Parameter
from torch.utils.flop_counter import register_flop_formula

from . import _native
from ._torch_private import (
    _after_autograd_keyset,
    _any_requires_grad,
    _AutoDispatchBelowAutograd,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
    _set_fwd_grad_enabled,
    _SingleLevelFunction,
    compiled_autograd_key,
    constant_to_compilers,
    enable_single_level_autograd_function,
    forward_ad,
    get_dynamic_layer_stack_depth,
    get_unwrapped,
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
    peek_interpreter_stack,
)
from .call import (
    CallTuple,
    Directions,
    Grads,
    GradsTuple,
    LayerCall,
    Needs,
    OutputGrads,
    Outputs,
    OutputsTuple,
    Save,
    Saved,
)
from .cell import Cell, cell_of
from .checks import check, check_backward, check_values
from .engines import Engine, choose, composed, cpu, derivatives, in_torch, logged

if not _native.reason:
    cpu.take_tensors((Tensor, Parameter), torch.get_num_threads, "libtorch_cpu.so")

TENSORS = frozenset({Tensor, Parameter})
PLAIN = TENSORS | {NoneType}

_is_grad_enabled = torch.is_grad_enabled


# What watches, and what is asked for ---------------------------------------------------------------------------------


def is_eager() -> bool:
    """Whether no compiler, trace, transform, mode or forward-mode differentiation sees this call."""
    return not (
        is_dynamo_compiling()  # other tracers set a mode
        or peek_interpreter_stack() is not None
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def requires_grad(call: CallTuple) -> bool:
    """Whether any of the tensors asks for its gradient; what is no tensor asks for none."""
    return any([getattr(a, "requires_grad", False) for a in (*call[3], *call[:3])])  # noqa: C419 (a list is quicker)


# The ops -------------------------------------------------------------------------------------------------------------


# `torch.library.custom_op` would take 9 µs more a call: it checks each time that no output is an input. Programs that
# were exported name these two with these arguments: they stay as they are, and new ones have defaults. y of
# layer_backward is looked at only with a cell; older programs hand one over that none needs.
_library = torch.library.Library("lstm_ext", "FRAGMENT")
_library.define(
    "layer_forward"
    "(Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? lengths, Tensor? resets, Tensor? batch_sizes, "
    "int directions, bool batch_first, int save, float[]? cell=None, Tensor? seed=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "layer_backward"
    "(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells, Tensor x, Tensor? h0, Tensor? c0, "
    "Tensor[] weights, Tensor? y, Tensor cells, Tensor gates, Tensor? lengths, Tensor? resets, Tensor? batch_sizes, "
    "int directions, bool batch_first, int needs, float[]? cell=None, Tensor? seed=None) "
    "-> (Tensor, Tensor, Tensor, Tensor[])",
    tags=(torch.Tag.pt2_compliant_tag,),
)
layer_forward = torch.ops.lstm_ext.layer_forward.default
layer_backward = torch.ops.lstm_ext.layer_backward.default


_FORWARD_ARGUMENTS, _BACKWARD_ARGUMENTS = (len(op._schema.arguments) for op in (layer_forward, layer_backward))


def padded(arguments: Sequence[Any], count: int) -> Sequence[Any]:
    """With those at the end that torch leaves out, since they are None by default."""
    return (*arguments, *[None] * (count - len(arguments)))


def forward_of(arguments: Sequence[Any]) -> tuple[LayerCall, Save]:
    """The arguments of `layer_forward` by name."""
    *arrays, directions, batch_first, save, cell, seed = padded(arguments, _FORWARD_ARGUMENTS)
    return LayerCall._make((*arrays, Directions(directions), batch_first, _cell(cell), seed)), Save(save)


def forward_arguments(call: LayerCall, save: Save) -> tuple[Any, ...]:
    """The way back from `forward_of`."""
    return *call[:9], save, *_cell_arguments(call)


def backward_of(arguments: Sequence[Any]) -> tuple[LayerCall, Saved, OutputGrads, Needs]:
    """The arguments of `layer_backward` by name."""
    (
        *grads,
        x,
        h0,
        c0,
        weights,
        y,
        cells,
        gates,
        lengths,
        resets,
        batch_sizes,
        directions,
        batch_first,
        needs,
        cell,
        seed,
    ) = padded(arguments, _BACKWARD_ARGUMENTS)
    masks = lengths, resets, batch_sizes, Directions(directions), batch_first
    call = LayerCall(x, h0, c0, weights, *masks, _cell(cell), seed)
    return call, Saved(cells, gates, None if call.cell is None else y), OutputGrads(*grads), Needs(needs)


def backward_arguments(call: LayerCall, saved: Saved, grads: OutputGrads, needs: Needs) -> tuple[Any, ...]:
    """The way back from `backward_of`."""
    return *grads, *call[:4], saved.y, saved.cells, saved.gates, *call[4:9], needs, *_cell_arguments(call)


def _cell(numbers: Sequence[float] | None) -> Cell | None:
    return None if numbers is None else cell_of(tuple(numbers))


def _numbers(cell: Cell) -> list[float]:
    """As the ops take them: what a compiler takes for inputs of its program becomes a part of it."""
    numbers = [number + 0.0 for number in cell]  # compilers do not see into float() of an enum
    if not is_dynamo_compiling():
        return numbers
    guard_scalar = torch.fx.experimental.symbolic_shapes.guard_scalar  # compilers alone have imported it
    return [guard_scalar(number) for number in numbers]


def _cell_arguments(call: LayerCall) -> tuple[Any, ...]:
    """The last two of both ops; nothing for a plain cell, whose calls are recorded as they always were."""
    return () if call.cell is None else (_numbers(call.cell), call.seed)


def plain(a: Any) -> Any:
    """A tensor of a subclass, or each in a list, as the plain tensor that it is here, below all dispatch."""
    if type(a) in PLAIN:
        return a
    if type(a) is list:
        return [plain(b) for b in a]
    return a.as_subclass(Tensor) if isinstance(a, Tensor) else a


def engine_of(x: Tensor) -> Engine:
    """The engine for plain tensors like x.

    Raises:
        RuntimeError: there is none.
    """
    choice = choose(x.device.type, x.dtype)
    if choice.engine is None:
        raise RuntimeError(f"x: no backend takes dtype {x.dtype} ({choice.reason})")
    return choice.engine


def or_empty(a: Tensor | None, like: Tensor) -> Tensor:
    """What stands for no result in an operator, which must return a tensor."""
    return like.new_empty(0) if a is None else a


def forward_results(outputs: OutputsTuple) -> tuple[Tensor, ...]:
    """As `layer_forward` returns them: an op cannot return None, so what is not saved is an empty tensor."""
    y, h_n, c_n, cells, gates = outputs
    return y, h_n, c_n, or_empty(cells, y), or_empty(gates, y)


def backward_results(grads: GradsTuple, x: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """As `layer_backward` returns them: what is not needed is an empty tensor or list."""
    dx, dh0, dc0, dweights = grads
    return or_empty(dx, x), or_empty(dh0, x), or_empty(dc0, x), dweights or []


def _say_in_torch(direction: str, call: LayerCall) -> None:
    if logged.ON:
        choice = choose(call.x.device.type, call.x.dtype)
        logged.say(direction, call, "torch's operations", "", choice.reason or "a cell with options")


@torch.library.impl("lstm_ext::layer_forward", ("cpu", "cuda"))
def _(*arguments: Any) -> tuple[Tensor, ...]:
    call, save = forward_of([plain(a) for a in arguments])
    engine = choose(call.x.device.type, call.x.dtype).engine
    outputs = NotImplemented if engine is None else engine.forward(call, save)
    if outputs is NotImplemented:  # such a cell
        check(call)
        _say_in_torch("forward", call)
        with torch.autocast(call.x.device.type, enabled=False):
            outputs = in_torch.forward(call, save)
    return forward_results(outputs)


@torch.library.impl("lstm_ext::layer_backward", ("cpu", "cuda"))
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    call, saved, grads, needs = backward_of([plain(a) for a in arguments])
    engine = choose(call.x.device.type, call.x.dtype).engine
    results = NotImplemented if engine is None else engine.backward(call, saved, grads, needs)
    if results is NotImplemented:
        check(call)
        check_backward(call, saved, grads)
        _say_in_torch("backward", call)
        with torch.autocast(call.x.device.type, enabled=False):
            results = in_torch.backward(call, saved, grads, needs)
    return backward_results(results, call.x)


def _batch_size(call: LayerCall, *states: Tensor | None) -> Any:
    """B; of packed rows whichever state shows it, else what the contents of batch_sizes will be."""
    if call.batch_sizes is None:
        return call.batch_size()
    for state in (*states, call.h0, call.c0):
        if state is not None:
            return state.shape[1]
    return call.batch_size() if type(call.batch_sizes) is Tensor else torch.library.get_ctx().new_dynamic_size()


@torch.library.register_fake("lstm_ext::layer_forward")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    call, save = forward_of(arguments)
    B = _batch_size(call)
    check(call, values=False)
    x, D, (H, P) = call.x, call.num_directions, call.widths
    rows = (x.shape[0],) if call.batch_sizes is not None else (call.num_steps(), B)
    return (
        x.new_empty(*x.shape[:-1], D * P),
        x.new_empty(D, B, P),
        x.new_empty(D, B, H),
        x.new_empty((D, *rows, H), dtype=composed.compute_dtype(x.dtype)) if save >= Save.CELLS else x.new_empty(0),
        x.new_empty(D, *rows, 4 * H) if save >= Save.ALL else x.new_empty(0),
    )


@torch.library.register_fake("lstm_ext::layer_backward")
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    call, saved, grads, needs = backward_of(arguments)
    x, D, H = call.x, saved.cells.shape[0], saved.cells.shape[-1]
    # A size that only batch_sizes tell is asked for where an output has it: a compiler looks for it there.
    B = _batch_size(call, grads.dh_n, grads.dc_n) if needs & (Needs.H0 | Needs.C0) else 0
    return (
        x.new_empty(x.shape) if needs & Needs.X else x.new_empty(0),
        x.new_empty(D, B, call.widths[1]) if needs & Needs.H0 else x.new_empty(0),
        x.new_empty(D, B, H) if needs & Needs.C0 else x.new_empty(0),
        [w.new_empty(w.shape) for w in call.weights] if needs & Needs.WEIGHTS else [],
    )


# What torch.utils.flop_counter asks ----------------------------------------------------------------------------------
#
# It counts two for each multiply-add of a matrix product: those of torch's own LSTM where that is made of such.


_MATRICES = frozenset({"w_ih", "w_hh", "w_hr", "kernel"})


@register_flop_formula(torch.ops.lstm_ext.layer_forward, get_raw=True)
def _(*arguments: Any, out_val: Any = None) -> int:
    call, _ = forward_of(arguments)
    matrices = [w for named in call.named_weights() for name, w in named.items() if name in _MATRICES]
    return 2 * call.x.shape[:-1].numel() * sum(w.numel() for w in matrices)


@register_flop_formula(torch.ops.lstm_ext.layer_backward, get_raw=True)
def _(*arguments: Any, out_val: Any = None) -> int:
    call, _, _, needs = backward_of(arguments)
    rows, total = call.x.shape[:-1].numel(), 0
    for reverse, w in zip(call.directions.reversals, call.split_cell(), strict=True):
        first_rows = 0  # of the first step, whose gradient by h0 nobody asks for
        if not needs & Needs.H0 and call.batch_sizes is None:
            first_rows = call.batch_size()
        elif not needs & Needs.H0 and type(call.batch_sizes) is Tensor:
            first_rows = int(call.batch_sizes[-1 if reverse else 0])
        projection = 0 if w.w_hr is None else w.w_hr.numel()
        total += rows * projection + (rows - first_rows) * w.w_hh.numel()
        if needs & Needs.X:
            total += rows * w.w_ih.numel()
        if needs & Needs.WEIGHTS:
            total += rows * (w.w_ih.numel() + w.w_hh.numel() + projection)
    return 2 * total


# The derivatives -----------------------------------------------------------------------------------------------------
#
# torch.func.grad cannot see through what `torch.library.register_autograd` would make of these rules. So the ops have
# autograd kernels of their own, each a Function that serves one level of torch.func and hands on to the next, as
# torch's own operations do. There is no rule for forward mode; torch raises an error then, and `route` does not come
# here. A Function, and a rule of vmap, takes no lists: there a call is flat, with its weights last.


_NUM_FIELDS = len(LayerCall._fields) - 1  # of a flat call, before the weights; the first three have gradients


def flat(call: CallTuple) -> tuple[Any, ...]:
    """The call without a list in it."""
    return *call[:3], *call[4:], *call[3]


def unflat(flat: Sequence[Any]) -> LayerCall:
    """The way back from `flat`."""
    return LayerCall._make((*flat[:3], list(flat[_NUM_FIELDS:]), *flat[3:_NUM_FIELDS]))


def apply(function: Any, *arguments: Any) -> Any:
    """`function.apply`, which torch leaves untyped."""
    return function.apply(*arguments)


class LayerFunction(_SingleLevelFunction):
    """The outputs of `below(call, save)`: of an engine, or of the op as the next level sees it."""

    _compiled_autograd_key = compiled_autograd_key

    @staticmethod
    def forward(ctx: Any, below: Callable[..., Any], save: Save, *arguments: Any) -> Any:
        """`arguments` is a flat call."""
        call = unflat(arguments)
        outputs = Outputs(*below(call, save))
        ctx.set_materialize_grads(False)
        saved = Saved.of(outputs, call.cell)
        y = None if saved.y is None else saved.y.clone()  # the caller may change his own
        ctx.save_for_backward(saved.cells, saved.gates, y, *_tensors(arguments))
        ctx.options = call[7:10]
        unsaved = outputs.cells is not None and outputs.cells.dim() == 1
        ctx.mark_non_differentiable(*(a for a in (outputs.gates, outputs.cells if unsaved else None) if a is not None))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        """`gradients` are those of the outputs, None for zeros."""
        if all(g is None for g in gradients):  # a second derivative comes by, which has none for what was saved
            return (None,) * len(ctx.needs_input_grad)
        cells, gates, y, *tensors = ctx.saved_tensors
        saved, call = Saved(cells, gates, y), _restored(tensors, ctx.options)
        needed = unflat(ctx.needs_input_grad[2:])
        needs = Needs.of(bool(needed.x), bool(needed.h0), bool(needed.c0), any(needed.weights))
        dx, dh0, dc0, dweights = _first_derivative(call, saved, OutputGrads(*gradients[:4]), needs)
        return None, None, dx, dh0, dc0, *[None] * (_NUM_FIELDS - 3), *(dweights or [None] * len(call.weights))


def _first_derivative(call: LayerCall, saved: Saved, grads: OutputGrads, needs: Needs) -> GradsTuple:
    """What is not needed is None."""
    if any([g is not None and is_legacy_batchedtensor(g) for g in grads]):  # noqa: C419
        return _composed_derivative(call, grads, needs)  # an older vmap than the one that the ops have rules for
    if saved.gates.dim() == 1:  # the forward was not asked to save
        saved = Saved.of(Outputs(*layer_forward(*forward_arguments(call, Save.ALL))), call.cell)
    engine = choose(call.x.device.type, call.x.dtype).engine
    if engine is not None and not _is_grad_enabled() and is_eager():
        derivatives = engine.backward(call, saved, grads, needs)
        if derivatives is not NotImplemented:
            return derivatives
    if call.is_step:
        timed = _first_derivative(call.with_time(), saved.with_time(call), grads.with_time(call), needs)
        return Grads(*timed).without_time(call)
    dx, dh0, dc0, dweights = layer_backward(*backward_arguments(call, saved, grads, needs))
    return (
        dx if needs & Needs.X else None,
        dh0 if needs & Needs.H0 else None,
        dc0 if needs & Needs.C0 else None,
        dweights if needs & Needs.WEIGHTS else None,
    )


def _composed_derivative(call: LayerCall, grads: OutputGrads, needs: Needs) -> GradsTuple:
    """The same through `composed.forward`."""
    if call.is_step:
        return Grads(*_composed_derivative(call.with_time(), grads.with_time(call), needs)).without_time(call)
    asked = (needs & Needs.X, needs & Needs.H0, needs & Needs.C0, *[needs & Needs.WEIGHTS] * len(call.weights))
    inputs = [
        None if a is None else a.detach().requires_grad_(bool(n))
        for a, n in zip((*call[:3], *call.weights), asked, strict=True)
    ]
    with torch.enable_grad():
        outputs = composed.forward(_with_floats(call, inputs), Save.CELLS)
    given = [(a, g) for a, g in zip(outputs, grads, strict=False) if g is not None]
    wanted = [a for a in inputs if a is not None and a.requires_grad]
    results = torch.autograd.grad([a for a, _ in given], wanted, [g for _, g in given], allow_unused=True)
    by_input = dict(zip(map(id, wanted), results, strict=True))
    dx, dh0, dc0, *dweights = (by_input.get(id(a)) for a in inputs)
    return dx, dh0, dc0, dweights


def _with_floats(call: LayerCall, floats: Sequence[Any]) -> LayerCall:
    """The call with another x, h0, c0 and other weights."""
    x, h0, c0, *weights = floats
    return call._replace(x=x, h0=h0, c0=c0, weights=weights)


class LayerGradFunction(_SingleLevelFunction):
    """(dx, dh0, dc0, *dweights) of `below(call, saved, grads, needs)`, the op as the next level sees it.

    What was saved counts as a function of the others.
    """

    _compiled_autograd_key = compiled_autograd_key

    @staticmethod
    def forward(ctx: Any, below: Callable[..., Any], needs: Needs, *arguments: Any) -> Any:
        """`arguments` are the gradients of the outputs, what was saved, and a flat call."""
        grads, saved, call = OutputGrads(*arguments[:4]), Saved(*arguments[4:7]), unflat(arguments[7:])
        dx, dh0, dc0, dweights = below(call, saved, grads, needs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*grads, saved.cells, saved.gates, *_tensors(arguments[7:]))
        ctx.options = call[7:10]
        given = ((dx, Needs.X), (dh0, Needs.H0), (dc0, Needs.C0))
        ctx.mark_non_differentiable(*(a for a, bit in given if not needs & bit))
        return dx, dh0, dc0, *dweights

    @staticmethod
    def backward(ctx: Any, *wanted: Any) -> tuple[Any, ...]:
        """`wanted` are the gradients of the gradients, None for zeros."""
        if all(g is None for g in wanted):
            return (None,) * len(ctx.needs_input_grad)
        dy, dh_n, dc_n, dcells, cells, gates, *kept = ctx.saved_tensors
        grads, call, asked = OutputGrads(dy, dh_n, dc_n, dcells), _restored(kept, ctx.options), ctx.needs_input_grad
        asked_of = unflat(asked[9:])
        needs = Needs.of(bool(asked_of.x), bool(asked_of.h0), bool(asked_of.c0), any(asked_of.weights))
        by_grads, by_call = _second_derivative(call, grads, wanted, cells, gates, any(asked[2:6]), needs)
        of_grads = [None if g is None else s for g, s in zip(grads, by_grads, strict=True)]
        dx, dh0, dc0, dweights = by_call
        nothing = [None] * (_NUM_FIELDS - 3)
        return None, None, *of_grads, *[None] * 3, dx, dh0, dc0, *nothing, *(dweights or [None] * len(call.weights))


def _second_derivative(
    call: LayerCall,
    grads: OutputGrads,
    wanted: Sequence[Any],
    cells: Tensor,
    gates: Tensor,
    of_grads: bool,
    needs: Needs,
) -> tuple[OutputGrads, Grads]:
    """See `derivatives.second`; `wanted` is flat, and as long as what was needed."""
    if call.cell is not None:
        return composed.second(call, grads, wanted, of_grads, needs)
    wide = composed.compute_dtype(call.x.dtype)
    y: Tensor | None = None
    recorded = _is_grad_enabled()
    vx, vh0, vc0, *vweights = (None if a is None else a.to(wide) for a in wanted)
    vweights = vweights or [None] * len(call.weights)
    with torch.autocast(call.x.device.type, enabled=False):
        floats = call.cast(wide)
        if recorded or wide != call.x.dtype:  # a further derivative looks through it; gates of half types are rounded
            y, _, _, cells, gates = layer_forward(*forward_arguments(floats, Save.ALL))
        return derivatives.second(
            floats,
            OutputGrads(*(None if g is None else g.to(wide) for g in grads)),
            call._replace(x=vx, h0=vh0, c0=vc0, weights=vweights),
            cells,
            None if recorded else gates,
            y,
            of_grads,
            needs,
        )


_OPTIONS = slice(6, 9)  # of a flat call: directions, batch_first and cell; all else are tensors or None


def _tensors(flat: Sequence[Any]) -> tuple[Tensor | None, ...]:
    """What a flat call can save."""
    return *flat[: _OPTIONS.start], *flat[_OPTIONS.stop :]


def _restored(tensors: Sequence[Any], options: tuple[Directions, bool, Cell | None]) -> LayerCall:
    """A flat call whose tensors alone were saved."""
    return unflat((*tensors[: _OPTIONS.start], *options, *tensors[_OPTIONS.start :]))


def _register_autograd(op: Any, rule: Callable[..., Any]) -> None:
    """Makes `rule(below, arguments)` the derivative of an op, where anything asks for one."""

    def kernel(keyset: Any, *arguments: Any) -> Any:
        def below(*arguments: Any) -> Any:
            with _AutoDispatchBelowAutograd():
                return op.redispatch(keyset & _after_autograd_keyset, *arguments)

        recording = _is_grad_enabled()
        if "torch.distributed.tensor" in sys.modules:
            _take_dtensors()
        if is_eager() and not (recording and _any_requires_grad(*arguments)):
            return below(*arguments)

        def below_rule(*arguments: Any) -> Any:
            """A Function turns recording off for its own level; the levels outside of it go on."""
            with torch.set_grad_enabled(recording), _set_fwd_grad_enabled(True):
                return below(*arguments)

        with enable_single_level_autograd_function():
            return rule(below_rule, arguments)

    _library.impl(op.name(), kernel, "Autograd", with_keyset=True)


def _differentiable_forward(below: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    call, save = forward_of(arguments)
    return apply(LayerFunction, lambda call, save: below(*forward_arguments(call, save)), save, *flat(call))


def _differentiable_backward(below: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    call, saved, grads, needs = backward_of(arguments)

    def run(*named: Any) -> Any:
        return below(*backward_arguments(*named))

    dx, dh0, dc0, *dweights = apply(LayerGradFunction, run, needs, *grads, *saved, *flat(call))
    return dx, dh0, dc0, dweights


@cache
def _take_dtensors() -> None:
    """Registers what the ops do with DTensors, which only a program that imports torch.distributed.tensor has."""
    from . import sharding

    for op in (layer_forward, layer_backward):
        sharding.register(op)


_register_autograd(layer_forward, _differentiable_forward)
_register_autograd(layer_backward, _differentiable_backward)


# vmap ----------------------------------------------------------------------------------------------------------------
#
# Dimensions that are mapped come as a tuple like the arguments: with the names of a call, or of gradients.


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


def _select(a: Any, dim: Any, n: int, size: int) -> Any:
    """Entry n of the mapped dimension, of a list of each; zeros if there is none."""
    if isinstance(a, (list, tuple)):
        dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(a)
        return [_select(each, d, n, size) for each, d in zip(a, dims, strict=True)]
    if dim is None:
        return a
    return a.select(dim, n) if size else a.new_zeros(a.shape[:dim] + a.shape[dim + 1 :])


def one_by_one(op: Callable[..., Any], size: int, in_dims: Sequence[Any], arguments: Sequence[Any]) -> Any:
    """Calls the op for each entry of the mapped dimension and stacks the results in front."""

    def stack(column: tuple[Any, ...]) -> Any:
        if isinstance(column[0], list):
            return [torch.stack(each)[:size] for each in zip(*column, strict=True)]
        return torch.stack(column)[:size]

    def entry(n: int) -> Any:
        return op(*(_select(a, dim, n, size) for a, dim in zip(arguments, in_dims, strict=True)))

    stacked = tuple(stack(column) for column in zip(*(entry(n) for n in range(max(size, 1))), strict=True))
    return stacked, tuple([0] * len(a) if isinstance(a, list) else 0 for a in stacked)


class Batch:
    """Mapped calls as one call of a larger batch."""

    def __init__(self, call: LayerCall, size: int):
        self.call, self.size = call, size
        # Packed rows of a step stay together, so there the mapped dimension is the faster one.
        self.packed = call.batch_sizes is not None
        self.axis = 0 if self.packed or call.batch_first else 1  # of the batch in what is laid out as x
        self.saved_axis = 1 if self.packed else 2  # in cells and gates

    def fold(self, a: Tensor | None, dim: int | None, axis: int) -> Tensor | None:
        """`a`, whose batch is that axis, with the mapped dimension in it."""
        return _fold(a, dim, axis, self.size, self.packed)

    def fold_call(self, dims: LayerCall) -> LayerCall:
        """The call of all rows; `dims` are the mapped dimensions of its arrays."""
        call = self.call
        return call._replace(
            x=self.fold(call.x, dims.x, self.axis),
            h0=self.fold(call.h0, dims.h0, 1),
            c0=self.fold(call.c0, dims.c0, 1),
            lengths=self.fold(call.lengths, dims.lengths, 0),
            resets=self.fold(call.resets, dims.resets, self.axis),
            batch_sizes=None if call.batch_sizes is None else call.batch_sizes * self.size,
        )

    def unfold(self, outputs: Sequence[Tensor], axes: Sequence[int]) -> tuple[list[Tensor], list[int | None]]:
        """The way back, of outputs whose batches are these axes; and where their mapped dimensions are."""
        unfolded = [_unfold(a, axis, self.size, self.packed) for a, axis in zip(outputs, axes, strict=True)]
        return [a for a, _ in unfolded], [dim for _, dim in unfolded]


def foldable(size: int, call: LayerCall, dims: LayerCall) -> bool:
    """Mapped rows with shared weights are one larger batch; but masks are drawn by the number of a row."""
    weights = dims.weights if isinstance(dims.weights, (list, tuple)) else [dims.weights]
    return size > 0 and dims.batch_sizes is None and all(dim is None for dim in weights) and call.seed is None


@torch.library.register_vmap("lstm_ext::layer_forward")
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    (call, save), dims, size = forward_of(arguments), LayerCall(*in_dims[:9]), info.batch_size
    if not foldable(size, call, dims):
        return one_by_one(layer_forward, size, in_dims, arguments)
    batch = Batch(call, size)
    outputs = layer_forward(*forward_arguments(batch.fold_call(dims), save))
    unfolded, out_dims = batch.unfold(outputs, (batch.axis, 1, 1, batch.saved_axis, batch.saved_axis))
    return tuple(unfolded), tuple(out_dims)


@torch.library.register_vmap("lstm_ext::layer_backward")
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    call, saved, grads, needs = backward_of(arguments)
    size = info.batch_size
    g, (x, h0, c0, weights), (y, cells, gates), masks = in_dims[:4], in_dims[4:8], in_dims[8:11], in_dims[11:16]
    dims = LayerCall(x, h0, c0, weights, *masks)
    if needs & Needs.WEIGHTS or not foldable(size, call, dims):  # the kernel adds up over the batch
        return one_by_one(layer_backward, size, in_dims, arguments)
    batch = Batch(call, size)
    axis, saved_axis = batch.axis, batch.saved_axis
    folded = (
        batch.fold_call(dims),
        Saved(*map(batch.fold, saved, (cells, gates, y), (saved_axis, saved_axis, axis))),
        OutputGrads(*map(batch.fold, grads, g, (axis, 1, 1, saved_axis))),
    )
    *outputs, _ = layer_backward(*backward_arguments(*folded, needs))
    unfolded, out_dims = batch.unfold(outputs, (axis, 1, 1))
    return (*unfolded, []), (*out_dims, [])


# The way in ----------------------------------------------------------------------------------------------------------


def _unwrapped(a: Tensor | None) -> Tensor | None:
    while a is not None and is_functorch_wrapped_tensor(a):
        a = get_unwrapped(a)
    return a


def check_watched(call: LayerCall) -> None:
    """`check`; the values too where they can be seen: on the CPU, below vmap and the other transforms of torch.func."""
    check(call, values=False)
    if call.x.is_cpu and not is_compiling() and not _len_torch_dispatch_stack():
        lengths, batch_sizes = _unwrapped(call.lengths), _unwrapped(call.batch_sizes)
        check_values(lengths, batch_sizes, call.num_steps(), call.x.shape[0])


@constant_to_compilers
def _is_transformed() -> bool:
    """Whether a transform of torch.func is under way: compilers ask as they trace."""
    return get_dynamic_layer_stack_depth() > 0


@constant_to_compilers
def _is_exporting() -> bool:
    """`torch.compiler.is_exporting`, which the compiler of torch 2.11 takes for True."""
    return is_exporting()


def forward(call: LayerCall, save: Save) -> Outputs:
    """The outputs, with the cells if asked for, of a call that something watches."""
    # What is traced or exported serves with gradients or without, so it saves nothing: `_first_derivative` runs the
    # forward pass again. vmap hides whether what it maps asks for gradients.
    recorded = _is_exporting() if is_compiling() else _get_tracing_state() is not None
    asked = _is_grad_enabled() and (_is_transformed() or requires_grad(call))
    y, h_n, c_n, cells, _ = layer_forward(*forward_arguments(call, Save.ALL if asked and not recorded else save))
    return Outputs(y, h_n, c_n, cells if save else None, None)
