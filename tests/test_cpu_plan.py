"""The CPU's plans: what they may be, that the kernels follow them, and that each way is right wherever it leads."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import pytest

from lstm_ext import LSTM, _native, reference  # noqa: F401 (LSTM makes the native module take tensors)
from lstm_ext.call import BOTH, REVERSE, Save
from lstm_ext.engines.cpu import use_plan
from lstm_ext.testing import CASES, Case, Inputs, assert_all_close, assert_identical, make_inputs, run_layer

# Tests with simd_level in their names are run by test_every_simd_level of test_kernels.py on each level.
C: Any = _native.C
pytestmark = pytest.mark.skipif(C is None, reason=f"no compiled kernels: {_native.reason}")

PLAN_CASES = [
    # Those that CASES lacks for every way of the CPU's plans to be taken, on each SIMD level.
    Case(2, 1, 9, 67, P=31, directions=BOTH),  # a projection in place
    Case(5, 14, 390, 120, P=390),  # packed weights of many columns
    Case(1, 7, 520, 200, P=520),  # several blocks of weights in place
    Case(30, 12, 5, 130, lengths="ragged", resets=True),  # several chunks backward
    Case(2, 257, 3, 130),  # of one step each
    Case(5, 37, 60, 164, lengths="with_zero", resets=True, directions=BOTH),  # tiles, the last ones not full
    Case(4, 21, 64, 190, P=128, packed=True, directions=BOTH),
    Case(21, 1, 4, 24),  # alone
]
ALL_CASES = [*CASES, *PLAN_CASES]
DTYPES = ("float32", "float64", "float16", "bfloat16")
LEVEL: str = C.build_info()["simd"] if C else ""
TILES = LEVEL == "amx"

Way = dict[str, Any]
VECTOR_WAYS: list[Way] = [
    {"in_place": False},
    {"in_place": False, "depth": 32},
    {"in_place": True, "one_sum": False},
    {"in_place": True, "one_sum": False, "depth": 32},
    {"in_place": True, "one_sum": True},
    {"in_place": (True, False, True)},
    {"in_place": (False, True, False)},
]
WAYS: list[Way] = [
    {},  # as planned
    *({"engine": "vectors"} | way for way in VECTOR_WAYS),
    *([{"engine": "tiles"}, {"engine": "tiles", "depth": 64}] if TILES else []),
]
CHUNKS = (1, 2, 10**9)  # the last is cut off: all steps
TEAMS: list[Way] = [{"threads": threads, "by_rows": by_rows} for threads, by_rows in product((2, 3), (True, False))]


def plan_of(case: Case, dtype: str, *, backward: bool = False, threads: int = 1) -> dict[str, Any]:
    sizes = (case.T, case.B, case.I, case.H, case.P, bool(case.P))
    plan: dict[str, Any] = C.cpu_plan(*sizes, dtype, case.num_directions, backward, threads)
    return plan


@lru_cache(maxsize=4)
def problem(case: Case, dtype: str) -> tuple[Inputs, tuple[dict[str, Any], dict[str, Any]]]:
    """Inputs as the kernels take them, and what float64 makes of them."""
    inputs = make_inputs(case, dtype)
    expected = run_layer(reference, inputs.map(lambda a: a.astype(np.float64)))
    return (inputs.to_torch(dtype) if dtype == "bfloat16" else inputs), expected


def assert_right(actual: Any, expected: Any, case: Case, dtype: str = "float32") -> None:
    """As tolerances.py says, a gradient at H = 1 may be what terms of three times its size left of each other."""
    assert_all_close(actual, expected, case, dtype, gradient_magnitude=3.0 if case.H == 1 else 1.0)


def run(inputs: Inputs, **way: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    with use_plan(**way):
        return run_layer(C, inputs, 1)


def assert_same(actual: tuple[dict[str, Any], ...], expected: tuple[dict[str, Any], ...]) -> None:
    for ours, same in zip(actual, expected, strict=True):
        assert_identical(ours, same)


def described(way: Way) -> str:
    return "-".join(f"{name}={value}" for name, value in way.items()) or "planned"


def can(way: Way, dtype: str) -> bool:
    return way.get("engine") != "tiles" or dtype != "float64"


# Every case by every way ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS, ids=described)
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_every_way_matches_the_oracle_and_no_team_changes_a_bit(case: Case, way: Way) -> None:
    inputs, expected = problem(case, "float32")
    for steps in CHUNKS if case.T > 1 else CHUNKS[:1]:
        alone = run(inputs, **way, chunk_steps=steps)
        assert_right(alone, expected, case)
        for team in TEAMS if steps == CHUNKS[-1] else TEAMS[steps % 2 :: 2]:
            assert_same(run(inputs, **way, chunk_steps=steps, **team), alone)


ALONE = [
    Case(40, 1, 3, 24),
    Case(60, 1, 20, 33),
    Case(35, 1, 1, 5, directions=REVERSE),
    Case(50, 1, 9, 40, directions=BOTH, batch_first=True),
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", ALONE, ids=str)
def test_simd_level_one_sequence_of_a_narrow_layer(case: Case, dtype: str) -> None:
    """In chunks too, on more threads, and whatever is saved."""
    assert plan_of(case, dtype)["alone"]
    inputs, expected = problem(case, dtype)
    all_at_once = run(inputs)
    assert_right(all_at_once, expected, case, dtype)
    for way in ({"chunk_steps": 7}, {"threads": 2}, {"threads": 3, "by_rows": False, "chunk_steps": 1}):
        assert_identical(run(inputs, **way)[0], all_at_once[0])
    nothing = C.layer_forward(inputs.call, Save.NOTHING)
    assert_identical(
        {name: nothing[n] for n, name in enumerate(("y", "h_n", "c_n"))},
        {name: all_at_once[0][name] for name in ("y", "h_n", "c_n")},
    )


CROWDS = [
    Case(6, 70, 12, 140, lengths="ragged", resets=True),
    Case(4, 3, 20, 530, P=260, directions=BOTH),
]


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("case", CROWDS, ids=str)
def test_many_more_threads_than_cores_change_no_bit(case: Case, by_rows: bool) -> None:
    inputs, expected = problem(case, "float32")
    alone = run(inputs)
    assert_right(alone, expected, case)
    for threads in (8, 32):
        assert_same(run(inputs, threads=threads, by_rows=by_rows), alone)


SOME_CASES = [case for case in ALL_CASES if case.T * case.B <= 64 and (case.P or case.lengths or case.H > 60)]


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("case", SOME_CASES, ids=str)
def test_every_way_matches_the_oracle_in_other_dtypes(case: Case, dtype: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("torch")
    inputs, expected = problem(case, dtype)
    for way in WAYS:
        if can(way, dtype):
            assert_right(run(inputs, **way), expected, case, dtype)
            assert_right(run(inputs, **way, chunk_steps=1, threads=2), expected, case, dtype)


@pytest.mark.parametrize("way", [way for way in WAYS if "one_sum" not in way or not way["one_sum"]][1:], ids=described)
@pytest.mark.parametrize("case", [case for case in ALL_CASES if case.T > 2], ids=str)
def test_chunks_change_no_bit(case: Case, way: Way) -> None:
    """But of the weights' gradients, to which the last chunk is added first; and where a single step is one sum."""
    inputs, _ = problem(case, "float32")
    outputs, gradients = run(inputs, **way)
    for steps in CHUNKS:
        actual = run(inputs, **way, chunk_steps=steps)
        assert_identical(actual[0], outputs)
        assert_identical({name: actual[1][name] for name in ("dx", "dh0", "dc0")}, gradients)


# Ways are taken, and are what the defaults of the cases come to ------------------------------------------------------


def test_the_kernels_do_what_is_forced() -> None:
    """Each way rounds in an order of its own, so that another one gives other bits."""
    case = Case(2, 3, 200, 190)
    inputs, _ = problem(case, "float32")
    ways = [way for way in WAYS[1:] if way.get("depth", 32) == 32]
    outputs = [run(inputs, **way, chunk_steps=1)[0]["y"].tobytes() for way in ways]
    packed = [n for n, way in enumerate(ways) if way.get("in_place") is False]  # blocks are the same chain of additions
    assert len({outputs[n] for n in packed}) == 1
    assert len(set(outputs)) == len(ways) - len(packed) + 1


@pytest.mark.parametrize("backward", [False, True])
def test_a_forced_plan_is_the_plan(backward: bool) -> None:
    case = Case(9, 12, 200, 190, P=100)
    way: Way = {"engine": "vectors", "in_place": (True, False, True), "chunk_steps": 4, "depth": 64, "threads": 3}
    with use_plan(**way, by_rows=True, one_sum=False):
        plan = plan_of(case, "float32", backward=backward)
    expected = way | {"by_rows": True, "one_sum": False, "depth": (64, 64)}
    if backward:
        expected["in_place"] = (False, False, False)
    assert {name: plan[name] for name in expected} == expected
    assert plan["why"] == {"engine": "forced", "chunk_steps": "forced", "threads": "forced"}
    assert plan_of(case, "float32", backward=backward)["why"]["threads"] != "forced"


def ways_taken(case: Case, dtype: str, threads: int, backward: bool) -> set[str]:
    plan = plan_of(case, dtype, backward=backward, threads=threads)
    taken = {plan["engine"], "team by rows" if plan["by_rows"] else "team by panels"}
    if plan["threads"] == 1:
        taken = {plan["engine"], "one thread"}
    if case.T > 1:
        steps = plan["chunk_steps"]
        taken.add("chunks of one step" if steps == 1 else "one chunk" if steps == case.T else "chunks")
    if backward:
        return {f"backward, {way}" for way in taken}
    taken.add("x borrowed" if plan["borrow_x"] else "x copied")
    if plan["alone"]:
        taken.add("alone")
    for name, in_place in zip(("w_ih", "w_hh", "w_hr")[: 3 if case.P else 2], plan["in_place"], strict=False):
        taken.add(f"{name} in place" if in_place else f"{name} packed")
    for name, depth, K, in_place in zip(
        ("w_ih", "w_hh"), plan["depth"], (case.I, case.width), plan["in_place"], strict=False
    ):
        if depth < K:
            assert in_place
            taken.add(f"blocks of {name} in place")
    if all(plan["in_place"][:2]) and plan["chunk_steps"] == 1:
        taken.add("one sum" if plan["one_sum"] else "two sums")
    return {f"forward, {way}" for way in taken}


BOTH_PASSES = ("vectors", "one thread", "team by rows", "team by panels", "one chunk", "chunks", "chunks of one step")
FORWARD_ONLY = (
    *("x borrowed", "x copied", "one sum", "two sums", "alone"),
    *(f"{name} {how}" for name in ("w_ih", "w_hh", "w_hr") for how in ("in place", "packed")),
    *(f"blocks of {name} in place" for name in ("w_ih", "w_hh")),
)


def test_simd_level_default_plans_of_the_cases_cover_all_ways() -> None:
    every = {f"{which}, {way}" for way in BOTH_PASSES for which in ("forward", "backward")}
    every |= {f"forward, {way}" for way in FORWARD_ONLY}
    if TILES:
        every |= {"forward, tiles", "backward, tiles"}
    taken: set[str] = set()
    for case, dtype, threads, backward in product(ALL_CASES, DTYPES, (1, 2, 3), (False, True)):
        if case.B > 0:
            taken |= ways_taken(case, dtype, threads, backward)
    assert taken == every


def test_simd_level_threads_beyond_the_work_are_left_alone() -> None:
    narrow = plan_of(Case(50, 1, 8, 120), "float64", threads=64)
    panels = -(-120 // {"baseline": 2, "avx2": 4}.get(LEVEL, 8))
    assert 1 < narrow["threads"] <= panels
    assert not narrow["by_rows"]
    assert -(-panels // (narrow["threads"] - 1)) > -(-panels // narrow["threads"])  # one fewer would have more to do
    for backward in (False, True):  # too few rows for all; and backward, the panels are two or three
        rows = plan_of(Case(50, 65, 64, 130), "float64", backward=backward, threads=64)
        assert rows["by_rows"]
        assert 16 <= rows["threads"] < 64
        assert rows["why"]["threads"] == "as many as have rows of their own, and do not wait"


@pytest.mark.parametrize("case", PLAN_CASES, ids=str)
def test_simd_level_ways_match_the_oracle(case: Case) -> None:
    inputs, expected = problem(case, "float32")
    for way in WAYS:
        assert_right(run(inputs, **way), expected, case)


# What cannot be -------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[Way, str]] = [
    ({"engine": "scalars"}, "engine: expected vectors or tiles, got 'scalars'"),
    ({"in_place": (True, False)}, "in_place: expected one bool, or those of w_ih, w_hh and w_hr"),
    ({"in_place": False, "one_sum": True}, "one_sum: w_ih and w_hh must both be in place"),
    ({"in_place": (True, False, None), "one_sum": True}, "one_sum: w_ih and w_hh must both be in place"),
    ({"chunk_steps": 0}, "chunk_steps: expected at least 1"),
    ({"depth": -32}, "depth: expected at least 1"),
    ({"threads": 0}, "threads: expected 1 to 1024"),
    ({"engine": "tiles", "in_place": True}, "in_place: tiles" if TILES else "has no tile registers"),
    ({"engine": "tiles", "one_sum": True}, "one_sum: w_ih" if TILES else "has no tile registers"),
]


@pytest.mark.parametrize(("way", "message"), REFUSED, ids=lambda value: described(value) if value is dict else None)
def test_what_no_layer_could_do_is_refused_at_once(way: Way, message: str) -> None:
    before = plan_of(CASES[0], "float32")
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        C.force_cpu_plan(**way)
    assert plan_of(CASES[0], "float32") == before


@pytest.mark.parametrize("way", [{"one_sum": 1}, {"in_place": "yes"}, {"depth": 1.5}, {"threads": "2"}], ids=described)
def test_what_is_forced_is_of_the_type_that_is_asked_for(way: Way) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(way))}: expected"):
        C.force_cpu_plan(**way)


def test_what_a_layer_cannot_do_is_refused_when_it_is_planned() -> None:
    case = Case(20, 30, 64, 64)
    inputs, expected = problem(case, "float32")
    with use_plan(one_sum=True), pytest.raises(ValueError, match="one_sum: w_ih and w_hh must both be in place"):
        run_layer(C, inputs, 1)
    if TILES:
        with use_plan(engine="tiles"), pytest.raises(ValueError, match="engine: tiles have no float64 sums"):
            run_layer(C, make_inputs(case, "float64"), 1)
        with use_plan(engine="tiles", depth=48), pytest.raises(ValueError, match="depth: expected a multiple of 32"):
            run_layer(C, inputs, 1)
        with use_plan(in_place=True), pytest.raises(ValueError, match="in_place: tiles multiply packed weights only"):
            run_layer(C, inputs, 1)
    assert_right(run_layer(C, inputs, 1), expected, case)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"T": 0}, "T: expected at least 1, got 0"),
        ({"B": -1}, "B: expected at least 0, got -1"),
        ({"H": 0}, "H: expected at least 1, got 0"),
        ({"P": 0, "projected": True}, "P: expected at least 1, got 0"),
        ({"dtype": "int8"}, "dtype: expected float32"),
        ({"num_directions": 3}, "num_directions: expected 1 or 2"),
        ({"num_threads": -1}, "num_threads: expected at least 0, got -1"),
    ],
)
def test_a_plan_is_of_sizes_that_a_layer_may_have(changed: dict[str, Any], message: str) -> None:
    sizes: dict[str, Any] = {"T": 1, "B": 1, "I": 8, "H": 8, "P": 8, "projected": False}
    options = {"dtype": "float32", "num_directions": 1, "backward": False, "num_threads": 1}
    with pytest.raises(ValueError, match=message):
        C.cpu_plan(**(sizes | options | changed))
