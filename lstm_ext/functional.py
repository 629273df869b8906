"""`lstm` and `lstm_cell` for arrays of any kind: the forms of their arguments, and the way to the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, overload

import numpy as np

from . import dlpack
from .call import DTYPES, FORWARD, REVERSE, Array, CallTuple, LayerCall, OutputsTuple, Save
from .cell import Cell, make_cell, show_options
from .checks import check, check_kind, is_tensor, kind
from .engines import choose, numpy

if TYPE_CHECKING:
    from typing_extensions import Unpack

NOTHING, CELLS = Save.NOTHING, Save.CELLS

A = TypeVar("A")  # an array of any kind, or of the kinds of another library


_run: Callable[[CallTuple, Save], OutputsTuple] | None = None


def _run_tensors(call: CallTuple, save: Save) -> OutputsTuple:
    """`route.run`, which imports torch, once tensors have come."""
    global _run
    if _run is None:
        from .route import run

        _run = run
    return _run(call, save)


def _run_arrays(call: CallTuple, save: Save) -> OutputsTuple:
    """The outputs of a layer of NumPy arrays, which nothing watches: by whichever engine there is."""
    asked = LayerCall(*call)
    check_kind("x", asked.x)
    if asked.x.dtype.name not in DTYPES:
        check(asked)
    engine = choose("cpu", asked.x.dtype.newbyteorder("=")).engine
    assert engine is not None  # NumPy serves all of them
    outputs = engine.forward(call, save)
    if outputs is NotImplemented:  # not all are plain arrays, or the engine takes no such cell
        check(asked)
        asked = asked.map(np.asarray)
        outputs = engine.forward(asked, save)
    if outputs is NotImplemented:
        outputs = numpy.forward(asked, save)
    return outputs


def _both_or_none(b_ih: Array | None, b_hh: Array | None) -> list[Array]:
    """The bias entries of a weight list: a bias given alone is joined by zeros."""
    if b_ih is None and b_hh is None:
        return []
    if b_ih is None or b_hh is None:
        given: Any = b_ih if b_ih is not None else b_hh
        check_kind("b_ih" if b_hh is None else "b_hh", given)
        zeros = np.zeros_like(given) if isinstance(given, np.ndarray) else given.new_zeros(given.shape)
        return [given, zeros] if b_hh is None else [zeros, given]
    return [b_ih, b_hh]


def _split_state(state: Any) -> tuple[Array | None, Array | None]:
    if state is None:
        return None, None
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        several = isinstance(state, (tuple, list))
        got = f"{kind(state)} of {len(state)}" if several else f"one {kind(state)}"
        shape = f" of shape {list(state.shape)}" if hasattr(state, "shape") else ""
        raise TypeError(f"state: expected None or a pair (h, c), got {got}{shape}")
    return state[0], state[1]


def _with_direction(name: str, a: Array | None, x: Array) -> Array | None:
    """[B, …] → [1, B, …]."""
    if a is None:
        return None
    if type(a) is not type(x):
        check_kind(name, a, x)
    return a[None]


class CellOptions(TypedDict, total=False):
    """What `lstm` and `lstm_cell` take besides: see there."""

    activation: str | tuple[Any, ...]
    recurrent_activation: str | tuple[Any, ...]
    forget_bias: float
    peephole: Any
    cell_clip: float | None
    proj_clip: float | None
    layer_norm: Sequence[Any] | None
    zoneout: float | Sequence[float]
    recurrent_dropout: float
    candidate_dropout: float
    coupled: bool
    training: bool
    seed: Any


_OPTIONS = tuple(CellOptions.__annotations__)
_NORM_ARRAYS = ("gamma", "gamma_h", "beta_h")


def _read_options(who: str, options: dict[str, Any], x: Array, projected: bool) -> tuple[Cell | None, list[Array], Any]:
    """The cell, its additional weights, and the seed of its masks."""
    if unknown := [name for name in options if name not in _OPTIONS]:
        raise TypeError(f"{who}: expected the options {', '.join(_OPTIONS)}, got {', '.join(unknown)}")
    peephole, norms = options.pop("peephole", None), options.pop("layer_norm", None)
    training, seed = options.pop("training", False), options.pop("seed", None)
    extra = []
    if peephole is not None:
        check_kind("peephole", peephole, x)
        extra.append(peephole)
    if norms is not None:
        if not isinstance(norms, (tuple, list)) or len(norms) != len(_NORM_ARRAYS):
            raise TypeError(f"layer_norm: expected the arrays ({', '.join(_NORM_ARRAYS)}), got {kind(norms)}")
        for name, a in zip(_NORM_ARRAYS, norms, strict=True):
            check_kind(f"layer_norm, {name}", a, x)
        extra += norms
    made = make_cell(**options, peephole=peephole is not None, layer_norm=norms is not None, projected=projected)
    cell = made._replace(training=bool(training)).simplified()
    return cell, extra, None if cell is None or not cell.draws else _seed(cell, seed, x)


def _seed(cell: Cell, seed: Any, x: Array) -> Array:
    """As the engines take it: int64 [1]; drawn by torch's generator, or NumPy's for arrays, if it is None."""
    if isinstance(seed, (int, np.integer)) and not isinstance(seed, bool):
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed: expected an integer of 64 bits, got {seed}")
    elif seed is not None and not (
        str(getattr(seed, "dtype", "")).removeprefix("torch.") in ("int64", "int32") and prod(seed.shape) == 1
    ):
        raise TypeError(f"seed: expected an integer, or int64 [1], got {kind(seed)} {seed!r}")
    if is_tensor(x):
        from .route import draw_seed, seed_from

        return draw_seed(cell, x) if seed is None else seed_from(seed, x)
    if seed is None:
        return np.random.randint(2**63 - 1, size=1)  # noqa: NPY002 (np.random.seed repeats it)
    return np.asarray(seed, np.int64).reshape(1)


def _expect_rank(name: str, a: Array, rank: int, x: Array, hint: str = "") -> None:
    if type(a) is not type(x):
        check_kind(name, a, x)
    if a.ndim != rank:
        raise RuntimeError(f"{name}: expected {rank} dimensions, got {a.ndim}: shape {list(a.shape)}{hint}")


def _through_dlpack(
    function: Callable[..., Any], state: Any, arrays: Mapping[str, Any], **options: Any
) -> tuple[Any, ...]:
    """`function` on arrays of the library of x; the results are arrays of that library too."""
    x = arrays["x"]
    state = dict(zip(("h0", "c0"), _split_state(state), strict=True))
    norms = {f"layer_norm[{n}]": a for n, a in enumerate(options.pop("layer_norm", ()))}
    peephole = {"peephole": options.pop("peephole", None)}
    given = {name: a for name, a in {**arrays, **state, **peephole, **norms}.items() if a is not None}
    for name, a in given.items():
        check_kind(name, a, x)
    views = dlpack.take(given)
    if norms:
        options["layer_norm"] = tuple(views.pop(name) for name in norms)
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
    w_hr: A | None = None,
    *,
    reverse: bool = False,
    lengths: Any = None,
    resets: Any = None,
    return_cells: Literal[False] = False,
    **options: Unpack[CellOptions],
) -> tuple[A, tuple[A, A]]: ...
@overload
def lstm(
    x: A,
    state: tuple[A, A] | None,
    w_ih: A,
    w_hh: A,
    b_ih: A | None = None,
    b_hh: A | None = None,
    w_hr: A | None = None,
    *,
    reverse: bool = False,
    lengths: Any = None,
    resets: Any = None,
    return_cells: Literal[True],
    **options: Unpack[CellOptions],
) -> tuple[A, tuple[A, A], A]: ...
@overload
def lstm(
    x: A,
    state: tuple[A, A] | None,
    w_ih: A,
    w_hh: A,
    b_ih: A | None = None,
    b_hh: A | None = None,
    w_hr: A | None = None,
    *,
    reverse: bool = False,
    lengths: Any = None,
    resets: Any = None,
    return_cells: bool = False,
    **options: Unpack[CellOptions],
) -> tuple[Any, ...]: ...
def lstm(
    x: Array,
    state: tuple[Array, Array] | None,
    w_ih: Array,
    w_hh: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
    w_hr: Array | None = None,
    *,
    reverse: bool = False,
    lengths: Array | None = None,
    resets: Array | None = None,
    return_cells: bool = False,
    **options: Unpack[CellOptions],
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
        w_hr: projection [P, H] of h, or None. `lstm(x, state, *weights)` takes a `convert.Weights`.
        reverse: walks each row from its last valid step to its first.
        lengths: valid steps of each row [B], integer, 0 to T. What x holds past them does not matter.
        resets: bool [T, B]; where True, the state is zero before that step.
        return_cells: whether to return c of every step too.
        options: what another cell than the plain one computes, as docs/options.md tells: activation ("tanh"),
            recurrent_activation ("sigmoid"), forget_bias (0.0), peephole [3, H] (of i, f, o), cell_clip and proj_clip
            (None), layer_norm (arrays gamma [2, 4H], gamma_h [H], beta_h [H]), zoneout (0.0, or a pair of h and c),
            recurrent_dropout, candidate_dropout (0.0), coupled (False); training (False), whether units are dropped
            and held; seed (None), an integer or int64 [1] from which these are drawn, by default from torch's
            generator, or for other arrays from `np.random`.

    Returns:
        y [T, B, P], zero past a row's length, and (h_n [B, P], c_n [B, H]), those of the last valid step; with
        `return_cells` a third item [T, B, H]. Arrays of the kind, dtype and device of x.

    Raises:
        TypeError: not an array, arrays of several kinds, a tracer of JAX, lengths not integer, resets not bool.
        RuntimeError: unsupported or mixed dtypes, devices, wrong shapes, T = 0, H = 0, P = 0, more than 2**52 numbers
            in an array of the layer, memory that cannot be shared.
        MemoryError: the outputs cannot be allocated; or RuntimeError, as torch says it.
        ValueError: a length out of range (on a GPU lengths are clamped instead).

    Example:
        >>> x, w_ih, w_hh = np.ones((5, 2, 3)), np.ones((16, 3)), np.ones((16, 4))  # T, B, I = 5, 2, 3; H = 4
        >>> y, (h_n, c_n) = lstm_ext.lstm(x, None, w_ih, w_hh, lengths=np.array([5, 2]))
        >>> y.shape, h_n.shape, bool((y[1, 1] == h_n[1]).all()), bool(y[2:, 1].any())  # row 1 has 2 steps
        ((5, 2, 4), (2, 4), True, False)
    """
    tensors = is_tensor(x)
    if not tensors:
        if dlpack.library_of(x) is not None:
            arrays = {"x": x, "w_ih": w_ih, "w_hh": w_hh, "b_ih": b_ih, "b_hh": b_hh, "w_hr": w_hr}
            masks = {"lengths": lengths, "resets": resets}
            return _through_dlpack(lstm, state, arrays | masks, reverse=reverse, return_cells=return_cells, **options)
        check_kind("x", x)
    h0, c0 = _split_state(state)
    weights = [w_ih, w_hh, *_both_or_none(b_ih, b_hh)]
    if w_hr is not None:
        weights.append(w_hr)
    _expect_rank("x", x, 3, x, "; lstm takes a sequence [T, B, I], lstm_cell one step [B, I]")
    cell: Cell | None = None
    seed: Array | None = None
    if options:
        cell, extra, seed = _read_options("lstm", {**options}, x, w_hr is not None)
        weights += extra
    state_of = (_with_direction("h0", h0, x), _with_direction("c0", c0, x))
    run = _run_tensors if tensors else _run_arrays
    y, h_n, c_n, cells, _ = run(
        (x, *state_of, weights, lengths, resets, None, REVERSE if reverse else FORWARD, False, cell, seed),
        CELLS if return_cells else NOTHING,
    )
    if cells is None:
        return y, (h_n[0], c_n[0])
    cells = cells[0]
    if cells.dtype != x.dtype:
        cells = cells.astype(y.dtype) if isinstance(cells, np.ndarray) else cells.to(y.dtype)
    return y, (h_n[0], c_n[0]), cells


def lstm_cell(
    x: A,
    state: tuple[A, A] | None,
    w_ih: A,
    w_hh: A,
    b_ih: A | None = None,
    b_hh: A | None = None,
    w_hr: A | None = None,
    *,
    resets: Any = None,
    **options: Unpack[CellOptions],
) -> tuple[A, A]:
    """One LSTM step; differentiable for torch tensors.

    Args:
        x: input [B, I]; its kind and dtype are those of all, as in `lstm`.
        state: the pair h0 [B, P], c0 [B, H]; None is zeros.
        w_ih: [4H, I], gates in the order i, f, g, o.
        w_hh: [4H, P].
        b_ih, b_hh: [4H]; either or both may be None.
        w_hr: projection [P, H] of h, or None; without it P is H.
        resets: bool [B]; where True, the state is zero before the step.
        options: those of `lstm`; masks are drawn anew at each call.

    Returns:
        (h' [B, P], c' [B, H]).

    Raises:
        TypeError: not an array, arrays of several kinds, a tracer of JAX, resets not bool.
        RuntimeError: unsupported or mixed dtypes, devices, wrong shapes, more than 2**52 numbers in an array, memory
            that cannot be shared.

    Example:
        >>> state, w_ih, w_hh = None, np.ones((16, 3)), np.ones((16, 4))
        >>> for x in np.ones((5, 2, 3)):  # 5 steps
        ...     h, c = state = lstm_ext.lstm_cell(x, state, w_ih, w_hh)
        >>> h.shape, c.shape
        ((2, 4), (2, 4))
    """
    tensors = is_tensor(x)
    if not tensors and dlpack.library_of(x) is not None:
        arrays = {"x": x, "w_ih": w_ih, "w_hh": w_hh, "b_ih": b_ih, "b_hh": b_hh, "w_hr": w_hr, "resets": resets}
        h, c = _through_dlpack(lstm_cell, state, arrays, **options)
        return h, c
    h0, c0 = _split_state(state)
    if not tensors:
        check_kind("x", x)
    _expect_rank("x", x, 2, x, "; lstm_cell takes one step [B, I], lstm a sequence [T, B, I]")
    for name, a in (("h0", h0), ("c0", c0)):
        if a is not None:
            _expect_rank(name, a, 2, x)
    weights = [w_ih, w_hh, *_both_or_none(b_ih, b_hh)]
    if w_hr is not None:
        weights.append(w_hr)
    cell: Cell | None = None
    seed: Array | None = None
    if options:
        cell, extra, seed = _read_options("lstm_cell", {**options}, x, w_hr is not None)
        weights += extra
    run = _run_tensors if tensors else _run_arrays
    y, _, c_n, _, _ = run((x, h0, c0, weights, None, resets, None, FORWARD, False, cell, seed), NOTHING)
    return y, c_n


for _function in (lstm, lstm_cell):
    show_options(_function, CellOptions, peephole=None, layer_norm=None, training=False, seed=None)
