"""What a layer is asked, as one value, and the words for what goes in and comes out.

Dimensions are T (time), B (batch), I (input), H (cells), P (width of h: H without a projection) and D (directions).
An array is a NumPy array or a torch tensor; all of one call are of one kind.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from enum import IntEnum, IntFlag
from typing import Any, NamedTuple, NoReturn

import numpy as np

from . import dlpack
from .cell import Cell, Norm, check_cell

Array = Any
Arrays = Sequence[tuple[str, Array]]  # by name, None where one is absent

DTYPES = frozenset({"float32", "float64", "bfloat16", "float16"})
WEIGHTS = frozenset(
    name + suffix for name in ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr", "kernel", "bias") for suffix in ("", "_reverse")
)
MOST_NUMBERS = 2**52  # in an array of a layer: csrc/sizes.h
MOST_NAMED = 100  # in a message


# Options -------------------------------------------------------------------------------------------------------------
#
# csrc/ops/call.h has the same three enums with the same numbers; tests/test_layering.py compares them.


class Directions(IntEnum):
    """Which ways a layer walks through time."""

    FORWARD = 0
    REVERSE = 1
    BOTH = 2

    @property
    def reversals(self) -> tuple[bool, ...]:
        """Whether each of the directions is a reverse one."""
        return (False, True) if self == Directions.BOTH else (self == Directions.REVERSE,)


class Save(IntEnum):
    """What a forward pass returns beside its outputs."""

    NOTHING = 0
    CELLS = 1
    ALL = 2  # cells and gates: what a backward pass needs


class Needs(IntFlag):
    """Which gradients a backward pass is asked for."""

    X = 1
    H0 = 2
    C0 = 4
    WEIGHTS = 8
    ALL = 15

    @classmethod
    def of(cls, x: bool, h0: bool, c0: bool, weights: bool) -> Needs:
        """Those that are true."""
        return _NEEDS[x + 2 * h0 + 4 * c0 + 8 * weights]


_NEEDS = tuple(Needs(n) for n in range(16))  # an IntFlag takes a microsecond to make

FORWARD, REVERSE, BOTH = Directions


# The arrays of a call ------------------------------------------------------------------------------------------------


class Weights(NamedTuple):
    """One direction of one layer in torch's layout."""

    w_ih: Array  # [4H, I]
    w_hh: Array  # [4H, P]
    b_ih: Array | None = None  # [4H]
    b_hh: Array | None = None  # [4H]
    w_hr: Array | None = None  # [P, H]


class CellWeights(NamedTuple):
    """The same of another cell than the plain one, and what that has besides."""

    w_ih: Array
    w_hh: Array
    b_ih: Array | None = None
    b_hh: Array | None = None
    w_hr: Array | None = None
    peephole: Array | None = None  # [3, H], of i, f and o
    gamma: Array | None = None  # [2, 4H], of x and of h; or with Norm.GATES [4H]
    beta: Array | None = None  # [4H]
    gamma_h: Array | None = None  # [H]
    beta_h: Array | None = None  # [H]


class TooLargeError(RuntimeError):
    """Sizes that no memory stands for: what claims them is asked nothing more."""


class LayerCall(NamedTuple):
    """One or both directions of an LSTM layer over a whole sequence, or over one step.

    Attributes:
        x: [T, B, I], or [B, T, I] if `batch_first`, or packed rows [N, I] if `batch_sizes` is given. Of one step
            [B, I] or [I], without a time axis, as a cell is called. Then h0, c0, y and c_n lack their first axis
            too (or first two), y stands for h_n, and only what is saved has all of its axes.
        h0: initial h [D, B, P]; None is zeros.
        c0: initial c [D, B, H]; None is zeros.
        weights: per direction w_ih [4H, I], w_hh [4H, P], then both or neither of b_ih, b_hh [4H], then perhaps
            w_hr [P, H]; gates in the order i, f, g, o. `split` takes them apart. With a cell of TensorFlow's layout
            instead kernel [I + H, 4H] and bias [4H]. Then those that the cell has besides: `cell.extra_weights`.
        lengths: the valid steps of each row [B], or None. What x holds past them does not matter.
        resets: bool, laid out as x, without I: where True, the state is zero before that step; or None.
        batch_sizes: the rows of each time [T], from a PackedSequence, or None.
        directions: forward, reverse or both.
        batch_first: whether B comes before T in x, resets and y.
        cell: what a cell computes; None is the plain LSTM.
        seed: int64 [1], of the masks that the cell draws; None if it draws none.
    """

    x: Array
    h0: Array | None
    c0: Array | None
    weights: list[Array]
    lengths: Array | None
    resets: Array | None
    batch_sizes: Array | None
    directions: Directions
    batch_first: bool
    cell: Cell | None = None
    seed: Array | None = None

    @property
    def num_directions(self) -> int:
        """D."""
        return 2 if self.directions == BOTH else 1

    @property
    def masked(self) -> bool:
        """Whether lengths or resets are given."""
        return self.lengths is not None or self.resets is not None

    @property
    def projected(self) -> bool:
        """Whether there are w_hr."""
        each = len(self.weights) // self.num_directions
        if self.cell is not None:
            each -= len(self.cell.extra_weights)
            return each % 2 == 1 and not self.cell.tensorflow
        return each % 2 == 1

    @property
    def is_step(self) -> bool:
        """Whether x has no time axis: [B, I] or [I]."""
        return self.batch_sizes is None and len(self.x.shape) < 3

    @property
    def widths(self) -> tuple[int, int]:
        """(H, P)."""
        if self.cell is not None and self.cell.tensorflow:
            H = self.weights[0].shape[1] // 4
            return H, H
        return self.weights[1].shape[0] // 4, self.weights[1].shape[1]

    def split(self) -> list[Weights]:
        """The weights of a plain cell, by direction."""
        each = len(self.weights) // self.num_directions

        def of(w: Sequence[Array]) -> Weights:
            b_ih, b_hh = w[2:4] if each >= 4 else (None, None)
            return Weights(w[0], w[1], b_ih, b_hh, w[-1] if self.projected else None)

        return [of(self.weights[n * each : (n + 1) * each]) for n in range(self.num_directions)]

    def split_cell(self) -> list[CellWeights]:
        """The weights of any cell, by direction, those in TensorFlow's layout as copies in torch's."""
        tensorflow = self.cell is not None and self.cell.tensorflow
        return [_in_torchs_layout(w) if tensorflow else CellWeights(**w) for w in self.named_weights()]

    def split_as_laid_out(self) -> list[CellWeights]:
        """The same without copies: TensorFlow's as views whose gates stay in its order, i, j, f, o."""
        if self.cell is None or not self.cell.tensorflow:
            return [CellWeights(**w) for w in self.named_weights()]
        width, split = self.x.shape[-1], []
        for w in self.named_weights():
            kernel, extra = w["kernel"], {name: a for name, a in w.items() if name not in ("kernel", "bias")}
            split.append(CellWeights(kernel[:width].T, kernel[width:].T, w.get("bias"), **extra))
        return split

    def weights_of_steps(self) -> list[Array]:
        """As `weights`, without what x is multiplied by: no w_ih, and of a kernel the rows of h."""
        width, kept = self.x.shape[-1], []
        for w in self.named_weights():
            kept += [a[width:] if name == "kernel" else a for name, a in w.items() if name != "w_ih"]
        return kept

    def named_weights(self) -> list[dict[str, Array]]:
        """Those that there are, as they are, by direction and name."""
        each = len(self.weights) // self.num_directions
        extra = () if self.cell is None else self.cell.extra_weights
        names: tuple[str, ...] = ("kernel", "bias")
        if self.cell is None or not self.cell.tensorflow:
            biases = ("b_ih", "b_hh") if each - len(extra) >= 4 else ()
            names = ("w_ih", "w_hh", *biases, *(("w_hr",) if self.projected else ()))
        names += extra
        return [
            dict(zip(names, self.weights[n * each : (n + 1) * each], strict=False)) for n in range(self.num_directions)
        ]

    def map(self, f: Callable[[Array], Array]) -> LayerCall:
        """Puts f(a) for each array."""
        x, h0, c0 = (None if a is None else f(a) for a in self[:3])
        lengths, resets, batch_sizes = (None if a is None else f(a) for a in self[4:7])
        weights, seed = [f(w) for w in self.weights], None if self.seed is None else f(self.seed)
        return LayerCall(x, h0, c0, weights, lengths, resets, batch_sizes, *self[7:10], seed)

    def cast(self, dtype: Any) -> LayerCall:
        """As autocast casts tensors: floating-point ones to the dtype, but float64 stays as it is."""

        def cast(a: Array | None) -> Array | None:
            if a is None or not a.is_floating_point() or dtype_name(a) == "float64":
                return a
            return a.to(dtype)

        x, h0, c0 = (cast(a) for a in self[:3])
        return self._replace(x=x, h0=h0, c0=c0, weights=[cast(w) for w in self.weights])

    def with_time(self) -> LayerCall:
        """A call without a time axis as one with a single step."""
        x, h0, c0 = (add_axes(a, self) for a in self[:3])
        return self._replace(x=x, h0=h0, c0=c0, resets=add_axes(self.resets, self))

    def named(self) -> Arrays:
        """The arrays by name, the weights of a second direction with the suffix "_reverse"."""
        weights = [
            (name + suffix, a)
            for suffix, w in zip(("", "_reverse"), self.named_weights(), strict=False)
            for name, a in w.items()
        ]
        names = ("h0", "c0", "lengths", "resets", "batch_sizes", "seed")
        return [("x", self.x), *weights, *((name, getattr(self, name)) for name in names)]

    def num_steps(self) -> int:
        """T."""
        if self.batch_sizes is not None:
            return self.batch_sizes.shape[0]
        return 1 if self.is_step else self.x.shape[1 if self.batch_first else 0]

    def batch_size(self) -> int:
        """B, which of packed rows the contents of batch_sizes tell."""
        if self.batch_sizes is not None:
            return int(self.batch_sizes[0])
        if self.is_step:
            return self.x.shape[0] if len(self.x.shape) == 2 else 1
        return self.x.shape[0 if self.batch_first else 1]

    def sizes(self) -> tuple[int, int, int, int, int]:
        """T, B, I, H and P, which is 0 without a projection."""
        H, P = self.widths
        return self.num_steps(), self.batch_size(), self.x.shape[-1], H, P if self.projected else 0

    def state_sizes(self, batch_size: int) -> tuple[int, ...]:
        """The shape of a state but for its last axis: (D, B), and of a step (B,) or ()."""
        if not self.is_step:
            return self.num_directions, batch_size
        return (batch_size,) if len(self.x.shape) == 2 else ()


def _in_torchs_layout(w: dict[str, Array]) -> CellWeights:
    """kernel [I + H, 4H] and bias [4H], gates in the order i, j, f, o; j is g."""
    rows, columns = w["kernel"].shape
    H = columns // 4
    both = w["kernel"].T.reshape(4, H, rows)[[0, 2, 1, 3]].reshape(columns, rows)
    bias = w["bias"].reshape(4, H)[[0, 2, 1, 3]].reshape(columns)
    extra = {name: a for name, a in w.items() if name not in ("kernel", "bias")}
    return CellWeights(both[:, : rows - H], both[:, rows - H :], bias, **extra)


# The same without names, as it is quicker to make: what the engines take, and what the compiled core returns.
CallTuple = tuple[
    Array,
    Array | None,
    Array | None,
    list[Array],
    Array | None,
    Array | None,
    Array | None,
    Directions,
    bool,
    Cell | None,
    Array | None,
]
OutputsTuple = tuple[Array, Array, Array, Array | None, Array | None]
GradsTuple = tuple[Array | None, Array | None, Array | None, list[Array] | None]


def add_axes(a: Array | None, call: LayerCall) -> Array | None:
    """[B, …] of a call without a time axis as [1, B, …]; of one without a batch, […] as [1, 1, …]."""
    if a is None:
        return None
    return a[None] if len(call.x.shape) == 2 else a[None, None]


def drop_axes(a: Array | None, call: LayerCall) -> Array | None:
    """The way back from `add_axes`."""
    if a is None:
        return None
    return a[0] if len(call.x.shape) == 2 else a[0, 0]


class Outputs(NamedTuple):
    """What a forward pass gives."""

    y: Array  # laid out as x, [T, B, D * P], zero past a length
    h_n: Array  # [D, B, P]; None without a time axis, where it is y
    c_n: Array  # [D, B, H]
    cells: Array | None  # [D, T, B, H] (packed: [D, N, H]), float32 for half types; None unless saved
    gates: Array | None  # after their activation [D, T, B, 4H] (packed: [D, N, 4H]); None unless saved

    def without_time(self, call: LayerCall) -> Outputs:
        """Those of `call.with_time()` as those of `call`."""
        return self._replace(y=drop_axes(self.y, call), h_n=None, c_n=drop_axes(self.c_n, call))

    def squeeze_time_(self, call: LayerCall) -> Outputs:
        """The same of tensors, in place: a state that is no view can be detached in place, as those of torch's cell."""
        for a in (self.y, self.c_n):
            for _ in range(3 - len(call.x.shape)):
                a.squeeze_(0)
        return self._replace(h_n=None)


class Saved(NamedTuple):
    """What a backward pass takes from the forward one, as `Outputs` has it.

    y is that of a cell with options; of a plain one h of each step is had again from cells and gates.
    """

    cells: Array
    gates: Array
    y: Array | None = None

    @classmethod
    def of(cls, outputs: Outputs, cell: Cell | None) -> Saved:
        """What is kept of the outputs of such a cell."""
        return cls(outputs.cells, outputs.gates, None if cell is None else outputs.y)

    def with_time(self, call: LayerCall) -> Saved:
        """That of `call` as that of `call.with_time()`."""
        return self._replace(y=add_axes(self.y, call))


class OutputGrads(NamedTuple):
    """The gradients of the outputs; None is zeros. What dy and dcells hold past a length does not matter."""

    dy: Array | None
    dh_n: Array | None
    dc_n: Array | None
    dcells: Array | None

    def with_time(self, call: LayerCall) -> OutputGrads:
        """Those of `call` as those of `call.with_time()`."""
        return self._replace(dy=add_axes(self.dy, call), dc_n=add_axes(self.dc_n, call))


class Grads(NamedTuple):
    """What a backward pass gives; None for what is not needed."""

    dx: Array | None
    dh0: Array | None
    dc0: Array | None
    dweights: list[Array] | None  # in the order of the call's weights

    def without_time(self, call: LayerCall) -> Grads:
        """Those of `call.with_time()` as those of `call`."""
        dx, dh0, dc0 = (drop_axes(d, call) for d in self[:3])
        return Grads(dx, dh0, dc0, self.dweights)


# Checks --------------------------------------------------------------------------------------------------------------
#
# What the compiled core checks itself (csrc/ops), in the same words, for the engines that it does not stand before.


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


def dtype_name(a: Array) -> str:
    """The dtype of an array of either kind, without the name of its library."""
    return a.dtype.name if isinstance(a, np.ndarray) else str(a.dtype).removeprefix("torch.")


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
