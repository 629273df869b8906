"""`lstm` and `lstm_cell` for arrays of any kind: argument forms, checks, and the way to the backend."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, overload

import numpy as np

from . import _native, dlpack, reference
from .backend import DTYPES, choose
from .reference import BOTH, FORWARD, REVERSE

_C: Any = _native.C

Array = Any  # a NumPy array or a torch tensor; all of one call are of one kind
A = TypeVar("A")  # an array of any kind, or of the kinds of another library


_dispatch: Any = None


def tensor_dispatch() -> Any:
    """`lstm_ext.dispatch`, which imports torch, once tensors have come."""
    global _dispatch
    if _dispatch is None:
        from . import dispatch

        _dispatch = dispatch
    return _dispatch


# What the arguments are ----------------------------------------------------------------------------------------------


def is_tensor(a: object) -> bool:
    """Whether `a` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(a, torch.Tensor)


def _kind(a: object) -> str:
    if isinstance(a, np.ndarray) and not isinstance(a, np.ma.MaskedArray):
        return "numpy.ndarray"
    if is_tensor(a):
        return "torch.Tensor"
    library = dlpack.library_of(a)
    return type(a).__name__ if library is None else f"{library.__name__} array"


def _dtype_name(a: Array) -> str:
    return a.dtype.name if isinstance(a, np.ndarray) else str(a.dtype).removeprefix("torch.")


def check_kind(name: str, a: object, x: object = None) -> None:
    """`a` is an array, and of the kind of x if that is given."""
    if _kind(a) not in (("numpy.ndarray", "torch.Tensor") if x is None else (_kind(x),)):
        expected = "numpy.ndarray or torch.Tensor" if x is None else f"{_kind(x)} as x is"
        raise TypeError(f"{name}: expected a {expected}, got {_kind(a)}{dlpack.why_not(a)}")


def _check_kinds(arrays: Sequence[tuple[str, Array, Any]], x: Array) -> None:
    check_kind("x", x)
    for name, a, _ in arrays:
        if a is not None:
            check_kind(name, a, x)


def _check_dtypes(arrays: Sequence[tuple[str, Array, Any]], x: Array) -> None:
    expected = _dtype_name(x)
    if expected not in DTYPES:
        raise RuntimeError(f"x: expected dtype {', '.join(sorted(DTYPES))}, got {expected}")
    for name, a, _ in arrays:
        if a is None:
            continue
        got = _dtype_name(a)
        if name == "resets":
            if got != "bool":
                raise TypeError(f"resets: expected dtype bool, got {got}")
        elif name in ("lengths", "batch_sizes"):
            if "int" not in got:
                raise TypeError(f"{name}: expected an integer dtype, got {got}")
        elif got != expected:
            raise RuntimeError(f"{name}: expected dtype {expected} as x has, got {got}")


def _check_devices_and_layouts(arrays: Sequence[tuple[str, Array, Any]], x: Array) -> None:
    if isinstance(x, np.ndarray):
        return
    for name, a, _ in arrays:
        if a is not None and name not in ("lengths", "batch_sizes") and a.device != x.device:
            raise RuntimeError(f"{name}: expected on device {x.device} as x is, got {a.device}")
    for name, a, _ in arrays:
        if a is not None and str(a.layout) != "torch.strided":
            raise RuntimeError(f"{name}: expected a dense tensor (torch.strided), got {a.layout}")


def _check_shapes(arrays: Sequence[tuple[str, Array, Any]]) -> None:
    for name, a, (dims, expected) in arrays:
        if a is not None and tuple(a.shape) != tuple(expected):
            names, sizes = ", ".join(dims), ", ".join(map(str, expected))
            raise RuntimeError(f"{name}: expected shape [{names}] = [{sizes}], got {list(a.shape)}")


def check_values(lengths: Array | None, batch_sizes: Array | None, num_steps: int, num_rows: int) -> None:
    """What only the contents tell: the range of lengths, and that batch_sizes describe the packed rows."""
    if lengths is not None and lengths.shape[0]:
        least, most = int(lengths.min()), int(lengths.max())
        if least < 0 or most > num_steps:
            raise ValueError(f"lengths: expected values from 0 to T = {num_steps}, got {least} to {most}")
    if batch_sizes is not None:
        sizes = batch_sizes.tolist()
        if sum(sizes) != num_rows or sizes[-1] < 1 or sizes != sorted(sizes, reverse=True):
            raise RuntimeError(
                f"batch_sizes: expected positive, descending values with sum N = {num_rows}, got {sizes}"
            )


def weight_names(weights: Sequence[Array], directions: int) -> list[str]:
    """What the entries of a layer's weight list are called."""
    D = 2 if directions == BOTH else 1
    per_direction = len(weights) // D
    names = [
        "w_ih",
        "w_hh",
        *(["b_ih", "b_hh"] if per_direction >= 4 else []),
        *(["w_hr"] if per_direction % 2 else []),
    ]
    return [name + suffix for suffix in ("", "_reverse")[:D] for name in names]


def check(
    x: Array,
    h0: Array | None,
    c0: Array | None,
    weights: Sequence[Array],
    lengths: Array | None,
    resets: Array | None,
    batch_sizes: Array | None,
    directions: int,
    batch_first: bool,
    values: bool = True,
) -> None:
    """Says what is wrong with the arguments of a layer, if anything is; `values=False` looks at no contents.

    Raises:
        TypeError: not an array, arrays of two kinds, lengths not integer or resets not bool.
        RuntimeError: dtype, device, layout or shape, as torch does.
        ValueError: a length out of range.
    """
    names = weight_names(weights, directions)
    arrays: list[tuple[str, Array, Any]] = [("x", x, None)]
    arrays += [(name, w, None) for name, w in zip(names, weights, strict=True)]
    arrays += [("h0", h0, None), ("c0", c0, None)]
    arrays += [("lengths", lengths, None), ("resets", resets, None), ("batch_sizes", batch_sizes, None)]
    _check_kinds(arrays, x)
    _check_dtypes(arrays, x)
    _check_devices_and_layouts(arrays, x)

    rank = 3 if batch_sizes is None else 2
    if len(x.shape) != rank:
        raise RuntimeError(f"x: expected {rank} dimensions, got {len(x.shape)}: shape {list(x.shape)}")
    for name, w in zip(names[:2], weights, strict=False):
        if len(w.shape) != 2:
            raise RuntimeError(f"{name}: expected 2 dimensions, got {len(w.shape)}: shape {list(w.shape)}")
    H, P = weights[1].shape[0] // 4, weights[1].shape[1]
    if batch_sizes is None:
        B, T = x.shape[:2] if batch_first else (x.shape[1], x.shape[0])
    else:
        T = batch_sizes.shape[0]
        B = int(batch_sizes[0]) if values and T else next((a.shape[1] for a in (h0, c0) if a is not None), 0)
    if T == 0:
        raise RuntimeError(f"x: expected at least one time step, got T = 0: shape {list(x.shape)}")
    steps = (("B", "T"), (B, T)) if batch_first else (("T", "B"), (T, B))
    D, projected = 2 if directions == BOTH else 1, "w_hr" in names
    shapes = {
        "h0": (("D", "B", "P"), (D, B, P)),
        "c0": (("D", "B", "H"), (D, B, H)),
        "w_ih": (("4*H", "I"), (4 * H, x.shape[-1])),
        "w_hh": (("4*H", "P"), (4 * H, P if projected else H)),
        "b_ih": (("4*H",), (4 * H,)),
        "b_hh": (("4*H",), (4 * H,)),
        "w_hr": (("P", "H"), (P, H)),
        "lengths": (("B",), (B,)),
        "resets": steps,
    }
    keys = [(name.removesuffix("_reverse"), name, a) for name, a, _ in arrays]
    _check_shapes([(name, a, shapes[key]) for key, name, a in keys if key in shapes])
    if values:
        check_values(lengths, batch_sizes, T, x.shape[0])


# One layer, one cell -------------------------------------------------------------------------------------------------


def _plain(a: Array | None, dtype: Any = None) -> Array | None:
    """`a` as an aligned C-contiguous array in native byte order; `a` itself if it is one."""
    return None if a is None else np.require(a, dtype or a.dtype.newbyteorder("="), ["C", "A"])


def layer(
    x: Array,
    h0: Array | None,
    c0: Array | None,
    weights: list[Array],
    lengths: Array | None,
    resets: Array | None,
    batch_sizes: Array | None,
    directions: int,
    batch_first: bool,
    cells_wanted: bool,
) -> tuple[Array, Array, Array, Array | None]:
    """One layer, one or both directions: (y, h_n, c_n, cells), the last in the layout of `reference.layer_forward`."""
    if is_tensor(x):
        return tensor_dispatch().layer(
            x, h0, c0, weights, lengths, resets, batch_sizes, directions, batch_first, cells_wanted
        )
    check(x, h0, c0, weights, lengths, resets, batch_sizes, directions, batch_first)
    x, h0, c0, *weights = [_plain(a) for a in (x, h0, c0, *weights)]
    arguments = (
        *(x, h0, c0, weights, _plain(lengths, np.dtype(np.int64)), _plain(resets), batch_sizes),
        *(directions, batch_first, int(cells_wanted)),
    )
    if choose("cpu", x.dtype).name == "cpu":
        return _C.layer_forward(*arguments, 0)[:4]
    return reference.layer_forward(*arguments)[:4]


def _both_or_none(b_ih: Array | None, b_hh: Array | None) -> list[Array]:
    """The bias entries of a weight list: a bias given alone is joined by zeros."""
    if b_ih is None and b_hh is None:
        return []
    if b_ih is None or b_hh is None:
        given: Any = b_ih if b_ih is not None else b_hh
        check_kind("b_ih" if b_hh is None else "b_hh", given)
        zeros = given * 0 if isinstance(given, np.ndarray) else given.new_zeros(given.shape)
        return [given, zeros] if b_hh is None else [zeros, given]
    return [b_ih, b_hh]


def _split_state(state: Any) -> tuple[Array | None, Array | None]:
    if state is None:
        return None, None
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        size = f" of {len(state)}" if isinstance(state, (tuple, list)) else ""
        raise TypeError(f"state: expected None or a pair (h, c), got {_kind(state)}{size}")
    return state[0], state[1]


def _with_direction(name: str, a: Array | None, x: Array) -> Array | None:
    """[B, …] → [1, B, …]."""
    if a is None:
        return None
    check_kind(name, a, x)
    return a[None]


def _through_dlpack(
    function: Callable[..., Any], state: Any, arrays: Mapping[str, Any], **options: bool
) -> tuple[Any, ...]:
    """`function` on arrays of the library of x; the results are arrays of that library too."""
    x = arrays["x"]
    state = dict(zip(("state[0]", "state[1]"), _split_state(state), strict=True))
    given = {name: a for name, a in {**arrays, **state}.items() if a is not None}
    for name, a in given.items():
        check_kind(name, a, x)
    views = dlpack.take(given)
    result = function(state=tuple(views.pop(name, None) for name in state), **views, **options)
    return dlpack.give(result, x)


@overload
def lstm(
    x: A,
    state: tuple[A, A] | None,
    w_ih: A,
    w_hh: A,
    b_ih: A | None = None,
    b_hh: A | None = None,
    *,
    w_hr: A | None = None,
    reverse: bool = False,
    lengths: Any = None,
    resets: Any = None,
    return_cells: Literal[False] = False,
) -> tuple[A, tuple[A, A]]: ...
@overload
def lstm(
    x: A,
    state: tuple[A, A] | None,
    w_ih: A,
    w_hh: A,
    b_ih: A | None = None,
    b_hh: A | None = None,
    *,
    w_hr: A | None = None,
    reverse: bool = False,
    lengths: Any = None,
    resets: Any = None,
    return_cells: Literal[True],
) -> tuple[A, tuple[A, A], A]: ...
@overload
def lstm(
    x: A,
    state: tuple[A, A] | None,
    w_ih: A,
    w_hh: A,
    b_ih: A | None = None,
    b_hh: A | None = None,
    *,
    w_hr: A | None = None,
    reverse: bool = False,
    lengths: Any = None,
    resets: Any = None,
    return_cells: bool = False,
) -> tuple[Any, ...]: ...
def lstm(
    x: Array,
    state: tuple[Array, Array] | None,
    w_ih: Array,
    w_hh: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
    *,
    w_hr: Array | None = None,
    reverse: bool = False,
    lengths: Array | None = None,
    resets: Array | None = None,
    return_cells: bool = False,
) -> tuple[Array, ...]:
    """One LSTM layer in one direction over a whole sequence; differentiable for torch tensors.

    T steps, batch B, input width I, H units, P the width of h: H, or the rows of `w_hr`. All are NumPy arrays, or all
    are torch tensors, or all are arrays of one other library that speaks DLPack, such as JAX (outside of its
    transformations) and CuPy; float32, float64, bfloat16 (not NumPy) or float16, the same for all. They are not
    changed.

    Args:
        x: input [T, B, I].
        state: the pair h0 [B, P], c0 [B, H]; None is zeros.
        w_ih: [4H, I], gates in the order i, f, g, o as in `torch.nn.LSTM`.
        w_hh: [4H, P].
        b_ih, b_hh: [4H]; either or both may be None.
        w_hr: projection [P, H] of h, or None.
        reverse: walks each row from its last valid step to its first.
        lengths: valid steps of each row [B], integer, 0 to T. What x holds past them does not matter.
        resets: bool [T, B]; where True, the state is zero before that step.
        return_cells: whether to return c of every step too.

    Returns:
        y [T, B, P], zero past a row's length, and (h_n [B, P], c_n [B, H]), those of the last valid step; with
        `return_cells` a third item [T, B, H]. Arrays of the kind, dtype and device of x.

    Raises:
        TypeError: not an array, arrays of several kinds, a tracer of JAX, lengths not integer, resets not bool.
        RuntimeError: unsupported or mixed dtypes, devices, wrong shapes, T = 0, memory that cannot be shared.
        ValueError: a length out of range (on a GPU lengths are clamped instead).
    """
    if not is_tensor(x):
        if dlpack.library_of(x) is not None:
            arrays = {"x": x, "w_ih": w_ih, "w_hh": w_hh, "b_ih": b_ih, "b_hh": b_hh, "w_hr": w_hr}
            masks = {"lengths": lengths, "resets": resets}
            return _through_dlpack(lstm, state, arrays | masks, reverse=reverse, return_cells=return_cells)
        check_kind("x", x)
    h0, c0 = _split_state(state)
    weights = [w_ih, w_hh, *_both_or_none(b_ih, b_hh)]
    if w_hr is not None:
        weights.append(w_hr)
    y, h_n, c_n, cells = layer(
        x,
        _with_direction("state[0]", h0, x),
        _with_direction("state[1]", c0, x),
        weights,
        lengths,
        resets,
        None,
        REVERSE if reverse else FORWARD,
        False,
        return_cells,
    )
    if cells is None:
        return y, (h_n[0], c_n[0])
    cells = cells[0]
    if cells.dtype != x.dtype:
        cells = cells.astype(y.dtype) if isinstance(cells, np.ndarray) else cells.to(y.dtype)
    return y, (h_n[0], c_n[0]), cells


def cell(
    x: Array,
    h: Array | None,
    c: Array | None,
    w_ih: Array,
    w_hh: Array,
    b_ih: Array | None,
    b_hh: Array | None,
) -> tuple[Array, Array]:
    """One step of x [B, I] from h, c [B, H]; both biases or none."""
    if is_tensor(x):
        dispatch = tensor_dispatch()
        quick = dispatch.quick_cell(x, h, c, w_ih, w_hh, b_ih, b_hh) if x.dim() == 2 else None
        return quick or dispatch.cell(x, h, c, w_ih, w_hh, b_ih, b_hh)
    check_cell(x, h, c, w_ih, w_hh, b_ih, b_hh)
    arguments: list[Any] = [_plain(a) for a in (x, h, c, w_ih, w_hh, b_ih, b_hh)]
    if choose("cpu", x.dtype.newbyteorder("=")).name == "cpu":
        return _C.cell_forward(*arguments, 0)
    return reference.cell_forward(*arguments)


def check_cell(
    x: Array,
    h: Array | None,
    c: Array | None,
    w_ih: Array,
    w_hh: Array,
    b_ih: Array | None,
    b_hh: Array | None,
) -> None:
    """As `check`, for a cell: a layer of one step."""
    given: list[tuple[str, Any]] = [("x", x), ("h", h), ("c", c)]
    for name, a in given[:1] + [(name, a) for name, a in given[1:] if a is not None]:
        check_kind(name, a, None if a is x else x)
        if len(a.shape) != 2:
            raise RuntimeError(f"{name}: expected 2 dimensions, got {len(a.shape)}: shape {list(a.shape)}")
    weights = [w_ih, w_hh] if b_ih is None else [w_ih, w_hh, b_ih, b_hh]
    h0, c0 = (None if a is None else a[None] for a in (h, c))
    check(x[None], h0, c0, weights, None, None, None, FORWARD, False)


def lstm_cell(
    x: A,
    state: tuple[A, A] | None,
    w_ih: A,
    w_hh: A,
    b_ih: A | None = None,
    b_hh: A | None = None,
) -> tuple[A, A]:
    """One LSTM step; differentiable for torch tensors.

    Args:
        x: input [B, I]; its kind and dtype are those of all, as in `lstm`.
        state: the pair h [B, H], c [B, H]; None is zeros.
        w_ih: [4H, I], gates in the order i, f, g, o.
        w_hh: [4H, H].
        b_ih, b_hh: [4H]; either or both may be None.

    Returns:
        (h', c'), both [B, H].

    Raises:
        TypeError: not an array, arrays of several kinds, a tracer of JAX.
        RuntimeError: unsupported or mixed dtypes, devices, wrong shapes, memory that cannot be shared.
    """
    if not is_tensor(x) and dlpack.library_of(x) is not None:
        arrays = {"x": x, "w_ih": w_ih, "w_hh": w_hh, "b_ih": b_ih, "b_hh": b_hh}
        h, c = _through_dlpack(lstm_cell, state, arrays)
        return h, c
    h, c = _split_state(state)
    if b_ih is None or b_hh is None:
        b_ih, b_hh = _both_or_none(b_ih, b_hh) or (None, None)
    return cell(x, h, c, w_ih, w_hh, b_ih, b_hh)
