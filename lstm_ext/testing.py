"""For tests of kernels: cases, random inputs for them, the float64 oracle, and how far from it a kernel may be.

Needs NumPy alone; torch where tensors are asked for. A kernel of your own is checked in two lines:

    >>> case, engine = Case(T=5, B=3, I=7, H=13, resets=True), reference
    >>> inputs = make_inputs(case, "float32")
    >>> assert_all_close(run_layer(engine, inputs), run_oracle(inputs), case, "float32")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from . import reference
from .call import BOTH, FORWARD, REVERSE, Directions, Grads, LayerCall, Needs, OutputGrads, Outputs, Save, Saved
from .cell import PLAIN, Cell, Norm

Array = npt.NDArray[Any]
Named = Mapping[str, Any]  # arrays by name


# Cases ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call of a layer, by the sizes T, B, I, H and P, where P = 0 is no projection.

    `lengths` is "ragged" (1 to T), "with_zero" (0 to T, both there if B > 1), "full" (all T) or None; `state` False
    leaves h0 and c0 out, which then are zeros.
    """

    T: int
    B: int
    I: int  # noqa: E741
    H: int
    P: int = 0
    bias: bool = True
    directions: Directions = FORWARD
    batch_first: bool = False
    lengths: str | None = None
    resets: bool = False
    packed: bool = False
    state: bool = True
    cell: Cell | None = None

    @property
    def num_directions(self) -> int:
        """D."""
        return 2 if self.directions == BOTH else 1

    @property
    def width(self) -> int:
        """The width of h."""
        return self.P or self.H

    @property
    def weight_shapes(self) -> list[tuple[int, ...]]:
        """Those of the weights of all directions, as a call lists them."""
        H = self.H
        shapes: list[tuple[int, ...]] = [(4 * H, self.I), (4 * H, self.width)]
        shapes += [(4 * H,)] * 2 if self.bias else []
        shapes += [(self.P, H)] if self.P else []
        if self.cell is not None:
            if self.cell.tensorflow:
                shapes = [(self.I + H, 4 * H), (4 * H,)]
            gamma = (4 * H,) if self.cell.norm == Norm.GATES else (2, 4 * H)
            extra = {"peephole": (3, H), "gamma": gamma, "beta": (4 * H,), "gamma_h": (H,), "beta_h": (H,)}
            shapes += [extra[name] for name in self.cell.extra_weights]
        return shapes * self.num_directions

    @property
    def output_terms(self) -> int:
        """How many products the longest sum of a forward step has."""
        return self.I + self.width + self.P

    @property
    def gradient_terms(self) -> int:
        """How many products the longest sum behind a gradient has: in dx and dh, a weight's, or the gates."""
        return max(4 * self.H, self.T * self.B, self.output_terms)

    def __str__(self) -> str:
        options = {
            f"P{self.P}": self.P,
            "nobias": not self.bias,
            "reverse": self.directions == REVERSE,
            "both": self.directions == BOTH,
            "batchfirst": self.batch_first,
            f"{self.lengths}": self.lengths,
            "resets": self.resets,
            "packed": self.packed,
            "nostate": not self.state,
            _name(self.cell): self.cell,
        }
        shape = f"T{self.T}-B{self.B}-I{self.I}-H{self.H}"
        return "-".join([shape, *(name for name, present in options.items() if present)])


def _name(cell: Cell | None) -> str:
    """What differs in it from the plain one."""
    fields = () if cell is None else zip(Cell._fields, cell, PLAIN, strict=True)
    return "-".join(f"{name}={value:g}" for name, value, plain in fields if value != plain)


# Sizes are 1, odd, prime, and on either side of the multiples of vector widths and tiles.
CASES = [
    Case(1, 1, 1, 1),
    Case(1, 1, 32, 32, state=False),
    Case(1, 16, 64, 64),
    Case(1, 9, 96, 80),
    Case(1, 7, 520, 48),
    Case(3, 9, 5, 1, directions=BOTH),
    Case(5, 3, 7, 13),
    Case(7, 2, 1, 17, bias=False),
    Case(4, 5, 13, 31, state=False),
    Case(3, 7, 31, 33, directions=REVERSE),
    Case(6, 3, 33, 63, directions=BOTH),
    Case(5, 17, 17, 65, batch_first=True),
    Case(4, 13, 65, 67, directions=BOTH, batch_first=True, bias=False),
    Case(3, 31, 63, 127),
    Case(3, 33, 127, 129, directions=REVERSE, batch_first=True),
    Case(2, 65, 5, 131),
    Case(2, 3, 129, 257),
    Case(4, 24, 20, 300, directions=BOTH),
    Case(4, 7, 23, 39),
    Case(200, 2, 5, 11),
    Case(200, 1, 3, 8, directions=BOTH, lengths="ragged"),
    Case(3, 0, 5, 7, directions=BOTH),
    Case(3, 2, 0, 5),
    Case(5, 3, 7, 13, P=5),
    Case(1, 1, 3, 2, P=1, state=False),
    Case(4, 5, 6, 33, P=17, bias=False, directions=BOTH),
    Case(3, 2, 5, 2, P=65),
    Case(5, 9, 12, 67, P=65, directions=REVERSE, batch_first=True),
    Case(6, 5, 7, 17, lengths="ragged"),
    Case(6, 5, 7, 17, lengths="full", directions=REVERSE),
    Case(5, 7, 3, 33, lengths="with_zero", directions=REVERSE, state=False),
    Case(4, 17, 9, 65, lengths="with_zero", directions=BOTH, bias=False),
    Case(7, 4, 5, 13, resets=True),
    Case(7, 5, 5, 31, resets=True, directions=REVERSE, batch_first=True),
    Case(9, 7, 5, 33, lengths="with_zero", resets=True, directions=BOTH, batch_first=True),
    Case(6, 5, 9, 65, P=31, lengths="with_zero", resets=True, directions=BOTH),
    Case(50, 3, 4, 17, lengths="ragged", resets=True),
    Case(7, 5, 6, 13, packed=True),
    Case(7, 5, 6, 63, packed=True, directions=REVERSE, state=False),
    Case(6, 9, 17, 33, P=7, packed=True, directions=BOTH),
]


# Inputs --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """The arrays of a call, and the gradients of its outputs; see `lstm_ext.call`."""

    case: Case
    x: Any
    h0: Any
    c0: Any
    weights: list[Any]
    lengths: Any
    resets: Any
    batch_sizes: Any
    dy: Any
    dh_n: Any
    dc_n: Any
    dcells: Any
    seed: Any = None

    @property
    def call(self) -> LayerCall:
        """What a forward pass is asked."""
        masks = self.lengths, self.resets, self.batch_sizes
        options = self.case.directions, self.case.batch_first
        return LayerCall(self.x, self.h0, self.c0, self.weights, *masks, *options, self.case.cell, self.seed)

    @property
    def grads(self) -> OutputGrads:
        """What a backward pass is given besides."""
        return OutputGrads(self.dy, self.dh_n, self.dc_n, self.dcells)

    def without_time(self) -> Inputs:
        """Those of one step without a time axis, as a cell is called, where there is no h_n, since y is that."""

        def first(a: Any) -> Any:
            return None if a is None else a[0]

        states = {"h0": first(self.h0), "c0": first(self.c0), "dc_n": first(self.dc_n), "dh_n": None}
        return replace(self, x=self.x[0], dy=first(self.dy), resets=first(self.resets), **states)

    def map(self, f: Callable[[Any], Any], cells: Callable[[Any], Any] | None = None) -> Inputs:
        """Puts f(a) for each floating-point array; `cells` does it for dcells, whose dtype is that of the cells."""
        names = ("x", "h0", "c0", "dy", "dh_n", "dc_n")
        changed = {name: f(getattr(self, name)) for name in names if getattr(self, name) is not None}
        if self.dcells is not None:
            changed["dcells"] = (cells or f)(self.dcells)
        return replace(self, **changed, weights=[f(w) for w in self.weights])

    def map_masks(self, f: Callable[[Any], Any]) -> Inputs:
        """Puts f(a) for lengths, resets, batch_sizes and seed."""
        names = ("lengths", "resets", "batch_sizes", "seed")
        return replace(self, **{name: f(getattr(self, name)) for name in names if getattr(self, name) is not None})

    def to_torch(self, dtype: str) -> Inputs:
        """The same inputs as CPU tensors of the dtype."""
        import torch

        own = getattr(torch, dtype)
        wide = torch.promote_types(own, torch.float32)
        return self.map(lambda a: torch.from_numpy(a).to(own), cells=lambda a: torch.from_numpy(a).to(wide)).map_masks(
            torch.from_numpy
        )


def round_to(a: Array, dtype: str) -> Array:
    """`a` [float64] in the dtype; numbers of bfloat16, which NumPy lacks, come as float32."""
    if dtype != "bfloat16":
        return a.astype(dtype)
    bits = a.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def _draw_lengths(case: Case, rng: np.random.Generator) -> Array | None:
    if case.lengths is None:
        return None
    if case.lengths == "full":
        return np.full(case.B, case.T)
    lengths = rng.integers(1, case.T + 1, case.B)
    if case.lengths == "with_zero":
        lengths[:1], lengths[1:2] = 0, case.T
    return rng.permutation(lengths)


def make_inputs(case: Case, dtype: str = "float64", seed: int = 0) -> Inputs:
    """Random NumPy inputs whose values the dtype can hold. What lies past a length is NaN."""
    rng = np.random.default_rng(seed)
    D, bound = case.num_directions, 1 / np.sqrt(max(case.H, 1))  # the bound of torch's initial weights

    def normal(*shape: int) -> Array:
        return round_to(rng.standard_normal(shape), dtype)

    def weight(*shape: int) -> Array:
        return round_to(rng.uniform(-bound, bound, shape), dtype)

    lengths = _draw_lengths(case, rng)
    resets = rng.random((case.T, case.B)) < 0.25 if case.resets else None
    batch_sizes = None
    rows: tuple[int, ...] = (case.T, case.B)
    if case.packed:
        row_lengths = np.append(rng.integers(1, case.T + 1, case.B - 1), case.T)
        batch_sizes = (np.arange(case.T)[:, None] < row_lengths).sum(axis=1)
        rows = (int(batch_sizes.sum()),)

    x, dy = normal(*rows, case.I), normal(*rows, D * case.width)
    dcells = round_to(rng.standard_normal((D, *rows, case.H)), "float64" if dtype == "float64" else "float32")
    if lengths is not None:
        padding = np.arange(case.T)[:, None] >= lengths
        x[padding] = dy[padding] = dcells[:, padding] = np.nan
    if case.batch_first:
        x, dy = (np.ascontiguousarray(a.swapaxes(0, 1)) for a in (x, dy))
        resets = None if resets is None else np.ascontiguousarray(resets.T)
    h, c = (D, case.B, case.width), (D, case.B, case.H)
    return Inputs(
        case,
        x,
        normal(*h) if case.state else None,
        normal(*c) if case.state else None,
        [weight(*shape) for shape in case.weight_shapes],
        lengths,
        resets,
        batch_sizes,
        dy,
        normal(*h),
        normal(*c),
        dcells,
        np.array([seed + 1]) if case.cell is not None and case.cell.draws else None,
    )


# Runs ----------------------------------------------------------------------------------------------------------------


def run_layer(engine: Any, inputs: Inputs, *num_threads: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """All outputs and all gradients by name, without those that are None.

    Args:
        engine: has `forward(call, save)` and `backward(call, saved, grads, needs)`, as an engine of `lstm_ext.engines`;
            or `layer_forward` and `layer_backward`, as `lstm_ext.reference` and the compiled module.
        inputs: what it is given.
        num_threads: the last argument of the compiled module's functions.
    """
    own = hasattr(engine, "layer_forward")
    forward, backward = (getattr(engine, f"layer_{name}" if own else name) for name in ("forward", "backward"))
    outputs = Outputs(*forward(inputs.call, Save.ALL, *num_threads))
    saved = Saved.of(outputs, inputs.case.cell)
    grads = Grads(*backward(inputs.call, saved, inputs.grads, Needs.ALL, *num_threads))
    gradients = {"dx": grads.dx, "dh0": grads.dh0, "dc0": grads.dc0}
    gradients |= {f"dweights[{n}]": dw for n, dw in enumerate(grads.dweights or [])}
    return {name: a for name, a in outputs._asdict().items() if a is not None}, gradients


def run_oracle(inputs: Inputs) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `run_layer` should give for NumPy inputs, computed in float64."""
    return run_layer(reference, inputs.map(lambda a: a.astype(np.float64)))


# Tolerances ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tolerance:
    """`base + slope * sqrt(terms)` ulps of an array's magnitude; `epsilon` is one ulp of 1."""

    epsilon: float
    base: float
    slope: float

    def __call__(self, terms: int) -> float:
        """For sums of `terms` products, relative to the magnitude."""
        return self.epsilon * (self.base + self.slope * sqrt(terms))


# Errors count in ulps of the magnitude of an array: that of its largest element, but at least 1, which bounds h and
# the gates, and is the order of the outputs' gradients (so that a smaller gradient is what larger terms left of each
# other; 3 where shapes are drawn at random and the tail of that shows, most of all at H = 1).
#
# float32 and float64: exp, tanh and the update round about 4 times, and a sum of n products in any order of summation
# adds rounding errors of random sign, so it grows with sqrt(n): n = I + P forward, 4H or T * B backward. Kernels and
# NumPy's matrix products were seen at 0.3 to 0.5 sqrt(n). Depth in time adds nothing that shows: the forget gate
# damps an error at each step (T = 200 is as near as T = 1); the sums over T * B in the weights' gradients count as n.
#
# Half types: everything is float32 between one rounding to storage (half an ulp) of each output and of what the
# backward pass reads, h and the gates, whose part the weights (of order 1 / sqrt(H)) average out. Seen: 0.8.
TOLERANCES = {
    "float64": Tolerance(2.0**-52, 4, 0.75),
    "float32": Tolerance(2.0**-23, 4, 0.75),
    "float16": Tolerance(2.0**-10, 1.5, 0),
    "bfloat16": Tolerance(2.0**-7, 1.5, 0),
}


def to_float64(a: Any) -> npt.NDArray[np.float64]:
    """A NumPy array or a tensor of any device and dtype as float64 in NumPy."""
    return a.detach().cpu().double().numpy() if hasattr(a, "detach") else np.asarray(a, np.float64)


def largest_error(actual: Any, expected: Any) -> float:
    """Relative to the largest element expected, or to 1 if that is more; inf where something is no number in `actual`.

    What is no number in `expected` does not count.
    """
    actual, expected = to_float64(actual), to_float64(expected)
    counts = np.isfinite(expected)
    if not counts.any():
        return 0.0
    error = np.abs(actual[counts] - expected[counts]).max()
    return float(error / max(1.0, np.abs(expected[counts]).max())) if np.isfinite(error) else float("inf")


def assert_close(
    actual: Any, expected: Any, dtype: str, *, terms: int = 1, magnitude: float = 1.0, name: str = "array"
) -> None:
    """Shapes and places of NaN and inf agree, and no element is further off than TOLERANCES[dtype].

    Both are NumPy arrays or tensors, `actual` computed in `dtype`. The tolerance is for sums of `terms` products, and
    relative to the largest element expected or to `magnitude`, whichever is more. `name` is for the message.
    """
    actual, expected = to_float64(actual), to_float64(expected)
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    for kind in (np.isnan, np.isposinf, np.isneginf):
        wrong = np.argwhere(kind(actual) != kind(expected))
        assert not len(wrong), (
            f"{name}: {kind.__name__} differs at {len(wrong)} of {actual.size} places, first at "
            f"{tuple(wrong[0].tolist())}: {actual[tuple(wrong[0])]}, expected {expected[tuple(wrong[0])]}"
        )
    finite = np.isfinite(expected)
    if not finite.any():
        return
    error = np.zeros_like(expected)
    np.subtract(actual, expected, out=error, where=finite)
    worst = np.unravel_index(np.abs(error).argmax(), error.shape)
    magnitude = max(magnitude, float(np.abs(expected[finite]).max()))
    allowed = TOLERANCES[dtype](terms) * magnitude
    assert abs(error[worst]) <= allowed, (
        f"{name} ({dtype}): worst at {tuple(map(int, worst))} of shape {error.shape}: {actual[worst]!r}, expected "
        f"{expected[worst]!r}; off by {abs(error[worst]):.3g}, allowed are {allowed:.3g}"
    )


def assert_all_close(
    actual: tuple[Named, Named],
    expected: tuple[Named, Named],
    case: Case,
    dtype: str,
    *,
    gradient_magnitude: float = 1.0,
) -> None:
    """Outputs and gradients by name, as `run_layer` returns them for `make_inputs(case, dtype)`, agree."""
    outputs, gradients = actual
    for name, output in outputs.items():
        assert_close(output, expected[0][name], dtype, terms=case.output_terms, name=name)
    for name, gradient in gradients.items():
        terms = case.gradient_terms
        assert_close(gradient, expected[1][name], dtype, terms=terms, magnitude=gradient_magnitude, name=name)


def assert_identical(actual: Named, expected: Named) -> None:
    """Arrays by name agree bit for bit (any NaN equals any NaN)."""
    for name, array in actual.items():
        np.testing.assert_array_equal(to_float64(array), to_float64(expected[name]), err_msg=name, strict=True)
