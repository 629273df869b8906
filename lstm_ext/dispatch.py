"""Which way a call with tensors goes.

A layer or cell that no transform, mode or compiler watches goes straight to the backend (with gradients: through one
`autograd.Function`). Everything else goes through the ops, or, where these have no rule, in torch's own operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
)
from torch._C._functorch import (
    TransformType,
    get_dynamic_layer_stack_depth,
    get_interpreter_stack,
    get_unwrapped,
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
)
from torch.autograd import forward_ad
from torch.compiler import assume_constant_result, is_compiling, is_exporting

from . import _native, gpu, onnx
from .backend import backends, choose, warn_once
from .composed import composed_layer, torch_layer
from .functional import check, check_cell, check_kind, check_values, weight_names
from .ops import (
    DTYPES,
    PLAIN,
    REFUSALS,
    first_derivative,
    gpu_forward,
    layer_backward,
    layer_forward,
    needs_of,
    run_backward,
    run_forward,
    save_for_derivative,
    watched_by_nobody,
)
from .reference import FORWARD, REVERSE

_NOT_TENSORS = (*REFUSALS, AttributeError)
_NATIVE = frozenset({"cpu", "cuda"})
_INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})

_C: Any = _native.C

_get_num_threads = torch.get_num_threads
_is_grad_enabled = torch.is_grad_enabled


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any([a is not None and a.requires_grad for a in tensors])  # noqa: C419 (a list is faster than a generator)


# With gradients ------------------------------------------------------------------------------------------------------


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
        y, h_n, c_n, cells, gates = run_forward(*inputs, 2)
        save_for_derivative(ctx, inputs, y, cells, gates)
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
    plain = not _is_grad_enabled() and watched_by_nobody()
    needs = needs_of(needed[0], needed[1], needed[2], needed[3:])
    *own, dweights = first_derivative(saved, layout, gradients, needs, run_backward if plain else layer_backward)
    return [*own, *(dweights or [None] * len(needed[3:]))]


def _one_step(x: Tensor, h: Tensor | None, c: Tensor | None, *weights: Tensor | None) -> tuple[Any, Any, Any, Any]:
    """The x, h0, c0 and weights of a layer of one step that does what a cell does."""
    state = [None if a is None else a.unsqueeze(0) for a in (h, c)]
    return x.unsqueeze(0), state[0], state[1], [w for w in weights if w is not None]


class _Cell(torch.autograd.Function):
    """The short path of a cell with gradients: (h', c')."""

    @staticmethod
    def forward(ctx: Any, *tensors: Any) -> tuple[Tensor, Tensor]:
        y, _, c_n, cells, gates = run_forward(*_one_step(*tensors), None, None, None, FORWARD, False, 2)
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


# Entries -------------------------------------------------------------------------------------------------------------


def _runs(x: Tensor) -> bool:
    """Whether a backend computes on plain tensors like x: always on the CPU, with kernels on a GPU."""
    return x.is_cpu or (x.is_cuda and choose("cuda", x.dtype).name is not None)


def _as_int64(lengths: Tensor, x: Tensor) -> Tensor:
    """Integer lengths as the backends take them; other dtypes as they are, for the checks to refuse."""
    return lengths.to(x.device, torch.int64) if lengths.dtype in _INTEGERS else lengths


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
    if _is_any_autocast_enabled() or not watched_by_nobody() or not (x.is_cpu or x.is_cuda):
        return None
    save, threads = 1 if cells_wanted else 0, _get_num_threads()
    try:
        name = choose("cpu" if x.is_cpu else "cuda", x.dtype).name
        if name not in _NATIVE or (_is_grad_enabled() and _any_requires_grad(x, h0, c0, *weights)):
            return None
        if name == "cuda":
            return gpu_forward(x, h0, c0, weights, lengths, resets, batch_sizes, directions, batch_first, save)[:4]
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
        watched_by_nobody()
        and _runs(x)
        and x.dtype in DTYPES
        and PLAIN.issuperset(map(type, (x, h0, c0, lengths, resets, batch_sizes, *weights)))
    ):
        return _watched_layer(x, h0, c0, weights, lengths, resets, batch_sizes, directions, batch_first, cells_wanted)
    if _is_grad_enabled() and _any_requires_grad(x, h0, c0, *weights):
        y, h_n, c_n, cells = _Layer.apply(x, h0, c0, lengths, resets, batch_sizes, directions, batch_first, *weights)
        return y, h_n, c_n, cells if cells_wanted else None
    return run_forward(x, h0, c0, weights, lengths, resets, batch_sizes, directions, batch_first, int(cells_wanted))[:4]


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
    if _is_any_autocast_enabled() or not watched_by_nobody() or not (x.is_cpu or x.is_cuda):
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
    if watched_by_nobody() and _runs(x) and PLAIN.issuperset(map(type, tensors)):
        try:
            return _Cell.apply(*tensors)
        except REFUSALS:
            check_cell(*tensors)
            raise
    if not is_compiling():
        check_cell(*tensors)
    h_n, c_n = layer(*_one_step(*tensors), None, None, None, FORWARD, False, False)[1:3]
    return h_n.squeeze(0), c_n.squeeze(0)
