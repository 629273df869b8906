"""How far a kernel may be from the float64 oracle, and how to say where it is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from .cases import Case


@dataclass(frozen=True)
class Tolerance:
    """`base + slope * sqrt(terms)` ulps of an array's magnitude; `epsilon` is one ulp of 1."""

    epsilon: float
    base: float
    slope: float

    def __call__(self, terms: int) -> float:
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
    actual: tuple[Mapping[str, Any], Mapping[str, Any]],
    expected: tuple[Mapping[str, Any], Mapping[str, Any]],
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


def assert_identical(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Arrays by name agree bit for bit (any NaN equals any NaN)."""
    for name, array in actual.items():
        np.testing.assert_array_equal(to_float64(array), to_float64(expected[name]), err_msg=name, strict=True)
