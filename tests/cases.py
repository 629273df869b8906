"""The shapes that every kernel is checked and timed with, and random inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lstm_ext.reference import BOTH, FORWARD, REVERSE

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Case:
    """One call of a layer. P = 0 is no projection; `state` False leaves h0 and c0 out (zeros)."""

    T: int
    B: int
    I: int  # noqa: E741
    H: int
    P: int = 0
    bias: bool = True
    directions: int = FORWARD
    batch_first: bool = False
    lengths: str | None = None  # "ragged" (1 to T), "with_zero" (0 to T, both there if B > 1), "full" (all T)
    resets: bool = False
    packed: bool = False
    state: bool = True

    @property
    def num_directions(self) -> int:
        return 2 if self.directions == BOTH else 1

    @property
    def width(self) -> int:
        """The width of h."""
        return self.P or self.H

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
        }
        shape = f"T{self.T}-B{self.B}-I{self.I}-H{self.H}"
        return "-".join([shape, *(name for name, present in options.items() if present)])


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

# Those that CASES lacks for every way of the CPU's plans to be taken, on each SIMD level (tests/test_cpu_plan.py).
PLAN_CASES = [
    Case(2, 1, 9, 67, P=31, directions=BOTH),  # a projection in place
    Case(5, 14, 390, 120, P=390),  # several blocks of packed weights
    Case(1, 7, 520, 200, P=520),  # and of weights in place
    Case(30, 12, 5, 130, lengths="ragged", resets=True),  # several chunks backward
    Case(2, 257, 3, 130),  # of one step each
    Case(5, 37, 60, 164, lengths="with_zero", resets=True, directions=BOTH),  # tiles, the last ones not full
    Case(4, 21, 64, 190, P=128, packed=True, directions=BOTH),
]


@dataclass(frozen=True)
class Inputs:
    """The arguments of `layer_forward`, and gradients of its outputs for `layer_backward`."""

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

    @property
    def masks(self) -> tuple[Any, Any, Any, int, bool]:
        """lengths, resets, batch_sizes, directions and batch_first, as the two functions of a layer take them."""
        return self.lengths, self.resets, self.batch_sizes, self.case.directions, self.case.batch_first

    def forward_args(self, save: int = 2) -> tuple[Any, ...]:
        return self.x, self.h0, self.c0, self.weights, *self.masks, save

    def backward_args(self, y: Any, cells: Any, gates: Any, needs: int = 15) -> tuple[Any, ...]:
        output_gradients = (self.dy, self.dh_n, self.dc_n, self.dcells)
        return *output_gradients, self.x, self.h0, self.c0, self.weights, y, cells, gates, *self.masks, needs

    def map(self, f: Callable[[Any], Any], cells: Callable[[Any], Any] | None = None) -> Inputs:
        """Puts f(a) for each floating-point array; `cells` does it for dcells, whose dtype is that of the cells."""
        names = ("x", "h0", "c0", "dy", "dh_n", "dc_n")
        changed = {name: f(getattr(self, name)) for name in names if getattr(self, name) is not None}
        return replace(self, **changed, weights=[f(w) for w in self.weights], dcells=(cells or f)(self.dcells))

    def map_masks(self, f: Callable[[Any], Any]) -> Inputs:
        """Puts f(a) for lengths, resets and batch_sizes."""
        names = ("lengths", "resets", "batch_sizes")
        return replace(self, **{name: f(getattr(self, name)) for name in names if getattr(self, name) is not None})

    def to_torch(self, dtype: str) -> Inputs:
        """The same inputs as CPU tensors of the dtype."""
        import torch

        cells_dtype = torch.promote_types(getattr(torch, dtype), torch.float32)
        return self.map(
            lambda a: torch.from_numpy(a).to(getattr(torch, dtype)),
            cells=lambda a: torch.from_numpy(a).to(cells_dtype),
        ).map_masks(torch.from_numpy)


def run_layer(layer: Any, inputs: Inputs, *num_threads: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Outputs and gradients by name, from a module with `layer_forward` and `layer_backward`."""
    outputs = layer.layer_forward(*inputs.forward_args(), *num_threads)
    y, _, _, cells, gates = outputs
    dx, dh0, dc0, dweights = layer.layer_backward(*inputs.backward_args(y, cells, gates), *num_threads)
    gradients = {"dx": dx, "dh0": dh0, "dc0": dc0} | {f"dweights[{n}]": dw for n, dw in enumerate(dweights)}
    return dict(zip(("y", "h_n", "c_n", "cells", "gates"), outputs, strict=True)), gradients


def round_to(a: Array, dtype: str) -> Array:
    """`a` [float64] in the dtype; numbers of bfloat16, which NumPy lacks, come as float32."""
    if dtype != "bfloat16":
        return a.astype(dtype)
    bits = a.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def draw_lengths(case: Case, rng: np.random.Generator) -> Array | None:
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

    shapes = [(4 * case.H, case.I), (4 * case.H, case.width)]
    shapes += [(4 * case.H,)] * 2 if case.bias else []
    shapes += [(case.P, case.H)] if case.P else []
    lengths = draw_lengths(case, rng)
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
        [weight(*shape) for _ in range(D) for shape in shapes],
        lengths,
        resets,
        batch_sizes,
        dy,
        normal(*h),
        normal(*c),
        dcells,
    )
