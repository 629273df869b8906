"""Whether a CUDA kernel computes rightly on this GPU: a tiny case of it, against float64.

The core asks before the first launch of a kernel on a device; what is found is kept in a file, so that later processes
need not ask again. A kernel that fails is refused by all plans, and a warning says so. LSTM_EXT_SELF_CHECK=0 turns it
off. `python -m lstm_ext` runs the checks of all kernels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import _native, gpu_files
from ._warnings import warn_once
from .around_steps import from_steps, input_products, norm_of, normed_again
from .call import BOTH, LayerCall, Needs, Outputs, Save, Saved
from .cell import Activation, Cell, Norm
from .testing import TOLERANCES, Case, Inputs, Named, make_inputs, run_oracle, to_float64

VARIABLE = "LSTM_EXT_SELF_CHECK"
STRATEGIES = ("block", "cluster", "grid", "step")
BATCH_TILES = (1, 2, 4, 8)
ARITHMETICS = (("float32", False), ("float32", True), ("float64", False), ("bfloat16", False), ("float16", False))

OPTIONS = Cell(  # all that go together and have no corner, where rounding would decide
    Activation.SOFTSIGN,
    forget_bias=0.5,
    peephole=True,
    zoneout_h=0.2,
    zoneout_c=0.3,
    recurrent_dropout=0.25,
    candidate_dropout=0.2,
    training=True,
)
# For which there are kernels of their own, by the layout of the weights and what is normalised; "" is the plain LSTM.
CELLS: dict[str, Cell | None] = {"": None} | {
    layout + (f", {norm.name.lower()}" if norm else ""): OPTIONS._replace(
        tensorflow=layout == "TensorFlow", norm=norm, norm_epsilon=1e-3 if norm else 0.0
    )
    for norm in Norm
    for layout in ("torch", "TensorFlow")
}

FEW_THREADS = "/32"  # behind a kernel of normalised rows: of more units than threads

_lock = RLock()  # of the files; one check at a time


class Way(NamedTuple):
    """How to run exactly one kernel."""

    dtype: str
    tf32: bool
    forced: str  # strategy/batch tiles
    projected: bool
    backward: bool
    cell: str = ""  # one of CELLS

    def __str__(self) -> str:
        return (
            f"{'backward' if self.backward else 'forward'} {'tf32' if self.tf32 else self.dtype} {self.forced}"
            f"{' projected' if self.projected else ''}{f' options, {self.cell}' if self.cell else ''}"
        )

    @property
    def case(self) -> Case:
        """One sequence more than the tiles of a block hold; both directions, with lengths and resets."""
        rows = 8 * int(self.forced.split("/")[1]) + 1
        cell = CELLS[self.cell]
        P = 13 if self.projected or _launches_more(self.forced, self.cell) else 0
        return Case(4, rows, 3, 37, P=P, directions=BOTH, lengths="with_zero", resets=True, cell=cell)

    @property
    def judged(self) -> str:
        """Whose tolerance counts, and whose numbers the inputs are: TF32 keeps as many bits as float16."""
        return "float16" if self.tf32 else self.dtype


def _launches_more(forced: str, cell: str) -> bool:
    """Whether a way has kernels that go with a projection alone, and then always has one: normalised, step by step."""
    return forced.startswith("step/") and cell.startswith("torch, ")


class Finding(NamedTuple):
    """The largest error of a kernel, of the array where it is largest for what is allowed there."""

    error: float
    allowed: float
    array: str

    @property
    def share(self) -> float:
        """Of what is allowed; more than 1 is wrong."""
        return self.error / self.allowed

    @property
    def wrong(self) -> str:
        """What a plan says; "" for nothing."""
        if self.share <= 1:  # NaN is not
            return ""
        return f"its self-check failed: {self.array} is off by {self.error:.3g}, allowed are {self.allowed:.3g}"


# The case ------------------------------------------------------------------------------------------------------------


def _on(device: torch.device, inputs: Inputs, dtype: str) -> Inputs:
    return inputs.to_torch(dtype).map(lambda a: a.to(device)).map_masks(lambda a: a.to(device))


def _steps(call: LayerCall, x: Tensor) -> LayerCall:
    """What the kernels are asked: x is xw or the gates, and there are no w_ih."""
    return call._replace(x=x, weights=call.weights_of_steps())


def _tensor(a: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(a)).to(device, dtype)


def _forward(way: Way, inputs: Inputs, own: Inputs, device: torch.device) -> Named:
    """The outputs of the kernel; x W_ih' is made here, since torch's product may round as its user likes."""
    xw = input_products(inputs.call, np.nan_to_num(to_float64(inputs.x)))
    wide = torch.float64 if way.dtype == "float64" else torch.float32
    steps = _steps(own.call, _tensor(xw, wide, device))
    return Outputs(*_native.C.cuda_layer_forward(steps, Save.ALL, way.tf32, way.forced))._asdict()


def _backward(way: Way, own: Inputs, outputs: Named, device: torch.device) -> Named:
    """The gradients of what the kernel leaves, of `outputs` of the forward pass."""
    dtype = getattr(torch, way.dtype)
    wide = torch.float64 if way.dtype == "float64" else torch.float32
    gates = _tensor(outputs["gates"], dtype, device)
    y = None if own.case.cell is None else _tensor(outputs["y"], dtype, device)
    saved = Saved(_tensor(outputs["cells"], wide, device), gates, y)
    steps, x = _steps(own.call, gates), np.nan_to_num(to_float64(own.x))  # NaN past a length, where d_gates are zero
    asked = (steps, saved, own.grads, Needs.ALL, way.tf32, way.forced)
    if norm_of(own.call):
        again = normed_again(own.call, x, _native.C.cuda_h_before(steps, saved))
        normed, scales = (_tensor(a, wide, device) for a in again)
        results, products = _native.C.cuda_layer_backward(*asked, normed, scales), normed
    else:
        results, products = _native.C.cuda_layer_backward(*asked), None
    dx, dweights = from_steps(own.call, x.reshape(-1, x.shape[-1]), results, products)
    gradients: dict[str, Any] = {"dx": dx.reshape(x.shape), "dh0": results[5], "dc0": results[6]}
    return gradients | {f"dweights[{n}]": dw for n, dw in enumerate(dweights)}


def _finding(actual: Named, expected: Named, terms: int, dtype: str) -> Finding:
    worst = Finding(0.0, 1.0, "")
    for name, a in actual.items():
        ours, theirs = to_float64(a), to_float64(expected[name])
        counts = np.isfinite(theirs)
        allowed = TOLERANCES[dtype](terms) * max(1.0, float(np.abs(theirs[counts]).max(initial=0)))
        found = Finding(float(np.abs(ours - theirs)[counts].max(initial=0)), allowed, name)
        if not np.isfinite(found.error):
            return found._replace(error=float("inf"))
        worst = max(worst, found, key=lambda each: each.share)
    return worst


@torch.inference_mode(False)
@torch.no_grad()
def run(way: Way, device: int) -> Finding:
    """Runs the case on the current stream of the device, and waits for it.

    A kernel of normalised rows has code of its own for rows whose threads have several units: it runs both.
    """
    case, on = way.case, _device(device)
    of_step = way.forced.startswith("step/") and not way.forced.endswith(FEW_THREADS)
    if case.cell and case.cell.norm and of_step:
        several = run(way._replace(forced=way.forced + FEW_THREADS), device)
        if several.wrong:
            return several
    inputs = make_inputs(case, way.judged)
    outputs, gradients = run_oracle(inputs)
    with _waiting_allowed(on):
        own = _on(on, inputs, way.dtype)
        if way.backward:
            return _finding(_backward(way, own, outputs, on), gradients, case.gradient_terms, way.judged)
        return _finding(_forward(way, inputs, own, on), outputs, case.output_terms, way.judged)


def _device(number: int) -> torch.device:
    return torch.device("cuda", number)


@contextmanager
def _waiting_allowed(device: torch.device) -> Iterator[None]:
    """Once, for a check: the user may have told torch to raise where the host waits for the device."""
    mode = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
    if not mode:  # to set it is to be warned by torch
        yield
        return
    torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


# What the core asks --------------------------------------------------------------------------------------------------


def check(
    device: int, kernel: str, dtype: str, tf32: bool, forced: str, projected: bool, backward: bool, cell: str = ""
) -> str | None:
    """What is wrong with a kernel on a device, "" for nothing; None where it cannot be said now.

    Nothing may wait for a stream that is being captured, nor run besides what is captured; so the kernel runs unchecked
    there, and the next call asks again.
    """
    if os.environ.get(VARIABLE) == "0":
        return ""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return None
    way = Way(dtype, tf32, forced, projected, backward, cell)
    try:
        wrong = _kept_or_run(device, kernel, way).wrong
    except torch.OutOfMemoryError:
        return None
    except _Failed as error:
        wrong = f"its self-check failed: {error}"
    if wrong:
        warn_once(
            f"lstm_ext leaves out the CUDA kernel {kernel} ({way}): {wrong}. python -m lstm_ext checks all of them"
        )
    return wrong


class _Failed(Exception):
    """The kernel raised an error, rather than computing something."""


def _kept_or_run(device: int, kernel: str, way: Way) -> Finding:
    about = gpu_files.identity(device)
    path = gpu_files.path_of("checks", about)
    with _lock:
        with suppress(LookupError, TypeError, ValueError):
            known = _kernels(path, about)[kernel]
            found = Finding(float(known["error"]), float(known["allowed"]), str(known["array"]))
            if found.allowed > 0:
                return found
        _wait(_device(device))  # what fails here is earlier work, not this kernel: the user hears of it as of torch
        try:
            finding = run(way, device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise _Failed(error) from error
        with suppress(OSError):  # another process has to find out by itself
            kernels = _kernels(path, about) | {kernel: finding._asdict()}
            gpu_files.write(path, {"about": about, "kernels": kernels})
    return finding


def _wait(device: torch.device) -> None:
    """For what the current stream has been given so far."""
    if device.type == "cuda":
        with _waiting_allowed(device):
            torch.cuda.current_stream(device).synchronize()


def _kernels(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    """What is kept on each kernel."""
    kernels = (gpu_files.read(path, about) or {}).get("kernels")
    return kernels if isinstance(kernels, dict) else {}


# All kernels ---------------------------------------------------------------------------------------------------------


def ways(device: int) -> Iterator[tuple[Way, str]]:
    """All that can run on a device, and the kernel of each."""
    capability = _native.C.cuda_device(device)["compute_capability"]
    for (dtype, tf32), strategy, tiles, projected, backward, cell in product(
        ARITHMETICS, STRATEGIES, BATCH_TILES, (False, True), (False, True), CELLS
    ):
        if (tf32 and capability < 80) or (projected and cell.startswith("TensorFlow")):
            continue
        way = Way(dtype, tf32, f"{strategy}/{tiles}", projected, backward, cell)
        if not projected and _launches_more(way.forced, cell):
            continue
        case = way.case
        sizes = case.T, case.B, case.H, case.P, projected
        try:
            kernel = _native.C.cuda_plan(*sizes, dtype, tf32, 2, backward, way.forced, device, case.cell)["kernel"]
        except RuntimeError:  # this device or this arithmetic has no such kernel
            continue
        yield way, kernel
