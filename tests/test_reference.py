"""The oracle itself: against finite differences, torch.nn.LSTM and a formulation row by row."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lstm_ext import reference
from lstm_ext.call import BOTH, FORWARD, REVERSE, Directions, Needs, Save, Saved
from lstm_ext.testing import (
    CASES,
    Case,
    Inputs,
    assert_all_close,
    assert_identical,
    make_inputs,
    run_layer,
    run_oracle,
)

TINY_CASES = [
    Case(3, 2, 3, 2),
    Case(3, 2, 2, 3, P=2, bias=False, directions=REVERSE, batch_first=True),
    Case(4, 3, 2, 2, directions=BOTH, lengths="with_zero", resets=True),
    Case(3, 3, 2, 3, P=2, directions=BOTH, lengths="with_zero", resets=True, batch_first=True),
    Case(3, 3, 1, 2, directions=BOTH, packed=True, state=False),
    Case(4, 3, 2, 3, P=1, directions=REVERSE, packed=True),
]
PADDED_CASES = [case for case in CASES if case.lengths in ("ragged", "with_zero")]
STOCK_CASES = [
    case
    for case in CASES
    if case.I > 0 and case.P < case.H and not case.lengths and not case.resets and case.directions != REVERSE
]


def loss(inputs: Inputs) -> float:
    """A random linear function of all outputs, whose gradients `layer_backward` is given."""
    outputs = reference.layer_forward(inputs.call, Save.CELLS)
    return sum(float(np.sum(np.nan_to_num(d) * a)) for d, a in zip(inputs.grads, outputs, strict=False))


def finite_differences(array: np.ndarray, inputs: Inputs, step: float = 1e-5) -> np.ndarray:
    """Of `loss` with respect to `array`, which is part of `inputs` (and as it was afterwards)."""
    differences = np.empty_like(array)
    for index in np.ndindex(array.shape):
        value = array[index]
        array[index] = value + step
        above = loss(inputs)
        array[index] = value - step
        differences[index] = (above - loss(inputs)) / (2 * step)
        array[index] = value
    return differences


@pytest.mark.parametrize("case", TINY_CASES, ids=str)
def test_gradients_match_finite_differences(case: Case) -> None:
    inputs = make_inputs(case)
    if not case.state:  # their gradients exist all the same
        zeros = np.zeros((case.num_directions, case.B, case.H))
        inputs = replace(inputs, h0=zeros[..., : case.width], c0=zeros.copy())
    _, gradients = run_layer(reference, inputs)
    arrays = [inputs.x, inputs.h0, inputs.c0, *inputs.weights]
    for array, (name, gradient) in zip(arrays, gradients.items(), strict=True):
        np.testing.assert_allclose(gradient, finite_differences(array, inputs), rtol=1e-7, atol=1e-9, err_msg=name)


def run_stock(inputs: Inputs) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `run_layer` returns, from torch.nn.LSTM: without cells, gates and their part in the gradients."""
    torch = pytest.importorskip("torch")
    case = inputs.case
    stock = torch.nn.LSTM(
        case.I,
        case.H,
        bias=case.bias,
        batch_first=case.batch_first,
        bidirectional=case.directions == BOTH,
        proj_size=case.P,
        dtype=torch.float64,
    )
    tensors = inputs.to_torch("float64")
    parameters = list(stock.parameters())
    for parameter, weight in zip(parameters, tensors.weights, strict=True):
        parameter.data.copy_(weight)
    state = (tensors.h0, tensors.c0) if case.state else (torch.zeros_like(tensors.dh_n), torch.zeros_like(tensors.dc_n))
    leaves = [a.requires_grad_() for a in (tensors.x, *state)]
    x = leaves[0]
    if case.packed:
        x = torch.nn.utils.rnn.PackedSequence(x, tensors.batch_sizes)
    y, (h_n, c_n) = stock(x, tuple(leaves[1:]))
    y = y.data if case.packed else y
    gradients = torch.autograd.grad([y, h_n, c_n], [*leaves, *parameters], [tensors.dy, tensors.dh_n, tensors.dc_n])
    names = ["dx", "dh0", "dc0", *(f"dweights[{n}]" for n in range(len(parameters)))]
    return {"y": y, "h_n": h_n, "c_n": c_n}, dict(zip(names, gradients, strict=True))


@pytest.mark.parametrize("case", STOCK_CASES, ids=str)
def test_matches_torch(case: Case) -> None:
    inputs = make_inputs(case)
    inputs = replace(inputs, dcells=np.zeros_like(inputs.dcells))
    assert_all_close(run_stock(inputs), run_layer(reference, inputs), case, "float64")


def walk_row(
    x: np.ndarray, h: np.ndarray, c: np.ndarray, weights: list[np.ndarray], resets: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray, np.ndarray]:
    """The steps of one row x [n, I] by the book: the h and c of each, and the last of them."""
    w_ih, w_hh, *rest = weights
    hs, cs = [], []
    for x_t, reset in zip(x, resets, strict=True):
        if reset:
            h, c = np.zeros_like(h), np.zeros_like(c)
        i, f, g, o = np.split(w_ih @ x_t + w_hh @ h + sum(rest[: len(rest) // 2 * 2]), 4)
        i, f, o = (0.5 + 0.5 * np.tanh(a / 2) for a in (i, f, o))
        c = f * c + i * np.tanh(g)
        h = o * np.tanh(c)
        if len(rest) % 2:
            h = rest[-1] @ h
        hs.append(h)
        cs.append(c)
    return hs, cs, h, c


def walk_rows(inputs: Inputs) -> dict[str, np.ndarray]:
    """The outputs of a layer, each row alone and only as long as it is."""
    case, D = inputs.case, inputs.case.num_directions
    lengths = np.full(case.B, case.T) if inputs.lengths is None else inputs.lengths
    if case.packed:
        lengths = (np.arange(case.B) < inputs.batch_sizes[:, None]).sum(axis=0)
    valid = np.arange(case.T)[:, None] < lengths
    x, resets = inputs.x, inputs.resets
    if case.packed:
        x = np.zeros((case.T, case.B, case.I))
        x[valid] = inputs.x
    if case.batch_first:
        x, resets = x.swapaxes(0, 1), None if resets is None else resets.T
    resets = np.zeros((case.T, case.B), bool) if resets is None else resets

    y, cells = np.zeros((case.T, case.B, D, case.width)), np.zeros((D, case.T, case.B, case.H))
    h_n, c_n = np.zeros((D, case.B, case.width)), np.zeros((D, case.B, case.H))
    if case.state:
        h_n[...], c_n[...] = inputs.h0, inputs.c0
    per_direction = len(inputs.weights) // D
    for d in range(D):
        weights = inputs.weights[d * per_direction : (d + 1) * per_direction]
        reverse = case.directions == REVERSE or d == 1
        for b, n in enumerate(lengths):
            times = range(n)[::-1] if reverse else range(n)
            hs, cs, h_n[d, b], c_n[d, b] = walk_row(x[times, b], h_n[d, b], c_n[d, b], weights, resets[times, b])
            for t, h, c in zip(times, hs, cs, strict=True):
                y[t, b, d], cells[d, t, b] = h, c
    y = y.reshape(case.T, case.B, D * case.width)
    if case.packed:
        y, cells = y[valid], cells[:, valid]
    return {"y": y.swapaxes(0, 1) if case.batch_first else y, "h_n": h_n, "c_n": c_n, "cells": cells}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_rows_walked_alone(case: Case) -> None:
    inputs = make_inputs(case)
    expected = walk_rows(inputs)
    outputs = dict(zip(expected, reference.layer_forward(inputs.call, Save.CELLS), strict=False))
    assert_all_close((outputs, {}), (expected, {}), case, "float64")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_narrow_types_stay_near(case: Case, dtype: str) -> None:
    inputs = make_inputs(case, dtype)
    outputs, gradients = run_layer(reference, inputs)
    wider = {"cells": np.dtype(np.float32)}
    for name, array in (outputs | gradients).items():
        assert array.dtype == wider.get(name, np.dtype(dtype)), name
    expected = run_oracle(inputs)
    assert_all_close((outputs, gradients), expected, case, dtype)


@pytest.mark.parametrize("case", PADDED_CASES, ids=str)
def test_padding_does_not_matter(case: Case) -> None:
    inputs = make_inputs(case)
    assert np.isnan(inputs.x).any()
    finite = inputs.map(lambda a: np.nan_to_num(a, nan=7.0))
    infinite = replace(finite, x=np.nan_to_num(inputs.x, nan=np.inf))
    expected = run_layer(reference, inputs)
    for other in (finite, infinite):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            results = run_layer(reference, other)
        for actual, same in zip(results, expected, strict=True):
            assert_identical(actual, same)


@pytest.mark.parametrize("directions", [FORWARD, REVERSE, BOTH])
def test_state_that_is_never_read_does_not_matter(directions: Directions) -> None:
    case = Case(3, 4, 2, 5, directions=directions, lengths="full")
    inputs = make_inputs(case)
    resets = np.zeros((3, 4), bool)
    resets[[0, -1], 1] = True
    inputs = replace(inputs, resets=resets, lengths=np.array([3, 3, 0, 2]))
    nan = replace(inputs, h0=inputs.h0.copy(), c0=inputs.c0.copy())
    nan.h0[:, 1:3] = nan.c0[:, 1:3] = np.nan  # row 1 starts with a reset, row 2 has no step
    outputs, gradients = run_layer(reference, inputs)
    nan_outputs, nan_gradients = run_layer(reference, nan)
    assert np.isnan(nan_outputs["h_n"][:, 2]).all()
    for name in ("h_n", "c_n"):
        outputs[name][:, 2] = nan_outputs[name][:, 2]
    assert_identical(nan_outputs, outputs)
    assert_identical(nan_gradients, gradients)
    np.testing.assert_array_equal(gradients["dh0"][:, 1], 0)
    np.testing.assert_array_equal(gradients["dh0"][:, 2], inputs.dh_n[:, 2])


def awkward(a: np.ndarray, layout: str) -> np.ndarray:
    """The same numbers in another layout, read-only."""
    if layout == "fortran":
        a = np.asfortranarray(a)
    elif layout == "negative strides":
        a = np.flip(np.flip(a).copy())
    elif layout == "big-endian":
        a = a.astype(a.dtype.newbyteorder(">"))
    a.flags.writeable = False
    return a


@pytest.mark.parametrize("layout", ["read-only", "fortran", "negative strides", "big-endian"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_memory_layout_does_not_matter(layout: str, dtype: str) -> None:
    case = Case(5, 4, 3, 7, P=3, directions=BOTH, lengths="with_zero", resets=True, batch_first=True)
    inputs = make_inputs(case, dtype)
    expected = run_layer(reference, inputs)
    strange = inputs.map(lambda a: awkward(a.copy(), layout)).map_masks(lambda a: awkward(a.copy(), layout))
    for actual, same in zip(run_layer(reference, strange), expected, strict=True):
        assert_identical(actual, same)
        assert all(a.dtype.isnative and a.flags.c_contiguous for a in actual.values())


@pytest.mark.parametrize("case", TINY_CASES, ids=str)
def test_inputs_stay_as_they_were(case: Case) -> None:
    inputs, before = make_inputs(case), make_inputs(case)
    run_layer(reference, inputs)
    for name in ("x", "h0", "c0", "lengths", "resets", "batch_sizes", "dy", "dh_n", "dc_n", "dcells", "weights"):
        np.testing.assert_equal(getattr(inputs, name), getattr(before, name), err_msg=name)


@pytest.mark.parametrize("save", [0, 1, 2])
def test_save_says_what_comes_back(save: int) -> None:
    inputs = make_inputs(TINY_CASES[2])
    full, outputs = (reference.layer_forward(inputs.call, Save(s)) for s in (2, save))
    assert [a is None for a in outputs] == [False, False, False, save < 1, save < 2]
    for output, expected in zip(outputs, full, strict=True):
        if output is not None:
            np.testing.assert_array_equal(output, expected)


@pytest.mark.parametrize("needs", range(16))
def test_needs_say_what_comes_back(needs: int) -> None:
    inputs = make_inputs(TINY_CASES[2])
    saved = Saved(*reference.layer_forward(inputs.call, Save.ALL)[3:])
    full, some = (reference.layer_backward(inputs.call, saved, inputs.grads, Needs(n)) for n in (15, needs))
    assert [a is not None for a in some] == [bool(needs & bit) for bit in (1, 2, 4, 8)]
    for gradient, expected in zip(some, full, strict=True):
        if gradient is not None:
            np.testing.assert_equal(gradient, expected)


@pytest.mark.parametrize("missing", ["dy", "dh_n", "dc_n", "dcells"])
def test_missing_gradients_are_zeros(missing: str) -> None:
    inputs = make_inputs(TINY_CASES[2])
    _, none = run_layer(reference, replace(inputs, **{missing: None}))
    _, zeros = run_layer(reference, replace(inputs, **{missing: np.zeros_like(getattr(inputs, missing))}))
    assert_identical(none, zeros)


def test_bias_gradients_are_two_arrays() -> None:
    _, gradients = run_layer(reference, make_inputs(Case(3, 2, 3, 4)))
    assert not np.shares_memory(gradients["dweights[2]"], gradients["dweights[3]"])


@pytest.mark.parametrize("sizes", [(3, 0, 4, 5), (3, 2, 0, 5), (3, 2, 4, 0)], ids=["B0", "I0", "H0"])
@pytest.mark.parametrize("lengths", [None, "with_zero"])
def test_empty_sizes(sizes: tuple[int, int, int, int], lengths: str | None) -> None:
    inputs = make_inputs(Case(*sizes, directions=BOTH, lengths=lengths))
    outputs, gradients = run_layer(reference, inputs)
    assert outputs["y"].shape == inputs.dy.shape
    arrays = [inputs.x, inputs.h0, inputs.c0, *inputs.weights]
    assert [a.shape for a in gradients.values()] == [a.shape for a in arrays]


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_cell_is_a_layer_of_one_step(dtype: str, bias: bool, state: bool) -> None:
    case = Case(1, 3, 5, 7, bias=bias, state=state)
    inputs = make_inputs(case, dtype)
    inputs = replace(inputs, dh_n=np.zeros_like(inputs.dh_n))
    expected = run_layer(reference, inputs)
    outputs, gradients = run_layer(reference, inputs.without_time())
    assert "h_n" not in outputs
    for name, array in (outputs | gradients).items():
        same = (expected[0] | expected[1])[name]
        assert array.dtype == same.dtype
        of_one_step = name in ("y", "c_n", "dx", "dh0", "dc0")
        np.testing.assert_array_equal(array, same[0] if of_one_step else same, err_msg=name, strict=True)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_sigmoid_at_the_extremes(dtype: type) -> None:
    x = np.array([-np.inf, -1e5, -5, 0, 5, 1e5, np.inf, np.nan], dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = reference.sigmoid(x)
    assert y.dtype == dtype
    expected = [0, 0, 1 / (1 + np.exp(5)), 0.5, 1 / (1 + np.exp(-5)), 1, 1, np.nan]
    np.testing.assert_allclose(y, expected, rtol=4 * np.finfo(dtype).eps)
