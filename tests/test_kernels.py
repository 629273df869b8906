"""The compiled CPU kernels against the float64 oracle, and against themselves bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lstm_ext.torch_op  # noqa: F401 (makes the native module take tensors)
from lstm_ext import _native, reference
from lstm_ext.call import BOTH, FORWARD, REVERSE, Directions, Needs, Save, Saved
from lstm_ext.testing import (
    CASES,
    Case,
    Inputs,
    assert_all_close,
    assert_close,
    assert_identical,
    make_inputs,
    run_layer,
    run_oracle,
)

try:
    import torch
except ImportError:
    torch = None

C: Any = _native.C
pytestmark = pytest.mark.skipif(C is None, reason=f"no compiled kernels: {_native.reason}")

needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")
FRAMEWORKS = [
    *(pytest.param("numpy", dtype, id=f"numpy-{dtype}") for dtype in ("float32", "float64", "float16")),
    *(
        pytest.param("torch", dtype, id=f"torch-{dtype}", marks=needs_torch)
        for dtype in ("float32", "float64", "bfloat16", "float16")
    ),
]
# One case for each way through a layer, small enough to be run under every SIMD level.
MASKED_CASE = Case(9, 7, 5, 33, lengths="with_zero", resets=True, directions=BOTH, batch_first=True)
PROJECTED_CASE = Case(6, 5, 9, 65, P=31, lengths="with_zero", resets=True, directions=BOTH)
PACKED_CASE = Case(6, 9, 17, 33, P=7, packed=True, directions=BOTH)
WIDE_CASE = Case(4, 24, 20, 300, directions=BOTH)
# Of batches that are multiplied by tiles where a processor has them, in both passes; the last tiles are not full.
TILE_CASES = [
    Case(5, 37, 60, 164, lengths="with_zero", resets=True, directions=BOTH),
    Case(4, 21, 64, 190, P=128, packed=True, directions=BOTH),
    Case(3, 9, 200, 190, directions=REVERSE),
]
COMPACT_CASES = [
    Case(1, 1, 1, 1),
    Case(2, 3, 129, 257),
    MASKED_CASE,
    PROJECTED_CASE,
    PACKED_CASE,
    WIDE_CASE,
    *TILE_CASES,
]


def in_framework(inputs: Inputs, framework: str, dtype: str) -> Inputs:
    return inputs.to_torch(dtype) if framework == "torch" else inputs


@pytest.mark.parametrize(("framework", "dtype"), FRAMEWORKS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(case: Case, framework: str, dtype: str) -> None:
    inputs = make_inputs(case, dtype)
    actual = run_layer(C, in_framework(inputs, framework, dtype), 1)
    kind, half = (np.ndarray if framework == "numpy" else torch.Tensor), dtype.endswith("float16")
    for name, array in (actual[0] | actual[1]).items():
        assert isinstance(array, kind), name
        expected_dtype = "float32" if half and name == "cells" else dtype
        assert str(array.dtype).removeprefix("torch.") == expected_dtype, name
    assert_all_close(actual, run_oracle(inputs), case, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_threads_and_runs_agree_bit_for_bit(case: Case, dtype: str) -> None:
    inputs = make_inputs(case, dtype)
    expected = run_layer(C, inputs, 1)
    for num_threads in (1, 2, 3, 0):
        for actual, same in zip(run_layer(C, inputs, num_threads), expected, strict=True):
            assert_identical(actual, same)


def batch_axes(case: Case) -> dict[str, int]:
    """Where the batch is in each array that has one."""
    sequence = 0 if case.batch_first else 1
    sequences = dict.fromkeys(("x", "y", "dx", "dy", "resets"), sequence)
    states = dict.fromkeys(("h0", "c0", "h_n", "c_n", "dh_n", "dc_n", "dh0", "dc0"), 1)
    return sequences | states | {"cells": 2, "gates": 2, "dcells": 2, "lengths": 0}


def select_rows(inputs: Inputs, rows: np.ndarray) -> Inputs:
    """The batch made of these rows, in this order."""
    names = ("x", "dy", "resets", "h0", "c0", "dh_n", "dc_n", "dcells", "lengths")
    present = [name for name in names if getattr(inputs, name) is not None]
    axes = batch_axes(inputs.case)
    return replace(inputs, **{name: np.take(getattr(inputs, name), rows, axes[name]) for name in present})


def rows_of(results: tuple[dict[str, Any], dict[str, Any]], case: Case, rows: Any) -> dict[str, Any]:
    """The part of outputs and gradients that belongs to these rows."""
    arrays, axes = results[0] | results[1], batch_axes(case)
    return {name: np.take(array, rows, axes[name]) for name, array in arrays.items() if name in axes}


ROW_CASES = [
    Case(3, 31, 63, 127),
    MASKED_CASE,
    PROJECTED_CASE,
    WIDE_CASE,
    *TILE_CASES[:1],
    Case(3, 9, 4, 8, directions=REVERSE),
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", ROW_CASES, ids=str)
def test_rows_move_with_their_results(case: Case, dtype: str) -> None:
    inputs, order = make_inputs(case, dtype), np.random.default_rng(1).permutation(case.B)
    permuted = run_layer(C, select_rows(inputs, order), 2)
    assert_identical(rows_of(permuted, case, range(case.B)), rows_of(run_layer(C, inputs, 2), case, order))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", ROW_CASES, ids=str)
def test_rows_do_not_see_their_neighbours(case: Case, dtype: str) -> None:
    inputs, others = make_inputs(case, dtype), make_inputs(case, dtype, seed=1)
    kept = np.arange(0, case.B, 2)
    mixed = replace(
        inputs,
        **{
            name: mix_rows(getattr(inputs, name), getattr(others, name), kept, axis)
            for name, axis in batch_axes(case).items()
            if getattr(inputs, name, None) is not None
        },
    )
    assert_identical(rows_of(run_layer(C, mixed, 2), case, kept), rows_of(run_layer(C, inputs, 2), case, kept))


def mix_rows(ours: np.ndarray, theirs: np.ndarray, kept: np.ndarray, axis: int) -> np.ndarray:
    """`ours` in the rows `kept` of the axis, `theirs` in the others."""
    mixed = np.moveaxis(theirs.copy(), axis, 0)
    mixed[kept] = np.moveaxis(ours, axis, 0)[kept]
    return np.moveaxis(mixed, 0, axis)


@pytest.mark.parametrize("save", [0, 1])
@pytest.mark.parametrize("case", COMPACT_CASES, ids=str)
def test_save_changes_no_output(case: Case, save: int) -> None:
    inputs = make_inputs(case, "float32")
    full, outputs = (C.layer_forward(inputs.call, Save(s), 1) for s in (2, save))
    assert [a is None for a in outputs] == [False, False, False, save < 1, save < 2]
    for output, expected in zip(outputs, full, strict=True):
        if output is not None:
            np.testing.assert_array_equal(output, expected)


@pytest.mark.parametrize("needs", range(16))
@pytest.mark.parametrize("case", [PROJECTED_CASE, PACKED_CASE], ids=str)
def test_needs_change_no_gradient(case: Case, needs: int) -> None:
    inputs = make_inputs(case, "float32")
    y, _, _, cells, gates = C.layer_forward(inputs.call, Save.ALL, 1)
    full, some = (C.layer_backward(inputs.call, Saved(y, cells, gates), inputs.grads, Needs(n), 1) for n in (15, needs))
    assert [a is not None for a in some] == [bool(needs & bit) for bit in (1, 2, 4, 8)]
    for gradient, expected in zip(some, full, strict=True):
        if gradient is not None:
            np.testing.assert_equal(gradient, expected)


@pytest.mark.parametrize("missing", [("dy",), ("dh_n",), ("dc_n",), ("dcells",), ("dy", "dh_n", "dc_n", "dcells")])
def test_missing_gradients_are_zeros(missing: tuple[str, ...]) -> None:
    inputs = make_inputs(MASKED_CASE, "float32")
    _, none = run_layer(C, replace(inputs, **dict.fromkeys(missing)), 1)
    zeros = replace(inputs, **{name: np.zeros_like(getattr(inputs, name)) for name in missing})
    assert_identical(none, run_layer(C, zeros, 1)[1])


@pytest.mark.parametrize(("framework", "dtype"), FRAMEWORKS)
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 32, 32), (3, 5, 13), (17, 65, 67), (33, 7, 129), (0, 3, 5)], ids=str)
def test_cell_matches_the_oracle(
    sizes: tuple[int, int, int], bias: bool, state: bool, framework: str, dtype: str
) -> None:
    case = Case(1, *sizes, bias=bias, state=state)
    inputs = make_inputs(case, dtype)
    step = in_framework(inputs, framework, dtype).without_time()
    assert_all_close(run_layer(C, step, 1), run_oracle(inputs.without_time()), case, dtype)


@pytest.mark.parametrize("directions", [FORWARD, REVERSE])
@pytest.mark.parametrize("sizes", [(5, 4, 3, 17), (5, 18, 32, 160)], ids=str)
def test_nan_and_infinity_arrive_where_they_must(sizes: tuple[int, int, int, int], directions: Directions) -> None:
    case = Case(*sizes, directions=directions)
    inputs = make_inputs(case, "float32")
    inputs.x[2, 1, 0], inputs.x[2, 2, 1], inputs.x[3, 3] = np.nan, np.inf, 1e30
    names = ("y", "h_n", "c_n", "cells", "gates")
    actual = C.layer_forward(inputs.call, Save.ALL, 1)
    with np.errstate(invalid="ignore"):  # inf - inf
        expected = reference.layer_forward(inputs.map(lambda a: a.astype(np.float64)).call, Save.ALL)
    assert np.isnan(expected[0]).any()
    for name, ours, theirs in zip(names, actual, expected, strict=True):
        assert_close(ours, theirs, "float32", terms=case.output_terms, name=name)


@pytest.mark.parametrize("B", [4, 18])
def test_a_signalling_nan_is_nan(B: int) -> None:
    inputs = make_inputs(Case(2, B, 32, 160), "float32")
    inputs.x.view(np.uint32)[0, 1, 2] = 0x7F800001  # cut to its upper half it would be an infinity
    y = C.layer_forward(inputs.call, Save.ALL, 1)[0]
    assert np.isnan(y[:, 1]).all()
    assert not np.isnan(np.delete(y, 1, axis=1)).any()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("options", [{}, {"state": False}, {"resets": True}], ids=str)
@pytest.mark.parametrize("sizes", [(3, 4, 3, 17), (3, 18, 64, 155)], ids=str)
def test_infinite_weights_and_gradients_arrive_where_they_must(
    sizes: tuple[int, int, int, int], options: dict[str, bool], dtype: str
) -> None:
    """An infinity times a finite number is one, and not NaN as in the planes that tiles make of a float."""
    case = Case(*sizes, **options)
    inputs = make_inputs(case, dtype)
    w_ih, w_hh = inputs.weights[:2]
    w_ih[1, 2], w_hh[2 * case.H + 3, 5] = np.inf, -np.inf
    inputs.dy[0, 1, 4], inputs.dy[1, 2, 7], inputs.dy[2, 3, 0] = np.inf, np.nan, np.finfo(dtype).max
    with np.errstate(invalid="ignore", over="ignore"):
        expected = run_oracle(inputs)
        expected = tuple({name: array.astype(dtype) for name, array in arrays.items()} for arrays in expected)
    for arrays, same in zip(run_layer(C, inputs, 2), expected, strict=True):
        for name, array in arrays.items():
            for kind in (np.isnan, np.isposinf, np.isneginf):
                np.testing.assert_array_equal(kind(array), kind(same[name]), err_msg=f"{name}, {kind.__name__}")


def test_saturated_gates_are_exact() -> None:
    case = Case(4, 3, 2, 19)
    inputs = make_inputs(case, "float32")
    actual = run_layer(C, replace(inputs, x=np.sign(inputs.x) * np.float32(1e6)), 1)
    i, f, _, o = np.split(actual[0]["gates"], 4, axis=-1)
    assert np.isin([i, f, o], [0, 1]).mean() > 0.9
    assert_all_close(actual, run_oracle(replace(inputs, x=np.sign(inputs.x) * np.float32(1e6))), case, "float32")


NUMPY_LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "fortran": np.asfortranarray,
    "negative strides": lambda a: np.flip(np.flip(a).copy()),
    "every second": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "misaligned": lambda a: np.frombuffer(b"\0" + a.tobytes(), np.uint8)[1:].view(a.dtype).reshape(a.shape),
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
}


@pytest.mark.parametrize("layout", NUMPY_LAYOUTS)
@pytest.mark.parametrize("case", [MASKED_CASE, PACKED_CASE], ids=str)
def test_numpy_layout_does_not_matter(case: Case, layout: str) -> None:
    def convert(a: np.ndarray) -> np.ndarray:
        a = NUMPY_LAYOUTS[layout](a)
        a.flags.writeable = False
        return a

    inputs = make_inputs(case, "float32")
    strange = inputs.map(convert).map_masks(convert)
    for actual, expected in zip(run_layer(C, strange, 1), run_layer(C, inputs, 1), strict=True):
        assert_identical(actual, expected)


@needs_torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [MASKED_CASE, PACKED_CASE], ids=str)
def test_torch_layout_does_not_matter(case: Case, dtype: str) -> None:
    def every_second(a: Any) -> Any:
        return a.repeat_interleave(2, dim=-1)[..., ::2]

    def transposed(a: Any) -> Any:
        return a.transpose(0, -1).contiguous().transpose(0, -1)

    inputs = make_inputs(case, dtype).to_torch(dtype)
    expected = run_layer(C, inputs, 1)
    for convert in (every_second, transposed):
        strange = inputs.map(convert).map_masks(convert)
        for actual, same in zip(run_layer(C, strange, 1), expected, strict=True):
            assert_identical(actual, same)


@pytest.mark.parametrize("case", COMPACT_CASES, ids=str)
def test_inputs_stay_as_they_were(case: Case) -> None:
    inputs, before = make_inputs(case, "float32"), make_inputs(case, "float32")
    run_layer(C, inputs, 2)
    for name in ("x", "h0", "c0", "lengths", "resets", "batch_sizes", "dy", "dh_n", "dc_n", "dcells", "weights"):
        np.testing.assert_equal(getattr(inputs, name), getattr(before, name), err_msg=name)


@st.composite
def any_inputs(draw: st.DrawFn) -> Inputs:
    """A layer of any kind and small size with lengths and resets of its own."""
    size = st.integers(1, 20)
    T, B, H = draw(st.integers(1, 6)), draw(st.integers(0, 9)), draw(size)
    packed = B > 0 and draw(st.booleans())
    case = Case(
        T,
        B,
        draw(size),
        H,
        P=draw(st.integers(0, H - 1)),
        bias=draw(st.booleans()),
        directions=draw(st.sampled_from([FORWARD, REVERSE, BOTH])),
        batch_first=not packed and draw(st.booleans()),
        packed=packed,
        state=draw(st.booleans()),
    )
    inputs = make_inputs(case, draw(st.sampled_from(["float32", "float64"])), seed=draw(st.integers(0, 99)))
    if packed:
        return inputs
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, T), min_size=B, max_size=B))
        inputs = replace(inputs, lengths=np.array(lengths, np.int64))
    if draw(st.booleans()):
        resets = draw(st.lists(st.booleans(), min_size=T * B, max_size=T * B))
        inputs = replace(inputs, resets=np.array(resets, bool).reshape((B, T) if case.batch_first else (T, B)))
    return inputs


@settings(deadline=None, max_examples=200)
@given(any_inputs())
def test_any_shape_matches_the_oracle(inputs: Inputs) -> None:
    dtype = str(inputs.x.dtype)
    assert_all_close(run_layer(C, inputs, 2), run_oracle(inputs), inputs.case, dtype, gradient_magnitude=3.0)


# SIMD levels: one process each, since the level is picked when the module is loaded ----------------------------------

FORCED_LEVEL = os.environ.get("LSTM_EXT_SIMD")


@pytest.mark.skipif(FORCED_LEVEL is None, reason="LSTM_EXT_SIMD forces no level")
def test_forced_simd_level_is_picked() -> None:
    assert C.build_info()["simd"] == FORCED_LEVEL


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("case", COMPACT_CASES, ids=str)
def test_simd_level_matches_the_oracle(case: Case, dtype: str) -> None:
    inputs = make_inputs(case, dtype, seed=2)
    assert_all_close(run_layer(C, inputs, 2), run_oracle(inputs), case, dtype)


@pytest.mark.skipif(FORCED_LEVEL is not None, reason="this is the run of one level")
@pytest.mark.parametrize("level", C.build_info()["simd_available"] if C else [])
def test_every_simd_level(level: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "simd_level", __file__]
    environment = os.environ | {"LSTM_EXT_SIMD": level}
    done = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    expected = 1 + 3 * len(COMPACT_CASES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{expected} passed" in done.stdout, done.stdout


# Long enough for several chunks of steps, with rows that end in each of them: members of a team are then in different
# chunks at once, and must not touch each other's rows.
RAGGED_CHUNKS = [
    Case(90, 33, 5, 130, lengths="with_zero", resets=True),
    Case(90, 33, 5, 130, packed=True, directions=REVERSE),
    Case(90, 5, 5, 130, lengths="ragged", directions=BOTH),
]


@pytest.mark.parametrize("case", RAGGED_CHUNKS, ids=str)
def test_teams_keep_to_their_rows_across_chunks(case: Case) -> None:
    inputs = make_inputs(case, "float32")
    expected = run_layer(C, inputs, 1)
    assert_all_close(expected, run_oracle(inputs), case, "float32")
    for num_threads in [2, 3, 4] * 4:
        for actual, same in zip(run_layer(C, inputs, num_threads), expected, strict=True):
            assert_identical(actual, same)
