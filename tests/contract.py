"""What every engine with kernels has to do, on whatever device: one suite, run by a file of tests for each.

Such a file makes a subclass of `Contract`, which says by which ways and on which cases each test runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import pytest

from lstm_ext.call import BOTH, REVERSE, Needs, Outputs, Save, Saved
from lstm_ext.testing import (
    CASES,
    Case,
    Inputs,
    assert_all_close,
    assert_identical,
    make_inputs,
    run_layer,
    run_oracle,
    to_float64,
)

Results = tuple[dict[str, Any], dict[str, Any]]  # outputs and gradients, as `run_layer` gives them

# One case for each way through a layer, small enough to be run in every way there is.
MASKED = Case(9, 7, 5, 33, lengths="with_zero", resets=True, directions=BOTH, batch_first=True)
PROJECTED = Case(6, 5, 9, 65, P=31, lengths="with_zero", resets=True, directions=BOTH)
PACKED = Case(6, 9, 17, 33, P=7, packed=True, directions=BOTH)
WIDE = Case(4, 24, 20, 300, directions=BOTH)
COMPACT = [Case(1, 1, 1, 1), MASKED, PROJECTED, PACKED, WIDE]
SEVERAL_ROWS = [MASKED, PROJECTED, WIDE, Case(3, 9, 4, 8, directions=REVERSE)]


# Ways ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way(ABC):
    """An engine, and the arrays that it is given. `dtype` may be "tf32"."""

    dtype: str

    @property
    def stored(self) -> str:
        """The dtype of the arrays."""
        return "float32" if self.dtype == "tf32" else self.dtype

    @property
    def judged(self) -> str:
        """Whose numbers the inputs are, and whose tolerance counts: TF32 keeps as many bits as float16."""
        return "float16" if self.dtype == "tf32" else self.dtype

    @abstractmethod
    def engine(self, case: Case, turn: int = 0) -> AbstractContextManager[Any]:
        """What runs the case, with `forward` and `backward`; skips the test where it cannot.

        Turns differ in what must change no bit: the number of threads, the schedule.
        """

    @abstractmethod
    def own(self, inputs: Inputs) -> Inputs:
        """NumPy inputs as the engine takes them."""

    @property
    @abstractmethod
    def layouts(self) -> Mapping[str, Callable[[Any], Any]]:
        """The same array, laid out in memory in unusual ways."""

    def check_array(self, name: str, a: Any) -> None:
        """`a`, an output or gradient, is an array of the kind and dtype that was given; cells are float32 at least."""
        wide = name == "cells" and self.dtype.endswith("float16")
        assert str(a.dtype).removeprefix("torch.") == ("float32" if wide else self.stored), name

    def draw(self, case: Case, seed: int = 0) -> Inputs:
        """Random NumPy inputs."""
        return make_inputs(case, self.judged, seed)

    def run(self, inputs: Inputs, turn: int = 0) -> Results:
        """Of inputs that are the engine's own."""
        with self.engine(inputs.case, turn) as engine:
            return run_layer(engine, inputs)

    def forward(self, inputs: Inputs, save: Save) -> Any:
        """The same, of the forward pass alone."""
        with self.engine(inputs.case) as engine:
            return engine.forward(inputs.call, save)

    def oracle(self, case: Case, seed: int = 0) -> Results:
        """What `run` should give for `draw(case, seed)`."""
        return _oracle(case, self.judged, seed)


@dataclass(frozen=True)
class Layout:
    way: Way
    name: str
    convert: Callable[[Any], Any]

    def __str__(self) -> str:
        return f"{self.way}-{self.name}"


@lru_cache(maxsize=64)
def _oracle(case: Case, numbers: str, seed: int) -> Results:
    return run_oracle(make_inputs(case, numbers, seed))


def gradient_magnitude(case: Case, way: Way) -> float:
    """That of `assert_all_close`. With a single unit nothing averages the gates' rounding to a half type out."""
    return 3.0 if case.H == 1 and way.judged.endswith("float16") else 1.0


# Rows of the batch ---------------------------------------------------------------------------------------------------


def batch_axes(case: Case) -> dict[str, int]:
    """Where the batch is in each array that has one."""
    sequence = 0 if case.batch_first else 1
    sequences = dict.fromkeys(("x", "y", "dx", "dy", "resets"), sequence)
    states = dict.fromkeys(("h0", "c0", "h_n", "c_n", "dh_n", "dc_n", "dh0", "dc0"), 1)
    return sequences | states | {"cells": 2, "gates": 2, "dcells": 2, "lengths": 0}


def change_rows(inputs: Inputs, change: Callable[[str, np.ndarray, int], np.ndarray]) -> Inputs:
    """Puts change(name, array, axis of the batch) for each array that has one."""
    axes = {name: axis for name, axis in batch_axes(inputs.case).items() if getattr(inputs, name, None) is not None}
    return replace(inputs, **{name: change(name, getattr(inputs, name), axis) for name, axis in axes.items()})


def rows_of(results: Results, case: Case, rows: Any, names: Sequence[str]) -> dict[str, Any]:
    """The part of outputs and gradients of these names that belongs to these rows."""
    arrays, axes = results[0] | results[1], batch_axes(case)
    return {name: np.take(to_float64(arrays[name]), rows, axes[name]) for name in names}


OUTPUTS = ("y", "h_n", "c_n", "cells", "gates")
OF_ROWS = (*OUTPUTS, "dx", "dh0", "dc0")


def each(value: Any) -> list[Any]:
    """A gradient as a list of arrays: the one, those of the weights, or none."""
    return [] if value is None else value if isinstance(value, list) else [value]


# The suite -----------------------------------------------------------------------------------------------------------


def over(**lists: str) -> Callable[[Any], Any]:
    """Parametrizes a test: each of its arguments by an attribute of the class that runs it."""

    def mark(test: Any) -> Any:
        test.over = lists
        return test

    return mark


class Contract:
    """Subclasses list the ways, and may list other cases."""

    ways: ClassVar[Sequence[Way]]  # all, for the numbers
    bit_ways: ClassVar[Sequence[Way]]  # some, for what is the same bit for bit
    run_ways: ClassVar[Sequence[Way]]  # some, run again and again
    layout_ways: ClassVar[Sequence[Way]]

    cases: ClassVar[Sequence[Case]] = CASES
    run_cases: ClassVar[Sequence[Case]] = COMPACT
    row_cases: ClassVar[Sequence[Case]] = SEVERAL_ROWS
    save_cases: ClassVar[Sequence[Case]] = COMPACT
    needs_cases: ClassVar[Sequence[Case]] = [PROJECTED, PACKED]
    missing_cases: ClassVar[Sequence[Case]] = [MASKED]
    layout_cases: ClassVar[Sequence[Case]] = [MASKED, PACKED]
    step_sizes: ClassVar[Sequence[tuple[int, int, int]]] = [(1, 1, 1), (3, 5, 13), (17, 65, 67), (0, 3, 5)]

    exact_rows: ClassVar[Sequence[str]] = OF_ROWS  # what has the same bits whatever the other rows hold
    exact_order = True  # and wherever in the batch a row stands
    exact_layouts = True  # and however the arrays lie in memory

    either = (True, False)
    spoilers = (np.nan, np.inf)
    saves = (Save.NOTHING, Save.CELLS)
    all_needs = tuple(map(Needs, range(16)))
    missing_sets = (("dy",), ("dh_n",), ("dc_n",), ("dcells",), ("dy", "dh_n", "dc_n", "dcells"))

    @property
    def layouts(self) -> list[Layout]:
        return [Layout(way, name, convert) for way in self.layout_ways for name, convert in way.layouts.items()]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        for name, values in getattr(metafunc.function, "over", {}).items():
            metafunc.parametrize(name, getattr(self, values), ids=str)

    @over(way="ways", case="cases")
    def test_matches_the_oracle(self, case: Case, way: Way) -> None:
        outputs, gradients = way.run(way.own(way.draw(case)))
        for name, a in (outputs | gradients).items():
            way.check_array(name, a)
        magnitude = gradient_magnitude(case, way)
        assert_all_close((outputs, gradients), way.oracle(case), case, way.judged, gradient_magnitude=magnitude)

    @over(way="ways", sizes="step_sizes", bias="either", state="either")
    def test_step_matches_the_oracle(self, sizes: tuple[int, int, int], bias: bool, state: bool, way: Way) -> None:
        """A call without a time axis, as a cell makes it, with a batch and without; for a backward pass and not."""
        case = Case(1, *sizes, bias=bias, state=state, resets=bias == state)
        drawn = way.draw(case).without_time()
        alone = replace(drawn, x=drawn.x[0], dy=drawn.dy[0], dc_n=drawn.dc_n[0]) if case.B == 1 else drawn
        alone = replace(alone, h0=alone.h0[0], c0=alone.c0[0]) if case.B == 1 and state else alone
        alone = replace(alone, resets=alone.resets[0, ...]) if case.B == 1 and case.resets else alone
        for step in (drawn, alone):
            expected = run_oracle(step)
            actual = way.run(way.own(step))
            assert_all_close(actual, expected, case, way.judged, gradient_magnitude=gradient_magnitude(case, way))
            y, h_n, c_n, *saved = way.forward(way.own(step), Save.NOTHING)
            assert (h_n, *saved) == (None, None, None)
            assert_all_close(({"y": y, "c_n": c_n}, {}), expected, case, way.judged)

    @over(way="run_ways", case="run_cases")
    def test_runs_agree_bit_for_bit(self, case: Case, way: Way) -> None:
        inputs = way.own(way.draw(case))
        first, *others = [way.run(inputs, turn) for turn in range(5)]
        for other in others:
            for actual, expected in zip(other, first, strict=True):
                assert_identical(actual, expected)

    @over(way="bit_ways", case="row_cases", spoiler="spoilers")
    def test_rows_do_not_see_their_neighbours(self, case: Case, spoiler: float, way: Way) -> None:
        """Neither other numbers there, nor NaN or infinity, nor other masks."""
        drawn, changed = way.draw(case), way.draw(case, seed=1)
        kept, others = np.arange(0, case.B, 2), np.arange(1, case.B, 2)

        def spoil(name: str, a: np.ndarray, axis: int) -> np.ndarray:
            spoilt = np.moveaxis(a.copy(), axis, 0)
            spoilt[others] = np.moveaxis(getattr(changed, name), axis, 0)[others]
            if name not in ("lengths", "resets"):
                spoilt[others[::2]] = spoiler
            return np.moveaxis(spoilt, 0, axis)

        actual = way.run(way.own(change_rows(drawn, spoil)))
        expected = way.run(way.own(drawn))
        assert_identical(rows_of(actual, case, kept, self.exact_rows), rows_of(expected, case, kept, self.exact_rows))

    @over(way="bit_ways", case="row_cases")
    def test_rows_move_with_their_results(self, case: Case, way: Way) -> None:
        drawn, order = way.draw(case), np.random.default_rng(1).permutation(case.B)
        moved = way.run(way.own(change_rows(drawn, lambda _, a, axis: np.take(a, order, axis))))
        actual = rows_of(moved, case, range(case.B), OF_ROWS)
        if self.exact_order:
            exact = {name: actual[name] for name in self.exact_rows}
            assert_identical(exact, rows_of(way.run(way.own(drawn)), case, order, self.exact_rows))
        expected = rows_of(way.oracle(case), case, order, OF_ROWS)
        outputs = {name: actual.pop(name) for name in OUTPUTS}
        assert_all_close((outputs, actual), (expected, expected), case, way.judged)

    @over(way="bit_ways", case="save_cases", save="saves")
    def test_save_changes_no_output(self, case: Case, save: Save, way: Way) -> None:
        inputs = way.own(way.draw(case))
        full, some = (way.forward(inputs, s) for s in (Save.ALL, save))
        assert [a is None for a in some] == [False, False, False, save < Save.CELLS, True]
        for name, a, b in zip(OUTPUTS, some, full, strict=True):
            if a is not None:
                np.testing.assert_array_equal(to_float64(a), to_float64(b), err_msg=name)

    @over(way="bit_ways", case="needs_cases", needs="all_needs")
    def test_needs_change_no_gradient(self, case: Case, needs: Needs, way: Way) -> None:
        inputs = way.own(way.draw(case))
        with way.engine(case) as engine:
            saved = Saved.of(Outputs(*engine.forward(inputs.call, Save.ALL)), case.cell)
            full, some = (engine.backward(inputs.call, saved, inputs.grads, n) for n in (Needs.ALL, needs))
        asked = [bool(needs & bit) for bit in (Needs.X, Needs.H0, Needs.C0, Needs.WEIGHTS)]
        assert [a is not None for a in some] == asked
        for a, b in zip(some, full, strict=True):
            for ours, theirs in zip(each(a), each(b), strict=a is not None):
                np.testing.assert_array_equal(to_float64(ours), to_float64(theirs))

    @over(way="bit_ways", case="missing_cases", missing="missing_sets")
    def test_missing_gradients_are_zeros(self, case: Case, missing: tuple[str, ...], way: Way) -> None:
        drawn = way.draw(case)
        none = replace(drawn, **dict.fromkeys(missing))
        zeros = replace(drawn, **{name: np.zeros_like(getattr(drawn, name)) for name in missing})
        assert_identical(way.run(way.own(none))[1], way.run(way.own(zeros))[1])

    @over(layout="layouts", case="layout_cases")
    def test_layout_does_not_matter(self, case: Case, layout: Layout) -> None:
        way = layout.way
        inputs = way.own(way.draw(case))
        actual = way.run(inputs.map(layout.convert).map_masks(layout.convert))
        assert_all_close(actual, way.oracle(case), case, way.judged)
        if self.exact_layouts:
            for ours, theirs in zip(actual, way.run(inputs), strict=True):
                assert_identical(ours, theirs)

    @over(way="bit_ways", case="save_cases")
    def test_inputs_stay_as_they_were(self, case: Case, way: Way) -> None:
        drawn = way.draw(case)
        inputs = way.own(drawn)
        way.run(inputs)
        before, after = way.own(way.draw(case)), inputs
        for name in (*inputs.call._fields[:7], *inputs.grads._fields):
            for a, b in zip(each(getattr(after, name)), each(getattr(before, name)), strict=True):
                np.testing.assert_array_equal(to_float64(a), to_float64(b), err_msg=name)
