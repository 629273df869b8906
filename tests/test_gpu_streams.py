"""The CUDA kernels in streams, graphs, threads and processes; plans and self-checks; many launches without a hang."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lstm_ext.call import BOTH, FORWARD, REVERSE, Directions
from lstm_ext.testing import Case, Inputs, assert_all_close, run_layer

torch = pytest.importorskip("torch")

import lstm_ext  # noqa: E402
from lstm_ext import self_check  # noqa: E402
from lstm_ext.engines import cuda  # noqa: E402

from .contract import MASKED, PROJECTED, WIDE  # noqa: E402
from .drop_in import B, H, I, T, assert_same, run, tensors  # noqa: E402
from .test_gpu_kernels import DTYPES, STRATEGIES, OnGpu, strategies  # noqa: E402
from .test_process import succeed  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("_no_hang", "_exact_products")]


# Streams, graphs, devices, processes ---------------------------------------------------------------------------------


@contextmanager
def no_waiting() -> Iterator[None]:
    """torch refuses whatever makes the host wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_all_same(actual: list[Any], expected: list[Any], dtype: str = "float32") -> None:
    assert_same([a.float() for a in actual], [e.float() for e in expected], dtype)


@strategies
def test_runs_on_the_current_stream_and_does_not_wait(strategy: str) -> None:
    """The input is ready only late; a kernel on another stream would read zeros."""
    case = Case(9, 4, 16, 32, lengths="ragged", resets=True)
    way, stream = OnGpu("float32", strategy), torch.cuda.Stream()
    inputs = way.own(way.draw(case))
    late = replace(inputs, x=torch.zeros_like(inputs.x))
    with way.engine(case):
        run_layer(cuda, inputs)  # plans, and loads the kernels
        stream.wait_stream(torch.cuda.current_stream())
        with no_waiting(), torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000_000)  # clocks
            late.x.copy_(inputs.x)
            actual = run_layer(cuda, late)
            assert not stream.query(), "the host waited for the device"
    stream.synchronize()
    assert_all_close(actual, way.oracle(case), case, "float32")


@strategies
def test_two_streams_at_once(strategy: str) -> None:
    """Launches that share the device at every moment, each on memory that others have just given back."""
    cases = [Case(40, 9, 20, 70, directions=BOTH), Case(30, 5, 8, 90, P=20)]
    way, streams = OnGpu("float32", strategy), [torch.cuda.Stream() for _ in cases]
    inputs = [way.own(way.draw(case)) for case in cases]
    torch.cuda.synchronize()
    results: list[list[Any]] = [[], []]
    for _ in range(20):
        for n, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[n].append(way.run(inputs[n]))
    torch.cuda.synchronize()
    for case, runs in zip(cases, results, strict=True):
        assert_all_close(runs[0], way.oracle(case), case, "float32")
        for each in runs[1:]:
            assert_all_close(each, runs[0], case, "float32")


@strategies
@pytest.mark.parametrize("margin", [0, 4])
def test_streams_of_two_priorities_beside_a_busy_kernel(strategy: str, margin: int) -> None:
    """Launches that want all multiprocessors at once, of which a third kernel has some until it ends: no hang."""
    case, streams = Case(40, 64, 20, 200, directions=BOTH), [torch.cuda.Stream(priority=p) for p in (0, -1)]
    way, busy = OnGpu("bfloat16", strategy), torch.cuda.Stream()
    inputs = way.own(way.draw(case))
    noise = torch.randn(2048, 2048).cuda()
    results = []
    with lstm_ext.set_sm_margin(margin):
        first = way.run(inputs)  # plans, and checks the kernels
        torch.cuda.synchronize()
        for _ in range(20):
            with torch.cuda.stream(busy):
                torch.cuda._sleep(1_000_000)  # clocks, on one multiprocessor; a product takes all of them
                noise @ noise
            for stream in streams:
                with torch.cuda.stream(stream):
                    results.append(way.run(inputs))
        torch.cuda.synchronize()
    for each in results:
        assert_all_close(each, first, case, "bfloat16")


@pytest.mark.parametrize("margin", [0, 8])
def test_a_margin_leaves_multiprocessors_free(margin: int) -> None:
    total = torch.cuda.get_device_properties(0).multi_processor_count
    with lstm_ext.set_sm_margin(margin):
        for strategy in ("block", "cluster", "grid"):
            if strategy == "cluster" and torch.cuda.get_device_capability() < (9, 0):
                continue
            plan = lstm_ext.plan(50, 4096, 64, dtype="bfloat16", strategy=strategy)
            assert plan.sm_margin == margin
            assert margin == 0 or plan.blocks <= total - margin


SELF_CHECKED = """
import os, sys, torch, lstm_ext
from pathlib import Path
weights = [torch.randn(480, n).cuda() / 11 for n in (20, 120)]
lstm_ext.lstm(torch.randn(50, 6, 20).cuda(), None, *weights)
print(*(path.name for path in Path(os.environ["LSTM_EXT_CACHE"]).glob("checks-*")))
"""


def test_a_kernel_is_checked_before_its_first_launch(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSTM_EXT_CACHE", str(tmp_path))
    output = succeed(SELF_CHECKED)
    assert output.startswith("checks-"), output


@pytest.mark.parametrize("backward", [False, True])
def test_every_kernel_passes_its_self_check(backward: bool) -> None:
    ways = [way for way, _ in self_check.ways(0) if way.backward == backward]
    findings = {str(way): self_check.run(way, 0) for way in ways}
    assert findings
    assert {way: finding for way, finding in findings.items() if finding.wrong} == {}


def test_tune_measures_what_plans_then_go_by(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table = lstm_ext.tune([(20, 4, 64)], ["bfloat16"], path=tmp_path / "times.json")
    assert [row.backward for row in table] == [False, True]
    for row in table:
        best = min(row.microseconds, key=lambda strategy: row.microseconds[strategy])
        plan = lstm_ext.plan(20, 4, 64, dtype="bfloat16", backward=row.backward)
        assert plan.source == f"measured at T20 B4 H64 on {row.date}"
        assert (plan.strategy, plan.microseconds_per_step) == (best, row.microseconds[best])


TUNED = """
import lstm_ext
(row,) = lstm_ext.tune([(50, 4, 64)], ["bfloat16"], backward=False)
print(min(row.microseconds.values()))
"""


def test_tune_runs_what_it_times(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process that has no module of ours yet, and so may not know tensors: no step takes less than 0.1 µs."""
    monkeypatch.setenv("LSTM_EXT_CACHE", str(tmp_path))
    assert float(succeed(TUNED)) > 0.1


def overwrite(inputs: Inputs, others: Inputs) -> None:
    """Puts the values of `others` where those of `inputs` are."""
    names = ("x", "h0", "c0", "lengths", "resets", "dy", "dh_n", "dc_n", "dcells")
    pairs = [(getattr(inputs, name), getattr(others, name)) for name in names]
    for mine, theirs in (*pairs, *zip(inputs.weights, others.weights, strict=True)):
        if mine is not None:
            mine.copy_(theirs)


@strategies
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [MASKED, PROJECTED, WIDE], ids=str)
def test_a_graph_replays_with_new_inputs(case: Case, dtype: str, strategy: str) -> None:
    way, graph = OnGpu(dtype, strategy), torch.cuda.CUDAGraph()
    inputs = way.own(way.draw(case))
    with way.engine(case):
        run_layer(cuda, inputs)
        with torch.cuda.graph(graph):
            actual = run_layer(cuda, inputs)
    for seed in (1, 2, 1):
        overwrite(inputs, way.own(way.draw(case, seed)))
        graph.replay()
        assert_all_close(actual, way.oracle(case, seed), case, way.judged)


def test_a_training_step_and_a_loop_of_cells_are_captured() -> None:
    module, cell = lstm_ext.LSTM(8, 24, 2, bidirectional=True).cuda(), lstm_ext.LSTMCell(8, 24).cuda()
    x, parameters = torch.randn(6, 5, 8).cuda(), list(module.parameters())

    def step() -> list[Any]:
        y, (h, c) = module(x)
        state = None
        with torch.no_grad():
            for row in x:
                state = cell(row, state)
        return [y, h, c, *torch.autograd.grad(y.sum() + h.pow(2).sum() + c.sum(), parameters), *tensors(state)]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = step()
    for _ in range(2):
        x.copy_(torch.randn(6, 5, 8))
        graph.replay()
        assert_all_same(actual, step())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensors_counts() -> None:
    module, x = lstm_ext.LSTM(I, H), torch.randn(T, B, I)
    expected = run(module, x)
    for device in range(torch.cuda.device_count()):
        actual = run(copy.deepcopy(module).to(device), x.to(device))
        assert torch.cuda.current_device() == 0
        assert {a.device.index for a in actual} == {device}
        assert_same([a.cpu() for a in actual], expected)


def test_other_threads() -> None:
    """Of each width a thread, as each takes another amount of shared memory; a length that is new is planned anew."""
    modules = [lstm_ext.LSTM(I, width).cuda() for width in (8, 40, 120, 250)]
    inputs = [torch.randn(steps, B, I).cuda() for steps in range(1, 11)]
    torch.cuda.synchronize()

    def work(module: Any) -> list[list[Any]]:
        with torch.cuda.stream(torch.cuda.Stream()):
            return [[a.detach() for a in run(module, x)] for x in inputs]

    with ThreadPoolExecutor(len(modules)) as executor:
        together = list(executor.map(work, modules))
    torch.cuda.synchronize()
    for module, results in zip(modules, together, strict=True):
        for x, result in zip(inputs, results, strict=True):
            assert_same(result, [a.detach() for a in run(module, x)])


NEIGHBOUR = """
import torch, lstm_ext
from lstm_ext.engines import cuda
torch.manual_seed(0)
weights = [torch.randn(480, n).cuda() / 11 for n in (20, 120)]
x = torch.randn(50, 6, 20).cuda()
for strategy in ("block", "cluster", "grid", "step"):
    try:
        lstm_ext.plan(50, 6, 120, strategy=strategy)
    except RuntimeError:
        continue
    with cuda.use_strategy(strategy):
        first, _ = lstm_ext.lstm(x, None, *weights)
        for turn in range(100):
            assert torch.equal(lstm_ext.lstm(x, None, *weights)[0], first), (strategy, turn)
    print("ran", strategy)
"""


def test_several_processes_on_one_gpu() -> None:
    with ThreadPoolExecutor(3) as executor:
        outputs = list(executor.map(succeed, [NEIGHBOUR] * 3))
    assert all("ran grid" in output and "ran step" in output for output in outputs), outputs


# After a forbidden call a capture is invalid, and so is each launch into it.
FAILED_LAUNCH = """
import os, torch
from lstm_ext import torch_op
from lstm_ext.call import FORWARD, LayerCall, Save
from lstm_ext.engines import cuda
x, h, c, *weights = (torch.zeros(*shape).cuda() for shape in ((2, 3), (2, 5), (2, 5), (20, 3), (20, 5)))
call = LayerCall(x, h, c, weights, None, None, None, FORWARD, False)
cuda.forward(call, Save.NOTHING)
torch.cuda.synchronize()
with torch.cuda.stream(torch.cuda.Stream()):
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    for run in (torch.cuda.synchronize, lambda: cuda.forward(call, Save.NOTHING)):
        try:
            run()
            print("no error", flush=True)
        except RuntimeError as error:
            print(error, flush=True)
os._exit(0)
"""


def test_a_launch_that_fails_names_its_kernel() -> None:
    output = succeed(FAILED_LAUNCH)
    assert "lstm_ext: step_forward<" in output, output
    assert "no error" not in output


# Endurance -----------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow() -> None:
    module, x = lstm_ext.LSTM(20, 50, 2, bidirectional=True).cuda(), torch.randn(30, 8, 20).cuda()
    lengths = torch.randint(0, 31, (8,)).cuda()

    def steps(count: int) -> tuple[int, int]:
        for _ in range(count):
            y, _ = module(x, lengths=lengths)
            torch.autograd.grad(y.sum(), list(module.parameters()))
        del y
        gc.collect()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    assert steps(3) == steps(100)


def draw_case(rng: np.random.Generator) -> Case:
    """Of any kind, small enough for thousands."""
    steps, rows, width, units = (int(rng.integers(1, most + 1)) for most in (12, 40, 40, 200))
    kind = rng.choice(["plain", "masked", "packed"])
    return Case(
        *(steps, rows, width, units),
        P=int(rng.integers(1, units)) if units > 1 and rng.random() < 0.25 else 0,
        directions=Directions(rng.choice([FORWARD, REVERSE, BOTH])),
        batch_first=bool(kind == "masked" and rng.random() < 0.5),
        lengths="with_zero" if kind == "masked" else None,
        resets=bool(kind == "masked"),
        packed=bool(kind == "packed"),
    )


def test_ten_thousand_random_launches() -> None:
    """Of any kind in any order, none waited for: no hang, and the bits of the first time."""
    rng = np.random.default_rng(0)
    known: list[tuple[Any, ...]] = []
    while len(known) < 120:
        case, way = draw_case(rng), OnGpu(str(rng.choice(DTYPES)), str(rng.choice(STRATEGIES)))
        inputs = way.own(way.draw(case))
        try:
            first = way.run(inputs)
        except pytest.skip.Exception:  # refused: another is drawn
            continue
        assert_all_close(first, way.oracle(case), case, way.judged, gradient_magnitude=3.0)
        known.append((way, inputs, first))
    same = torch.ones((), dtype=torch.bool).cuda()
    for turn in range(5_000):  # a forward and a backward pass each
        way, inputs, first = known[rng.integers(len(known))]
        outputs, gradients = way.run(inputs)
        for actual, expected in ((outputs["y"], first[0]["y"]), (gradients["dweights[1]"], first[1]["dweights[1]"])):
            same &= (actual == expected).all()
        if turn % 500 == 499:
            assert same.item(), f"other bits by turn {turn}"
