"""Which engine takes a call with tensors: one table, of which the first row that applies wins."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch.compiler import is_compiling
from torch.jit import is_tracing  # type: ignore[attr-defined]

from . import _native, torch_op
from ._torch_private import (
    TransformType,
    _is_any_autocast_enabled,
    _RecordFunctionFast,
    constant_to_compilers,
    forward_ad,
    get_interpreter_stack,
    profiler,
)
from .call import REVERSE, CallTuple, LayerCall, Outputs, OutputsTuple, Save
from .cell import Cell
from .checks import check_kinds, check_step_state
from .engines import Engine, backends, choose, choose_under, composed, forced, logged, onnx, stock, warn_once
from .torch_op import PLAIN, TENSORS, LayerFunction, engine_of, is_eager, requires_grad

COMPILED = not _native.reason  # else most calls with CPU tensors are torch's, as `has_kernel` tells
DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
NOTHING, ALL = Save.NOTHING, Save.ALL

_INTEGERS = frozenset(
    getattr(torch, name) for name in ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64")
)
_is_grad_enabled = torch.is_grad_enabled


def run(call: CallTuple, save: Save = NOTHING) -> OutputsTuple:
    """The outputs of a layer, and with `Save.CELLS` its cells.

    Raises:
        TypeError, RuntimeError, ValueError: see `checks.check`; what else a kernel fails of is raised as it is.
    """
    if is_eager() and not _is_any_autocast_enabled():  # most calls: the last row of the table, without the others
        x = call[0]
        engine = choose_under(forced.get(), "cpu" if x.is_cpu else x.device.type, x.dtype).engine
        asks = _is_grad_enabled() and requires_grad(call)
        if engine is not None and not asks and (call[4] is None or getattr(call[4], "device", None) == x.device):
            outputs = engine.forward(call, save) if not profiler._is_profiler_enabled else _recorded(engine, call, save)
            if outputs is not NotImplemented:
                return outputs
    return _by_table(LayerCall(*call), save)


def _by_table(call: LayerCall, save: Save) -> OutputsTuple:
    device = call.x.device.type
    if _is_any_autocast_enabled() and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return run(call.cast(autocast_cell_dtype(call) if call.is_step else torch.get_autocast_dtype(device)), save)
    watched = not (is_eager() and _are_plain(call))
    served = has_kernel(call.x, "LSTM cell" if call.is_step else "LSTM")
    if watched and call.x.is_cpu and call.x.dtype in DTYPES:
        served = True  # the ops need no kernel there
    if call.cell is not None and served:
        served = _has_cell_kernel(call)
    if watched and not is_compiling():
        check_kinds(call)
    if call.is_step:
        check_step_state(call)
    more = (  # than torch has
        call.masked or save or call.directions == REVERSE or (call.is_step and call.projected) or call.cell is not None
    )
    if is_tracing() and not more:
        return _stock(call, save)
    if call.is_step and watched and served:
        outputs = Outputs(*run(call.with_time(), save))
        # Subclasses of Tensor have shapes of their own, which do not change in place.
        return outputs.squeeze_time_(call) if type(outputs.y) is Tensor else outputs.without_time(call)
    if call.lengths is not None:
        call = _with_own_lengths(call)

    if watched and onnx.is_exporting():
        return onnx.forward(call, save)
    if not served:
        return _composed(call, save) if more else _stock(call, save)
    if watched and _in_forward_mode():
        return _composed(call, save)
    if watched:
        return torch_op.forward(call, save)
    asks = _is_grad_enabled() and requires_grad(call)
    if call.cell is not None:
        return _with_cell(engine_of(call.x), call, save, asks)
    if asks:
        return differentiable(engine_of(call.x), call, save)
    return _recorded(engine_of(call.x), call, save)


def draw_seed(cell: Cell, x: Tensor) -> Tensor | None:
    """A number of torch's generator from which the masks of a layer are drawn; None if the cell draws none."""
    return torch.randint(2**63 - 1, (1,), device=x.device) if cell.draws else None


def seed_from(seed: Any, x: Tensor) -> Tensor:
    """A number, or what is one, as a seed beside x."""
    return torch.as_tensor(seed, dtype=torch.int64, device=x.device).reshape(1)


# What the rows ask ---------------------------------------------------------------------------------------------------


def _are_plain(call: LayerCall) -> bool:
    """Whether all are tensors that mean no more than their memory, of which an engine can make something."""
    plain = PLAIN.issuperset(map(type, (*call[:3], *call[4:7]))) and TENSORS.issuperset(map(type, call.weights))
    return plain and call.x.dtype in DTYPES and not call.x.is_meta


def _with_own_lengths(call: LayerCall) -> LayerCall:
    """Integer lengths as the op takes them, where x is; other dtypes as they are, for the checks to refuse."""
    lengths = call.lengths
    if not isinstance(lengths, Tensor) or lengths.dtype not in _INTEGERS:
        return call
    return call._replace(lengths=lengths.to(call.x.device, torch.int64))


@constant_to_compilers
def _in_forward_mode() -> bool:
    """Whether forward-mode duals may come, by themselves or from torch.func.jvp: compilers ask as they trace."""
    transforms = get_interpreter_stack() or ()
    return forward_ad._current_level >= 0 or any(each.key() is TransformType.Jvp for each in transforms)


@constant_to_compilers
def _has_gpu_kernels() -> bool:
    return backends()["cuda"].available


def has_kernel(x: Tensor, what: str = "LSTM") -> bool:
    """Whether a kernel runs for x, or its shape rule for meta tensors; if not, torch's own `what` does, and says so."""
    if x.is_meta:
        return True
    if is_compiling():
        return (x.is_cpu or (x.is_cuda and _has_gpu_kernels())) and x.dtype in DTYPES
    choice = choose(x.device.type, x.dtype)
    if choice.name is None and x.is_cpu and x.dtype in DTYPES:
        if not _native.missing:  # else that was said as it was missed
            warn_once(f"lstm_ext runs torch's own LSTM: the compiled kernels are missing ({_native.reason})")
    elif choice.name is None:
        warn_once(f"lstm_ext runs torch's own {what} on {x.device.type} tensors of {x.dtype}: {choice.reason}")
    return choice.name is not None


def is_torchs(x: Tensor, what: str = "LSTM") -> bool:
    """Whether torch's own module takes a call that asks for nothing new. The ops need no kernel on the CPU."""
    return not has_kernel(x, what) and (is_eager() or not x.is_cpu)


def _has_cell_kernel(call: LayerCall) -> bool:
    """Whether a kernel runs for such a cell; if not, a warning says that torch's operations do."""
    if not call.x.is_cuda or call.cell is None or not (why := call.cell.refused_on_gpu):
        return True
    if not is_compiling():
        warn_once(f"lstm_ext runs LSTMs with options in torch's operations on cuda tensors: no CUDA kernel has {why}")
    return False


def autocast_cell_dtype(call: LayerCall) -> torch.dtype:
    """The dtype of the c that torch's cell returns under autocast.

    On the CPU it multiplies in autocast's dtype and adds the products to c, which stays as wide as it was.
    """
    x, c0 = call.x, call.c0
    for name, a in (("hx[0]", call.h0), *(("weights", w) for w in call.weights)):
        if a is not None and (a.dtype == torch.float64) != (x.dtype == torch.float64):
            raise RuntimeError(f"{name}: expected dtype float64 if and only if x has it, got {a.dtype} and {x.dtype}")
    dtype = x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(x.device.type)
    return torch.promote_types(dtype, x.dtype if c0 is None else c0.dtype) if x.is_cpu else dtype


# What they run -------------------------------------------------------------------------------------------------------


def _stock(call: LayerCall, save: Save) -> Outputs:
    outputs = stock.forward(call, save)
    say_torchs(call)
    return outputs


def _composed(call: LayerCall, save: Save) -> Outputs:
    torch_op.check_watched(call)
    outputs = composed.forward(call, save)
    if logged.ON and not is_compiling():
        _log(call, "torch's operations, step by step")
    return outputs if save else outputs._replace(cells=None)


def say_torchs(call: LayerCall) -> None:
    """Logs a call that a module has left to torch's own class."""
    if logged.ON and not is_compiling():
        _log(call, "torch's own LSTM")


def _log(call: LayerCall, name: str) -> None:
    choice = choose(call.x.device.type, call.x.dtype)
    why = "a cell with options" if call.cell is not None and call.x.is_cuda else "forward-mode derivatives"
    why = choice.reason if choice.engine is None else "a trace" if is_tracing() else why
    logged.say("forward", call, name, "", why)


def _recorded(engine: Engine, call: CallTuple, save: Save) -> OutputsTuple:
    """An engine, seen by torch's profilers under the name of the op."""
    with _RecordFunctionFast("lstm_ext::layer_forward"):
        return engine.forward(call, save)


def _with_cell(engine: Engine, call: LayerCall, save: Save, asks: bool) -> OutputsTuple:
    """An engine, with its backward pass if a gradient is asked for; torch's operations if it takes no such cell."""
    with torch.no_grad() if asks else nullcontext():  # as within a function of autograd
        outputs = _recorded(engine, call, ALL if asks else save)
    if outputs is NotImplemented:
        return _composed(call, save)
    if not asks:
        return outputs
    y, h_n, c_n, cells, _ = torch_op.apply(LayerFunction, lambda *_: outputs, ALL, *torch_op.flat(call))
    return y, h_n, c_n, cells if save else None, None


def differentiable(engine: Engine, call: LayerCall, save: Save) -> OutputsTuple:
    """An engine with its own backward pass."""
    y, h_n, c_n, cells, _ = torch_op.apply(LayerFunction, engine.forward, ALL, *torch_op.flat(call))
    return y, h_n, c_n, cells if save else None, None


def is_proxy(input: Any) -> bool:
    """Whether torch.fx records this call."""
    return isinstance(input, fx.Proxy)


def without_none(**options: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def as_leaf(module: torch.nn.Module, input: Any, hx: Any, **options: Any) -> Any:
    """The call as one node of a graph that torch.fx records, as it is for the modules of torch."""
    args = (input,) if hx is None else (input, hx)
    return input.tracer.create_proxy("call_module", input.tracer.path_of_module(module), args, without_none(**options))
