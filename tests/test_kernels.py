"""The compiled CPU kernels against the float64 oracle, and against themselves bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lstm_ext import _native, reference
from lstm_ext.call import BOTH, FORWARD, REVERSE, Directions, Save
from lstm_ext.cell import Activation, Cell, Norm
from lstm_ext.engines.cpu import use_plan
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

from .conftest import needs_native
from .contract import COMPACT, MASKED, PACKED, PROJECTED, SEVERAL_ROWS, WIDE, Contract, Way
from .test_cpu_plan import ALONE, PLAN_CASES

try:
    import torch

    import lstm_ext.torch_op  # noqa: F401 (makes the native module take tensors)
except ImportError:
    torch = None

C: Any = _native.C
pytestmark = needs_native

# Of batches that are multiplied by tiles where a processor has them, in both passes; the last tiles are not full.
TILE_CASES = [
    Case(5, 37, 60, 164, lengths="with_zero", resets=True, directions=BOTH),
    Case(4, 21, 64, 190, P=128, packed=True, directions=BOTH),
    Case(3, 9, 200, 190, directions=REVERSE),
]
COMPACT_CASES = [*COMPACT, Case(2, 3, 129, 257), *TILE_CASES]


# Cells with options. Those in SMOOTH have neither corners nor clips, where rounding to a half type would decide.
SMOOTH = {
    "forget bias, peephole": Cell(forget_bias=1.0, peephole=True),
    "coupled, softsign": Cell(
        Activation.SOFTSIGN, recurrent_activation=Activation.SIGMOID, coupled=True, peephole=True
    ),
    "mean of zoneout": Cell(zoneout_h=0.3, zoneout_c=0.2),
    "all masks": Cell(
        zoneout_h=0.3, zoneout_c=0.2, recurrent_dropout=0.4, candidate_dropout=0.25, peephole=True, training=True
    ),
}
NORMED = {
    "normed rows": Cell(norm=Norm.ROWS, norm_epsilon=1e-3),
    "normed gates": Cell(
        Activation.SOFTSIGN,
        norm=Norm.GATES,
        norm_epsilon=1e-3,
        forget_bias=1.0,
        peephole=True,
        coupled=True,
        zoneout_h=0.2,
        zoneout_c=0.3,
    ),
    "normed rows, masks": Cell(
        norm=Norm.ROWS,
        norm_epsilon=1e-3,
        cell_clip=0.8,
        peephole=True,
        zoneout_h=0.2,
        zoneout_c=0.3,
        recurrent_dropout=0.25,
        candidate_dropout=0.2,
        training=True,
    ),
}
CELLS = SMOOTH | {
    "elu, hard sigmoid": Cell(
        Activation.ELU, 1.5, recurrent_activation=Activation.HARD_SIGMOID, recurrent_alpha=0.2, recurrent_beta=0.5
    ),
    "leaky relu, tanh": Cell(Activation.LEAKY_RELU, 0.3, recurrent_activation=Activation.TANH),
    "relu, clips": Cell(Activation.RELU, cell_clip=0.3, proj_clip=0.1),
    "softplus, linear": Cell(Activation.SOFTPLUS, recurrent_activation=Activation.LINEAR, cell_clip=1.0),
    "everything is dropped": Cell(zoneout_c=1.0, recurrent_dropout=1.0, candidate_dropout=1.0, training=True),
    "clips, masks": Cell(
        cell_clip=0.4, proj_clip=0.1, zoneout_h=0.1, zoneout_c=0.2, recurrent_dropout=0.3, peephole=True, training=True
    ),
}
CELL_SHAPES = [Case(1, 9, 33, 40), MASKED, PROJECTED]


def with_cell(case: Case, cell: Cell) -> list[Case]:
    """Such a layer, with weights in torch's layout and, where it may have it, in TensorFlow's."""
    if case.P:
        return [replace(case, cell=cell)]
    kernel = replace(case, bias=True, cell=cell._replace(proj_clip=0.0, tensorflow=True))
    return [replace(case, cell=cell._replace(proj_clip=0.0)), kernel]


def cell_cases(cell: Cell, shapes: Sequence[Case] = CELL_SHAPES) -> list[Case]:
    return [case for shape in shapes for case in with_cell(shape, cell)]


def frozen(convert: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """The same, read-only."""

    def convert_and_freeze(a: np.ndarray) -> np.ndarray:
        a = convert(a)
        a.flags.writeable = False
        return a

    return convert_and_freeze


def misaligned(a: np.ndarray) -> np.ndarray:
    return np.frombuffer(b"\0" + a.tobytes(), np.uint8)[1:].view(a.dtype).reshape(a.shape)


LAYOUTS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "numpy": {
        "fortran": frozen(np.asfortranarray),
        "negative strides": frozen(lambda a: np.flip(np.flip(a).copy())),
        "every second": frozen(lambda a: np.repeat(a, 2, axis=-1)[..., ::2]),
        "misaligned": frozen(misaligned),
        "big-endian": frozen(lambda a: a.astype(a.dtype.newbyteorder(">"))),
    },
    "torch": {
        "every second": lambda a: a.repeat_interleave(2, dim=-1)[..., ::2],
        "transposed": lambda a: a.transpose(0, -1).contiguous().transpose(0, -1),
    },
}


@dataclass(frozen=True)
class OnCpu(Way):
    """The compiled core on arrays of NumPy or torch."""

    framework: str = "numpy"
    threads: int = 1

    def __str__(self) -> str:
        return f"{self.framework}-{self.dtype}"

    @property
    def layouts(self) -> dict[str, Callable[[Any], Any]]:
        return LAYOUTS[self.framework]

    def engine(self, case: Case, turn: int = 0) -> AbstractContextManager[Any]:
        if self.framework == "torch" and torch is None:
            pytest.skip("torch is not installed")
        threads = (self.threads, 1, 2, 3, 0)[turn]
        forward, backward = (partial(f, num_threads=threads) for f in (C.layer_forward, C.layer_backward))
        return nullcontext(SimpleNamespace(forward=forward, backward=backward))

    def own(self, inputs: Inputs) -> Inputs:
        return inputs if self.framework == "numpy" or torch is None else inputs.to_torch(self.dtype)

    def check_array(self, name: str, a: Any) -> None:
        super().check_array(name, a)
        assert isinstance(a, np.ndarray if self.framework == "numpy" else torch.Tensor), name


class TestContract(Contract):
    numpy_dtypes = ("float32", "float64", "float16")
    ways = (
        *(OnCpu(dtype) for dtype in numpy_dtypes),
        *(OnCpu(dtype, "torch") for dtype in ("float32", "float64", "bfloat16", "float16")),
    )
    run_ways = tuple(OnCpu(dtype) for dtype in numpy_dtypes)
    bit_ways = tuple(OnCpu(dtype, threads=2) for dtype in ("float32", "float64"))
    layout_ways = (OnCpu("float32"), OnCpu("float32", "torch"), OnCpu("bfloat16", "torch"))
    run_cases = CASES
    save_cases = COMPACT_CASES
    row_cases = (*SEVERAL_ROWS, Case(3, 31, 63, 127), TILE_CASES[0])
    step_sizes = (*Contract.step_sizes, (1, 32, 32), (33, 7, 129))


KERNEL = SMOOTH["forget bias, peephole"]._replace(tensorflow=True)
DRAWN = CELLS["clips, masks"]
CELL_MASKED, CELL_KERNEL = replace(MASKED, cell=DRAWN._replace(proj_clip=0.0)), replace(MASKED, cell=KERNEL)


class TestCellContract(Contract):
    """The same of cells with options. Masks follow a row's number, so that rows that move are of cells without."""

    ways = (OnCpu("float64"), OnCpu("bfloat16", "torch"))
    run_ways = bit_ways = (OnCpu("float32"), OnCpu("float64", threads=2))
    layout_ways = (OnCpu("float32"), OnCpu("bfloat16", "torch"))
    cases = cell_cases(SMOOTH["all masks"], [Case(1, 1, 1, 1), *CELL_SHAPES, PACKED, WIDE])
    run_cases = row_cases = save_cases = needs_cases = missing_cases = (
        CELL_MASKED,
        CELL_KERNEL,
        replace(PROJECTED, cell=DRAWN),
        replace(WIDE, cell=KERNEL),
        replace(MASKED, cell=NORMED["normed rows, masks"]),
    )
    layout_cases = (CELL_KERNEL, replace(PACKED, cell=SMOOTH["all masks"]))
    step_sizes = ((1, 5, 13),)  # but of the plain cell

    def test_rows_move_with_their_results(self, *_: Any) -> None:
        for case in (CELL_KERNEL, replace(PROJECTED, cell=CELLS["relu, clips"])):
            super().test_rows_move_with_their_results(case, OnCpu("float32"))


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


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("directions", [FORWARD, REVERSE])
@pytest.mark.parametrize("P", [0, 37])
def test_simd_level_has_h_again_bit_for_bit(P: int, directions: Directions, dtype: str) -> None:
    """Of two steps the second alone has an input, 1: dw_ih is then its gates' gradients, and dw_hh these times h."""
    inputs = make_inputs(Case(2, 1, 1, 67, P=P, directions=directions, state=False), dtype)
    first, second = (0, 1) if directions == FORWARD else (1, 0)
    inputs.x[:, 0, 0] = [first == 1, second == 1]
    with use_plan(in_place=False):  # sums of a projection are then in the order of those of a backward pass
        outputs, gradients = run_layer(C, inputs)
    dw_ih, dw_hh = gradients["dweights[0]"], gradients["dweights[1]"]
    np.testing.assert_array_equal(dw_hh, dw_ih * outputs["y"][first])
    assert np.count_nonzero(dw_hh) == dw_hh.size


@pytest.mark.parametrize("name", [*CELLS, *NORMED])
def test_simd_level_computes_cells(name: str) -> None:
    """Each as the oracle does, with the same bits whoever shares the work."""
    for case in cell_cases((CELLS | NORMED)[name]):
        for dtype in ("float32", "float64", *(["float16"] if name in SMOOTH else [])):
            inputs = make_inputs(case, dtype, seed=2)
            alone = run_layer(C, inputs, 1)
            assert_all_close(alone, run_oracle(inputs), case, dtype, gradient_magnitude=3.0)
            for ours, same in zip(run_layer(C, inputs, 3), alone, strict=True):
                assert_identical(ours, same)


@pytest.mark.parametrize("way", [{"in_place": True}, {"in_place": False}, {"in_place": False, "depth": 32}], ids=str)
def test_simd_level_multiplies_by_a_kernel(way: dict[str, Any]) -> None:
    """One chain of additions, whether packed or where it lies."""
    for sizes in ((3, 13, 21, 67), (1, 5, 40, 64), (4, 1, 7, 3), (2, 8, 5, 200)):
        for dtype in ("float32", "float64", "float16"):
            case = Case(*sizes, cell=KERNEL)
            inputs = make_inputs(case, dtype)
            with use_plan(engine="vectors", **way):
                actual = run_layer(C, inputs, 1)
                one_by_one = [run_layer(C, inputs, threads) for threads in (2, 3)]
            assert_all_close(actual, run_oracle(inputs), case, dtype, gradient_magnitude=3.0)
            for other in one_by_one:
                for ours, same in zip(other, actual, strict=True):
                    assert_identical(ours, same)
            with use_plan(engine="vectors", chunk_steps=1, **way):
                assert_identical(run_layer(C, inputs, 1)[0], actual[0])


@pytest.mark.skipif(FORCED_LEVEL is not None, reason="this is the run of one level")
@pytest.mark.parametrize("level", C.build_info()["simd_available"] if C else [])
def test_every_simd_level(level: str) -> None:
    """Here and in test_cpu_plan.py; of the level that this process is on anyway, no more than that it can be forced."""
    name = "forced_simd_level" if level == C.build_info()["simd"] else "simd_level"
    files = [__file__, str(Path(__file__).with_name("test_cpu_plan.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", name, *files]
    environment = os.environ | {"LSTM_EXT_SIMD": level}
    done = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    expected = 1
    if name == "simd_level":
        expected += 3 * len(COMPACT_CASES) + 8 + len(CELLS) + len(NORMED) + 3 + 2 + 2 * len(ALONE) + len(PLAN_CASES)
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


# What is refused -----------------------------------------------------------------------------------------------------


def test_a_cell_without_a_kernel_is_not_taken() -> None:
    case = Case(2, 3, 4, 5, P=3, cell=Cell(zoneout_h=0.1, proj_clip=1.0))
    inputs = make_inputs(case, "float32")
    assert C.layer_forward(inputs.call, Save.ALL) is NotImplemented


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"seed": None}, TypeError, "seed: expected an array of one number"),
        ({"seed": np.zeros(2, np.int64)}, RuntimeError, r"seed: expected shape \[1\], got \[2\]"),
        ({"seed": np.zeros(1, np.int32)}, TypeError, "seed: expected dtype int64, got int32"),
        ({"cell": (0.0,) * 18}, TypeError, "cell: expected a tuple of 19 numbers"),
        ({"cell": DRAWN._replace(zoneout_c=1.5)}, ValueError, "cell: expected number 14 from 0"),
        ({"cell": DRAWN._replace(candidate_dropout=float("nan"))}, ValueError, "cell: expected number 16 from 0"),
        ({"cell": DRAWN._replace(cell_clip=-1.0)}, ValueError, "cell: expected number 8 from 0"),
        ({"cell": DRAWN._replace(activation=9)}, ValueError, "cell: expected number 0 from 0"),  # type: ignore[arg-type]
        ({"cell": DRAWN._replace(peephole=False)}, RuntimeError, "weights: expected 2 to 5 arrays for each direction"),
        ({"cell": DRAWN._replace(tensorflow=True)}, RuntimeError, "weights: expected 2 to 3 arrays"),
    ],
    ids=str,
)
def test_a_wrong_cell_is_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    call = make_inputs(Case(2, 3, 4, 5, P=3, cell=DRAWN), "float32").call._replace(**changed)
    with pytest.raises(error, match=message):
        C.layer_forward(tuple(call), Save.ALL)


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (9, 24), r"kernel: expected shape \[I \+ H, 4\*H\] = \[10, 24\], got \[9, 24\]"),
        (0, (10, 25), r"kernel: expected shape \[I \+ H, 4\*H\] = \[10, 24\], got \[10, 25\]"),
        (1, (23,), r"bias: expected shape \[4\*H\] = \[24\], got \[23\]"),
        (2, (2, 6), r"peephole: expected shape \[3, H\] = \[3, 6\], got \[2, 6\]"),
    ],
    ids=str,
)
def test_a_wrong_kernel_is_named(index: int, shape: tuple[int, ...], message: str) -> None:
    call = make_inputs(Case(2, 3, 4, 6, cell=KERNEL), "float32").call
    call.weights[index] = np.zeros(shape, np.float32)
    with pytest.raises(RuntimeError, match=message):
        C.layer_forward(call, Save.ALL)


def test_a_backward_pass_of_a_cell_reads_y() -> None:
    inputs = make_inputs(Case(2, 3, 4, 6, cell=KERNEL), "float32")
    cells, gates = C.layer_forward(inputs.call, Save.ALL)[3:]
    with pytest.raises(TypeError, match="y: expected what layer_forward returned, got None"):
        C.layer_backward(inputs.call, (cells, gates, None), inputs.grads, 15)
