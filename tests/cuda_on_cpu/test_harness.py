"""The harness itself: it catches the faults of broken kernels, and lays fragments out as the PTX manual does."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

harness = pytest.importorskip(
    "lstm_ext_cuda_on_cpu",
    reason="the harness is not built: see tests/cuda_on_cpu/README.md",
    exc_type=ModuleNotFoundError,
)

SEEDS = range(12)
OVERRUNS = ["shared_overrun", "global_overrun"]
# What the harness says of a fault; "wrong result" where the schedule or the memory makes it show in the numbers.
FAULTS = {
    "barrier_after_exit": "deadlock",
    "copy_without_wait": "wrong result",
    "divergent_barrier": "divergent barrier",
    "flag_acquire": "wrong result",
    "flag_fence": "wrong result",
    "flag_release": "wrong result",
    "grid_barrier": "deadlock",
    "launch_without_wait": "wrong result",
    "mbarrier_count": "deadlock",
    "mbarrier_of_nobody": "no mbarrier was initialised",
    "neighbour_across_barrier": "wrong result",
    "neighbour_in_warp": "wrong result",
    "overwrite_across_barrier": "wrong result",
    "push_of_more_than_expected": "wrong result",
    "push_to_ended_block": "of a block that has ended",
    "push_with_wrong_parity": "wrong result",
    "shuffle_from_outside_the_mask": "not in its mask",
    "shuffle_mask": "the mask leaves out the lane that calls it",
    "uninitialised_shared": "wrong result",
}


def outcome(name: str, broken: bool, seed: int) -> str:
    """What the harness says; errors without the seed and the name that they begin with."""
    try:
        return "right" if harness.run_broken_kernel(name, broken, seed) else "wrong result"
    except RuntimeError as error:
        return str(error).removeprefix(f"seed {seed}, kernel {name}: ")


def test_every_broken_kernel_is_tested() -> None:
    assert sorted([*FAULTS, *OVERRUNS]) == harness.broken_kernels()


@pytest.mark.parametrize("name", [*FAULTS, *OVERRUNS])
def test_sound_kernels_pass(name: str) -> None:
    assert {outcome(name, False, seed) for seed in SEEDS} == {"right"}


@pytest.mark.parametrize("name", FAULTS)
def test_broken_kernels_are_caught(name: str) -> None:
    outcomes = [outcome(name, True, seed) for seed in SEEDS]
    assert any(FAULTS[name] in outcome for outcome in outcomes), outcomes


@pytest.mark.skipif(not harness.address_sanitizer, reason="the harness is built without AddressSanitizer")
@pytest.mark.parametrize("name", OVERRUNS)
def test_overruns_are_caught(name: str) -> None:
    code = f"import lstm_ext_cuda_on_cpu as harness; harness.run_broken_kernel({name!r}, True, 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert name in done.stderr  # the kernel's function, in the stack of the access


def test_a_deadlock_names_who_waits_for_what() -> None:
    report = outcome("barrier_after_exit", True, 0)
    assert report.startswith("deadlock\n  block (0,0,0): ")
    assert "threads 0-6, 8-39 wait for __syncthreads, at broken_kernels.cpp:" in report
    assert "threads 7 wait for named barrier 1, at broken_kernels.cpp:" in report


def test_a_seed_decides_the_schedule() -> None:
    for seed in SEEDS:
        assert outcome("grid_barrier", True, seed) == outcome("grid_barrier", True, seed)
    assert len({outcome("push_to_ended_block", True, seed) for seed in SEEDS}) > 1


def test_streams_keep_their_order_and_only_that() -> None:
    orders = {harness.stream_order(seed) for seed in range(50)}
    assert all([c for c in order if c in "abc"] == list("abc") for order in orders)
    assert all([c for c in order if c in "xyz"] == list("xyz") for order in orders)
    assert len(orders) > 10


# Fragment layouts: as the PTX manual writes them down for each register of a lane ---------------------------------

KINDS = {"float16": (16, np.float16), "bfloat16": (16, None), "tf32": (8, np.float32)}


def bits_of(numbers: np.ndarray, kind: str) -> np.ndarray:
    """The numbers' bits, [.., 1] words of 32 bits for TF32, halves of words otherwise."""
    if kind == "float16":
        return numbers.astype(np.float16).view(np.uint16)
    words = numbers.astype(np.float32).view(np.uint32)
    return words if kind == "tf32" else (words >> 16).astype(np.uint16)


def fragment(matrix: np.ndarray, places: list[list[tuple[int, int]]], kind: str) -> np.ndarray:
    """For each lane the words that hold the matrix's elements at its places."""
    elements = np.array([[matrix[place] for place in of_lane] for of_lane in places])
    return np.ascontiguousarray(bits_of(elements, kind)).view(np.uint32)


def a_place(lane: int, i: int, kind: str) -> tuple[int, int]:
    group, member = lane >> 2, lane % 4
    if kind == "tf32":
        return (group if i in (0, 2) else group + 8), (member if i in (0, 1) else member + 4)
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    return row, member * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_place(lane: int, i: int, kind: str) -> tuple[int, int]:
    group, member = lane >> 2, lane % 4
    if kind == "tf32":
        return (member if i == 0 else member + 4), group
    return member * 2 + (i & 1) + (8 if i >= 2 else 0), group


def d_place(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2) + (8 if i >= 2 else 0), (lane % 4) * 2 + (i & 1)


@pytest.mark.parametrize("kind", KINDS)
def test_mma_multiplies_matrices_in_their_fragments(kind: str) -> None:
    depth, words_each = KINDS[kind][0], 1 if kind == "tf32" else 2
    rng = np.random.default_rng(0)
    a, b, d = (rng.integers(-8, 9, shape).astype(float) for shape in [(16, depth), (depth, 8), (16, 8)])  # exact
    a_words = fragment(a, [[a_place(lane, i, kind) for i in range(4 * words_each)] for lane in range(32)], kind)
    b_words = fragment(b, [[b_place(lane, i, kind) for i in range(2 * words_each)] for lane in range(32)], kind)
    d_before = np.array([[d[d_place(lane, i)] for i in range(4)] for lane in range(32)], np.float32)
    assert (a_words.shape, b_words.shape) == ((32, 4), (32, 2))
    expected = a @ b + d
    d_after = harness.mma(kind, a_words, b_words, d_before)
    for lane in range(32):
        for i in range(4):
            assert d_after[lane, i] == expected[d_place(lane, i)], (lane, i)


def test_tf32_reads_no_more_than_its_bits() -> None:
    a, b, d = np.zeros((32, 4), np.uint32), np.zeros((32, 2), np.uint32), np.zeros((32, 4), np.float32)
    a[:] = np.float32(1 + 2**-11).view(np.uint32)  # one bit too many
    b[:] = np.float32(1).view(np.uint32)
    np.testing.assert_array_equal(harness.mma("tf32", a, b, d), np.full((32, 4), 8, np.float32))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_hands_out_rows_or_columns(count: int, transposed: bool) -> None:
    rows = np.arange(64 * count, dtype=np.uint16).reshape(8 * count, 8)
    fragments = harness.ldmatrix(rows, transposed)
    for lane in range(32):
        for matrix in range(count):
            of = rows[8 * matrix : 8 * matrix + 8]
            of = of.T if transposed else of
            low, high = of[lane // 4, 2 * (lane % 4)], of[lane // 4, 2 * (lane % 4) + 1]
            assert fragments[lane, matrix] == int(low) | int(high) << 16
