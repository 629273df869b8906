"""`lstm_ext.testing`: what judges the kernels finds what is wrong, and needs NumPy alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lstm_ext import reference
from lstm_ext.call import BOTH
from lstm_ext.testing import (
    CASES,
    TOLERANCES,
    Case,
    assert_all_close,
    assert_close,
    assert_identical,
    largest_error,
    make_inputs,
    run_layer,
    run_oracle,
)

from .test_process import WITHOUT_TORCH, succeed

EXACT = np.array([[0.5, -2.0], [np.nan, np.inf]])


def changed(value: float, place: tuple[int, int] = (0, 1)) -> np.ndarray:
    a = EXACT.copy()
    a[place] = value
    return a


WRONG: dict[str, np.ndarray] = {
    "another number": changed(-2.0 - 2.5 * TOLERANCES["float32"](9)),
    "NaN": changed(np.nan),
    "no NaN": changed(0.0, (1, 0)),
    "infinity": changed(-np.inf, (1, 1)),
    "shape": EXACT[:1],
}


@pytest.mark.parametrize("name", WRONG)
def test_assert_close_finds_what_is_wrong(name: str) -> None:
    assert_close(EXACT, EXACT, "float32")
    assert_close(changed(-2.0 - 1.5 * TOLERANCES["float32"](9)), EXACT, "float32", terms=9)  # of a magnitude of 2
    with pytest.raises(AssertionError, match="wanted"):
        assert_close(WRONG[name], EXACT, "float32", terms=9, name="wanted")


def test_largest_error_is_relative_to_the_magnitude() -> None:
    assert largest_error(EXACT, EXACT) == 0
    assert largest_error(changed(-2.5), EXACT) == 0.25
    assert largest_error(changed(np.nan), EXACT) == np.inf
    assert largest_error(EXACT[1:], EXACT[1:]) == 0


@pytest.mark.parametrize("spoil", [lambda a: a * 1.001, lambda a: a + 1e-4])
@pytest.mark.parametrize("name", ["y", "gates", "dx", "dh0", "dweights[1]"])
def test_each_output_and_gradient_is_judged(name: str, spoil: Callable[[Any], Any]) -> None:
    case = Case(4, 3, 5, 7, directions=BOTH)
    actual, expected = (run_layer(reference, make_inputs(case, "float32")) for _ in range(2))
    assert_all_close(actual, run_oracle(make_inputs(case, "float32")), case, "float32")
    assert_identical(actual[0] | actual[1], expected[0] | expected[1])
    part = actual[0] if name in actual[0] else actual[1]
    part[name] = spoil(part[name])
    with pytest.raises(AssertionError):
        assert_all_close(actual, expected, case, "float32")
    with pytest.raises(AssertionError):
        assert_identical(part, expected[0] | expected[1])


def test_cases_have_names_of_their_own() -> None:
    assert len({str(case) for case in CASES}) == len(CASES)


def test_it_needs_numpy_alone() -> None:
    program = """
    from lstm_ext import reference
    from lstm_ext.testing import Case, assert_all_close, make_inputs, run_layer, run_oracle
    case = Case(3, 2, 4, 5, lengths="with_zero")
    inputs = make_inputs(case, "float32")
    assert_all_close(run_layer(reference, inputs), run_oracle(inputs), case, "float32")
    """
    succeed(WITHOUT_TORCH + "\n".join(line.strip() for line in program.splitlines()))
