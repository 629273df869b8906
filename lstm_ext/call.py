"""What a layer is asked, as one value, and the words for what goes in and comes out.

Dimensions are T (time), B (batch), I (input), H (cells), P (width of h: H without a projection) and D (directions).
An array is a NumPy array or a torch tensor; all of one call are of one kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum, IntFlag
from typing import Any, NamedTuple

import numpy as np

from .cell import Cell

Array = Any
Arrays = Sequence[tuple[str, Array]]  # by name, None where one is absent

DTYPES = frozenset({"float32", "float64", "bfloat16", "float16"})


def dtype_name(a: Array) -> str:
    """The dtype of an array of either kind, without the name of its library."""
    return a.dtype.name if isinstance(a, np.ndarray) else str(a.dtype).removeprefix("torch.")


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
