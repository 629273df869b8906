"""What is wrong with a call, by name: what the compiled core (csrc/ops) checks itself, in the same words.

It is for the engines that the core does not stand before.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

import numpy as np

from . import dlpack
from .call import BOTH, DTYPES, Array, Arrays, LayerCall, OutputGrads, Saved, dtype_name
from .cell import Norm, check_cell

WEIGHTS = frozenset(
    name + suffix for name in ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr", "kernel", "bias") for suffix in ("", "_reverse")
)
MOST_NUMBERS = 2**52  # in an array of a layer: csrc/sizes.h
MOST_NAMED = 100  # in a message


class TooLargeError(RuntimeError):
    """Sizes that no memory stands for: what claims them is asked nothing more."""


def is_tensor(a: object) -> bool:
    """Whether `a` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(a, torch.Tensor)


def kind(a: object) -> str:
    """What sort of array `a` is, for messages."""
    if isinstance(a, np.ndarray) and not isinstance(a, np.ma.MaskedArray):
        return "numpy.ndarray"
    if is_tensor(a):
        return "torch.Tensor"
    library = dlpack.library_of(a)
    return type(a).__name__ if library is None else f"{library.__name__} array"


def check_kind(name: str, a: object, x: object = None) -> None:
    """`a` is an array, and of the kind of x if that is given."""
    if kind(a) not in (("numpy.ndarray", "torch.Tensor") if x is None else (kind(x),)):
        expected = "numpy.ndarray or torch.Tensor" if x is None else f"{kind(x)} as x is"
        raise TypeError(f"{name}: expected a {expected}, got {kind(a)}{_kind_hint(name, a, x)}")


def _kind_hint(name: str, a: object, x: object) -> str:
    """How it may become an array of the right kind, for the end of a message."""
    if isinstance(a, (list, tuple)) and (is_tensor(x) or isinstance(x, np.ndarray)):
        return f": use {'torch.tensor' if is_tensor(x) else 'np.array'}({name})"
    if isinstance(x, np.ndarray) and is_tensor(a):
        return ": all of one call are arrays or all tensors; torch.from_numpy(x) is a tensor"
    if is_tensor(x) and isinstance(a, np.ndarray):
        return f": all of one call are arrays or all tensors; torch.from_numpy({name}) is a tensor"
    return dlpack.why_not(a)


def check_kinds(call: LayerCall) -> None:
    """All are arrays of one kind."""
    check_kind("x", call.x)
    if any(w is None for w in call.weights):
        w_ih, w_hh = (*call.weights, None, None)[:2]
        name = "w_ih" if w_ih is None else "w_hh" if w_hh is None else "weights"
        raise TypeError(f"{name}: expected a {kind(call.x)} as x is, got None")
    for name, a in call.named():
        if a is not None:
            check_kind(name, a, call.x)


def _check_dtypes(arrays: Arrays, x: Array) -> None:
    expected = dtype_name(x)
    if expected not in DTYPES:
        raise RuntimeError(f"x: expected dtype {', '.join(sorted(DTYPES))}, got {expected}")
    for name, a in arrays:
        if a is None:
            continue
        got = dtype_name(a)
        if name == "seed":
            if got != "int64":
                raise TypeError(f"seed: expected dtype int64, got {got}")
        elif name == "resets":
            if got != "bool":
                use = "resets.astype(bool)" if isinstance(a, np.ndarray) else "resets.bool()"
                raise TypeError(f"resets: expected dtype bool, got {got}: use {use}")
        elif name in ("lengths", "batch_sizes"):
            if "int" not in got:
                use = f"{name}.astype(int)" if isinstance(a, np.ndarray) else f"{name}.long()"
                raise TypeError(f"{name}: expected an integer dtype, got {got}: use {use}")
        elif got != expected:
            if (
                name in ("w_ih", "kernel")
                and got in DTYPES
                and all(dtype_name(w) == got for n, w in arrays if n in WEIGHTS)
            ):
                raise RuntimeError(f"x: expected dtype {got} as the weights have, got {expected}")
            raise RuntimeError(f"{name}: expected dtype {expected} as x has, got {got}")


def _check_devices_and_layouts(arrays: Arrays, x: Array) -> None:
    if isinstance(x, np.ndarray):
        return
    for name, a in arrays:
        if a is not None and name != "batch_sizes" and a.device != x.device:
            raise RuntimeError(f"{name}: expected on device {x.device} as x is, got {a.device}")
    for name, a in arrays:
        if a is not None and str(a.layout) != "torch.strided":
            raise RuntimeError(f"{name}: expected a dense tensor (torch.strided), got {a.layout}")


def _check_rank(name: str, a: Array, rank: int) -> None:
    if len(a.shape) != rank:
        raise RuntimeError(f"{name}: expected {rank} dimensions, got {len(a.shape)}: shape {list(a.shape)}")


def _check_options(call: LayerCall) -> None:
    """What may be given together."""
    if call.batch_sizes is not None and call.batch_first:
        raise ValueError("batch_first: expected False with batch_sizes, got True")
    if call.batch_sizes is not None and call.masked:
        raise ValueError("lengths, resets: expected None with batch_sizes, got an array")
    if call.is_step and (call.lengths is not None or call.directions == BOTH):
        raise ValueError("directions, lengths: expected one direction and no lengths without a time axis")
    count, D, fewest, most = len(call.weights), call.num_directions, 2, 5
    if call.cell is not None:
        _check_cell(call)
        extra = len(call.cell.extra_weights)
        fewest, most = fewest + extra, (2 if call.cell.tensorflow else most) + extra
    if count % D or not fewest <= count // D <= most:
        number = f"{fewest} to {most}" if fewest < most else f"{most}"
        raise RuntimeError(f"weights: expected {number} arrays for each direction, got {count} for {D}")


def _check_cell(call: LayerCall) -> None:
    """Its numbers, and what they ask of the call."""
    cell = call.cell
    assert cell is not None
    check_cell(cell)
    if cell.proj_clip and not call.projected:
        raise ValueError(f"proj_clip: expected 0 without w_hr, got {cell.proj_clip}")
    if cell.draws and call.seed is None:
        raise ValueError("seed: expected int64 [1] where masks are drawn, got None")


def _refuse_shape(name: str, got: Sequence[int], dims: str, sizes: Sequence[int], hint: str = "") -> NoReturn:
    names = f"[{dims}] = " if dims else ""
    raise RuntimeError(f"{name}: expected shape {names}{list(sizes)}, got {list(got)}{hint}")


def _check_shape(name: str, a: Array, dims: str, sizes: Sequence[int]) -> None:
    got = tuple(a.shape)
    if got != tuple(sizes):
        transposed = len(sizes) == 2 and got == (sizes[1], sizes[0])
        _refuse_shape(name, got, dims, sizes, ": transposed?" if transposed else "")


def _check_first(call: LayerCall) -> None:
    """The weights of the first direction, from which H and P are read: which of w_ih, w_hh and x is the wrong one.

    Where w_ih agrees with w_hh it is x.
    """
    x = call.x
    if call.cell is not None and call.cell.tensorflow:
        H = call.widths[0]
        _check_shape("kernel", call.weights[0], "I + H, 4*H", (x.shape[-1] + H, 4 * H))
        return
    w = call.split_cell()[0]
    rows, columns = w.w_hh.shape
    if w.w_hr is None and rows != 4 * columns:
        H = rows if columns == 4 * rows else w.w_ih.shape[0] // 4
        _check_shape("w_hh", w.w_hh, "4*H, H", (4 * H, H))
    if w.w_hr is not None and rows != w.w_ih.shape[0] == columns:
        _check_shape("w_hh", w.w_hh, "4*H, P", (columns, rows))
    if rows % 4 == 0 and w.w_ih.shape[0] == rows and w.w_ih.shape[1] != x.shape[-1]:
        dims = ("I", "B, I", "B, T, I" if call.batch_first else "T, B, I")[len(x.shape) - 1]
        expected, hint = (*x.shape[:-1], w.w_ih.shape[1]), f": w_ih is {list(w.w_ih.shape)}"
        _refuse_shape("x", x.shape, dims if call.batch_sizes is None else "N, I", expected, hint)


def _layout_hint(call: LayerCall, T: int, B: int) -> str:
    """Where sizes would fit if time and batch of x changed places."""
    if call.is_step or call.batch_sizes is not None or T == B:
        return ""
    if call.batch_first:
        return ": x is taken as [B, T, I] (batch_first); is it [T, B, I]?"
    return ": x is taken as [T, B, I]; is it [B, T, I] (batch_first)?"


def _check_states(call: LayerCall, H: int, P: int, T: int, B: int) -> None:
    """Of a single direction they are told without that axis, as `lstm` takes them."""
    D, sizes = call.num_directions, call.state_sizes(B)
    pair = (("h0", call.h0, "P", P, call.c0, H), ("c0", call.c0, "H", H, call.h0, P))
    for name, a, letter, width, other, other_width in pair:
        expected = (*sizes, width)
        if a is None or tuple(a.shape) == expected:
            continue
        got = tuple(a.shape)
        one = not call.is_step and D == 1 and got[:1] == (1,)
        hint = ""
        if other is not None and got == (*sizes, other_width) and tuple(other.shape) == expected:
            hint = ": the pair is (h, c); swapped?"
        elif one and got[1:] == expected:
            hint = ": lstm() takes [B, P] and [B, H], no axis of layers"
        elif not call.is_step and got == (D, T, width):
            hint = _layout_hint(call, T, B)
        dims = ("", "B, ", "B, " if one else "D, B, ")[len(sizes)] + letter
        _refuse_shape(name, got[one:], dims, expected[one:], hint)


def _check_masks(call: LayerCall, T: int, B: int) -> None:
    lengths, resets = call.lengths, call.resets
    if lengths is not None and tuple(lengths.shape) != (B,):
        _refuse_shape("lengths", lengths.shape, "B", (B,), _layout_hint(call, T, B) if lengths.shape == (T,) else "")
    if resets is not None and call.is_step:
        sizes = call.state_sizes(B)
        _check_shape("resets", resets, "B" if sizes else "", sizes)
    elif resets is not None:
        sizes = (B, T) if call.batch_first else (T, B)
        if tuple(resets.shape) != sizes:
            hint = _layout_hint(call, T, B) if tuple(resets.shape) == sizes[::-1] else ""
            _refuse_shape("resets", resets.shape, "B, T" if call.batch_first else "T, B", sizes, hint)


def check_ranks(call: LayerCall) -> None:
    """The ranks of those arrays from which sizes are read."""
    if call.batch_sizes is not None:
        _check_rank("x", call.x, 2)
        _check_rank("batch_sizes", call.batch_sizes, 1)
    elif not call.is_step:
        _check_rank("x", call.x, 3)
    for w in call.named_weights():
        for name in ("w_ih", "w_hh", "kernel"):
            if name in w:
                _check_rank(name, w[name], 2)


def check_shapes(call: LayerCall, T: int, B: int) -> None:
    """The sizes of all arrays, whose ranks and dtypes count as checked."""
    _check_first(call)
    H, P = call.widths
    expected = {
        "w_ih": ("4*H, I", (4 * H, call.x.shape[-1])),
        "w_hh": ("4*H, P", (4 * H, P)) if call.projected else ("4*H, H", (4 * H, H)),
        "b_ih": ("4*H", (4 * H,)),
        "b_hh": ("4*H", (4 * H,)),
        "w_hr": ("P, H", (P, H)),
    }
    if call.cell is not None:
        expected |= {
            "kernel": ("I + H, 4*H", (call.x.shape[-1] + H, 4 * H)),
            "bias": ("4*H", (4 * H,)),
            "peephole": ("3, H", (3, H)),
            "gamma": ("4*H", (4 * H,)) if call.cell.norm == Norm.GATES else ("2, 4*H", (2, 4 * H)),
            "beta": ("4*H", (4 * H,)),
            "gamma_h": ("H", (H,)),
            "beta_h": ("H", (H,)),
            "seed": ("1", (1,)),
        }
    for name, a in call.named():
        if a is not None and name.removesuffix("_reverse") in expected:
            _check_shape(name, a, *expected[name.removesuffix("_reverse")])
    _check_masks(call, T, B)
    _check_states(call, H, P, T, B)


def _check_sizes(call: LayerCall, T: int, B: int) -> None:
    """There are units, and so few numbers that products of sizes do not overflow: expanded arrays state any size."""
    I, (H, P) = call.x.shape[-1], call.widths  # noqa: E741
    rows = call.x.shape[0] if call.batch_sizes is not None else max(T * B, T if call.batch_first else 0)
    if not all(type(size) is int for size in (T, B, I, H, P, rows)):
        return  # symbols of a compiler, which would guard what is seen here
    if (H == 0 and not call.is_step) or (P == 0 and call.projected):
        w_hh = call.weights[0 if call.cell is not None and call.cell.tensorflow else 1]
        raise RuntimeError(f"w_hh: expected at least one hidden unit, got shape {list(w_hh.shape)}")
    if max(rows * max(I, 4 * H, P, 1), 4 * H * max(I, P, 1)) > MOST_NUMBERS:
        got = f"{min(rows, 2**63 - 1)} rows, I = {I}, H = {H}, P = {P}"
        raise TooLargeError(f"x, weights: expected at most 2**52 numbers in an array of the layer, got {got}")


def check_values(lengths: Array | None, batch_sizes: Array | None, num_steps: int, num_rows: int) -> None:
    """What only the contents tell: the range of lengths, and that batch_sizes describe the packed rows."""
    if lengths is not None and lengths.shape[0]:
        known = lengths.long() if is_tensor(lengths) else lengths  # torch has no least of unsigned ones
        least, most = int(known.min()), int(known.max())
        if least < 0 or most > num_steps:
            got = f"{least} to {most}" if least < most else f"{least}"
            raise ValueError(f"lengths: expected values from 0 to T = {num_steps}, got {got}")
    if batch_sizes is not None:
        sizes = batch_sizes.tolist() if num_steps <= num_rows else [0]
        if sum(sizes) != num_rows or sizes[-1] < 1 or sizes != sorted(sizes, reverse=True):
            got = batch_sizes.tolist() if num_steps <= MOST_NAMED else f"{num_steps} of them"
            raise RuntimeError(f"batch_sizes: expected positive, descending values with sum N = {num_rows}, got {got}")


def check(call: LayerCall, values: bool = True) -> None:
    """Says what is wrong with a call, if anything is; `values=False` looks at no contents.

    Raises:
        TypeError: not an array, arrays of two kinds, lengths not integer or resets not bool.
        RuntimeError: dtype, device, layout or shape, as torch does.
        ValueError: a length out of range.
    """
    check_kind("x", call.x)
    _check_options(call)
    check_kinds(call)
    x, arrays = call.x, call.named()
    _check_dtypes(arrays, x)
    _check_devices_and_layouts(arrays, x)

    check_ranks(call)
    if call.is_step:
        check_step_state(call)
    T = call.num_steps()
    if T == 0:
        raise RuntimeError(f"x: expected at least one time step, got T = 0: shape {list(x.shape)}")
    if call.batch_sizes is None or values:
        B = call.batch_size()
    else:
        B = next((a.shape[1] for a in (call.h0, call.c0) if a is not None), 0)
    check_shapes(call, T, B)
    _check_sizes(call, T, B)
    if values:
        check_values(call.lengths, call.batch_sizes, T, x.shape[0])


def check_step_state(call: LayerCall) -> None:
    """The ranks of the state of a single step; the type of the error is that of torch's cell."""
    for name, a in (("h0", call.h0), ("c0", call.c0)):
        if a is not None and len(a.shape) not in (1, 2):
            raise ValueError(f"{name}: expected 1 or 2 dimensions, got {len(a.shape)}: shape {list(a.shape)}")


def check_backward(call: LayerCall, saved: Saved, grads: OutputGrads) -> None:
    """The same of what a backward pass is given besides its call, which counts as checked.

    Raises:
        TypeError: not an array of x's kind, or nothing saved.
        RuntimeError: dtype, device, layout or shape.
    """
    arrays = [*grads._asdict().items(), *saved._asdict().items()]
    for name, a in arrays:
        if a is not None:
            check_kind(name, a, call.x)
    if any(a is None for a in saved[:2]):
        raise TypeError("cells, gates: expected what layer_forward left with Save.ALL, got None")
    if call.cell is not None and saved.y is None:
        raise TypeError("y: expected what layer_forward returned, got None")
    D, T, B, (H, P) = call.num_directions, call.num_steps(), call.batch_size(), call.widths
    rows = call.x.shape[:1] if call.batch_sizes is not None else (T, B)
    stored = dtype_name(call.x)
    wide = "float32" if stored in ("bfloat16", "float16") else stored
    sequence, state = (*call.x.shape[:-1], D * P), call.state_sizes(B)
    expected = {
        "dy": (stored, sequence),
        "dh_n": (stored, (*state, P)),
        "dc_n": (stored, (*state, H)),
        "dcells": (wide, (D, *rows, H)),
        "cells": (wide, (D, *rows, H)),
        "gates": (stored, (D, *rows, 4 * H)),
        "y": (stored, sequence),
    }
    _check_devices_and_layouts(arrays, call.x)
    for name, a in arrays:
        if a is not None:
            dtype, sizes = expected[name]
            if dtype_name(a) != dtype:
                raise RuntimeError(f"{name}: expected dtype {dtype}, got {dtype_name(a)}")
            _check_shape(name, a, "", sizes)
