"""The CUDA kernels on a GPU: against the float64 oracle, in torch's streams, graphs and modes, and without a hang."""

from __future__ import annotations

import copy
import faulthandler
import gc
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from lstm_ext.call import BOTH, FORWARD, REVERSE, Directions, LayerCall, Save
from lstm_ext.testing import (
    Case,
    Inputs,
    assert_all_close,
    assert_close,
    run_layer,
)

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.autograd import gradcheck, gradgradcheck  # noqa: E402
from torch.nn.utils.rnn import pack_sequence  # noqa: E402

import lstm_ext  # noqa: E402
from lstm_ext import route, self_check  # noqa: E402
from lstm_ext.engines import cuda  # noqa: E402

from .contract import MASKED, OUTPUTS, PACKED, PROJECTED, SEVERAL_ROWS, WIDE, Contract, Way, over  # noqa: E402
from .test_autograd import LAYERS, make_layer  # noqa: E402
from .test_kernels import (  # noqa: E402
    CELL_KERNEL,
    CELL_MASKED,
    CELL_SHAPES,
    CELLS,
    DRAWN,
    KERNEL,
    NORMED,
    SMOOTH,
    cell_cases,
)
from .test_modules import OPTIONS, B, H, I, T, assert_same, make_state, pair, run, tensors  # noqa: E402
from .test_process import succeed  # noqa: E402

pytestmark = pytest.mark.gpu

STRATEGIES = ["chosen", "block", "cluster", "grid", "step"]
DTYPES = ["tf32", "float32", "float64", "bfloat16", "float16"]
LIMIT = 120  # s: a test that takes longer hangs

# Why the planner says that no kernel of a strategy fits on this GPU.
NOT_HERE = (
    r"'\w+' cannot run this: (no clusters before|too few multiprocessors|no cooperative launch|no chip holds|"
    r"needs at least \d+ bytes|the device cannot run a team|no room for a team)"
)

strategies = pytest.mark.parametrize("strategy", STRATEGIES)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(scope="session")
def terminal(pytestconfig: pytest.Config) -> int:
    """Where standard error went before pytest took it."""
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        return os.dup(2)


@pytest.fixture(autouse=True)
def _no_hang(terminal: int) -> Iterator[None]:
    """A hang ends the run and says where: the process cannot go on with a GPU that never comes back."""
    faulthandler.dump_traceback_later(LIMIT, exit=True, file=terminal)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """torch multiplies float32 as float32, and sums half types in float32, as TOLERANCES have it."""
    matmul = torch.backends.cuda.matmul
    names = ("allow_tf32", "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    switches = [(torch.backends.cudnn, "allow_tf32"), *((matmul, name) for name in names)]
    before = [getattr(module, name) for module, name in switches]
    for module, name in switches:
        setattr(module, name, False)
    yield
    for (module, name), value in zip(switches, before, strict=True):
        setattr(module, name, value)


@dataclass(frozen=True)
class OnGpu(Way):
    """The engine on tensors of a GPU, by one strategy."""

    strategy: str = "chosen"

    def __str__(self) -> str:
        return f"{self.dtype}-{self.strategy}"

    @property
    def layouts(self) -> dict[str, Callable[[Any], Any]]:
        return {
            "every second": lambda a: a.repeat_interleave(2, dim=-1)[..., ::2],
            "transposed": lambda a: a.transpose(0, -1).contiguous().transpose(0, -1),
            "unaligned": lambda a: torch.cat([a.new_zeros(1), a.flatten()])[1:].view(a.shape),
        }

    @contextmanager
    def engine(self, case: Case, turn: int = 0) -> Iterator[Any]:
        """Skips a test where the hardware cannot run the case by this strategy. What a self-check refuses fails."""
        torch.backends.cudnn.allow_tf32 = self.dtype == "tf32"
        with cuda.use_strategy("" if self.strategy == "chosen" else self.strategy):
            try:
                yield cuda
            except RuntimeError as error:
                if not re.search(NOT_HERE, str(error)):
                    raise
                pytest.skip(str(error))

    def own(self, inputs: Inputs) -> Inputs:
        given = inputs.to_torch(self.stored)
        moved = given.map(lambda a: a.cuda()).map_masks(lambda a: a.cuda())
        return replace(moved, batch_sizes=given.batch_sizes)

    def check_array(self, name: str, a: Any) -> None:
        super().check_array(name, a)
        assert a.is_cuda, name


# The kernels ---------------------------------------------------------------------------------------------------------


@dtypes
def test_every_strategy_runs_where_the_hardware_can(dtype: str) -> None:
    """Or all tests of one could be skipped."""
    for strategy in ("block", "cluster", "grid", "step"):
        old = strategy == "cluster" and torch.cuda.get_device_capability() < (9, 0)
        for backward in (False, True):
            options = {"dtype": OnGpu(dtype).stored, "tf32": dtype == "tf32", "backward": backward}
            if old:
                with pytest.raises(RuntimeError, match=r"cluster.*9\.0"):
                    lstm_ext.plan(6, 5, 33, strategy=strategy, **options)
            else:
                plan = lstm_ext.plan(6, 5, 33, strategy=strategy, **options)
                assert (plan.strategy, plan.refused) == (strategy, {})
                assert 0 < plan.registers <= 255
                assert plan.blocks % plan.team == 0
                assert plan.microseconds_per_step > 0


class TestContract(Contract):
    ways = run_ways = tuple(OnGpu(dtype, strategy) for strategy in STRATEGIES for dtype in DTYPES)
    bit_ways = layout_ways = tuple(OnGpu(d, strategy) for strategy in STRATEGIES for d in ("float32", "bfloat16"))
    row_cases = (*SEVERAL_ROWS, Case(5, 19, 6, 40, directions=BOTH))
    step_sizes = (*Contract.step_sizes, (64, 100, 513))
    exact_rows = OUTPUTS  # the rest, and x W_ih' of rows elsewhere, comes from products that are torch's
    exact_order = exact_layouts = False


class TestCellContract(Contract):
    """The same of cells with options. Masks follow a row's number, so that rows that move are of cells without."""

    ways = tuple(OnGpu(dtype, strategy) for strategy in STRATEGIES for dtype in DTYPES)
    run_ways = bit_ways = layout_ways = tuple(OnGpu("float32", strategy) for strategy in STRATEGIES)
    cases = cell_cases(SMOOTH["all masks"], [Case(1, 1, 1, 1), *CELL_SHAPES, WIDE])
    run_cases = row_cases = save_cases = needs_cases = missing_cases = (
        CELL_MASKED,
        CELL_KERNEL,
        replace(PROJECTED, cell=DRAWN),
        replace(WIDE, cell=KERNEL),
    )
    layout_cases = (CELL_KERNEL,)
    step_sizes = ()  # of the plain cell
    exact_rows = OUTPUTS
    exact_order = exact_layouts = False

    def test_rows_move_with_their_results(self, *_: Any) -> None:
        for case in (CELL_KERNEL, replace(PROJECTED, cell=CELLS["relu, clips"])):
            super().test_rows_move_with_their_results(case, OnGpu("float32"))


NORM_STRATEGIES = ["chosen", "step"]
NORM_PROJECTED = replace(PROJECTED, cell=NORMED["normed rows, masks"]._replace(proj_clip=0.1))
NORM_KERNEL = replace(MASKED, cell=NORMED["normed gates"]._replace(tensorflow=True))


class TestNormContract(TestCellContract):
    """Of cells that normalise, which one strategy runs."""

    ways = tuple(OnGpu(dtype, strategy) for strategy in NORM_STRATEGIES for dtype in DTYPES)
    run_ways = bit_ways = layout_ways = tuple(OnGpu(dtype, "step") for dtype in ("float32", "bfloat16"))
    cases = tuple(
        case
        for name in ("normed rows", "normed gates")
        for case in cell_cases(NORMED[name], [Case(1, 1, 1, 3), *CELL_SHAPES, PACKED, WIDE, Case(3, 5, 7, 1100)])
    )
    run_cases = row_cases = save_cases = needs_cases = missing_cases = (NORM_PROJECTED, NORM_KERNEL)
    layout_cases = (NORM_KERNEL,)

    @over(way="ways", case="cases")
    def test_matches_the_oracle(self, case: Case, way: Way) -> None:
        assert_all_close(way.run(way.own(way.draw(case))), way.oracle(case), case, way.judged, gradient_magnitude=3.0)

    def test_rows_move_with_their_results(self, *_: Any) -> None:
        for name in ("normed rows", "normed gates"):
            case = replace(PROJECTED, cell=NORMED[name])
            Contract.test_rows_move_with_their_results(self, case, OnGpu("float32", "step"))


ALL_OPTIONS = [(name, strategy) for name in CELLS for strategy in STRATEGIES]
ALL_OPTIONS += [(name, strategy) for name in NORMED for strategy in NORM_STRATEGIES]


@pytest.mark.parametrize(("name", "strategy"), ALL_OPTIONS)
def test_every_option(name: str, strategy: str) -> None:
    for case in cell_cases((CELLS | NORMED)[name]):
        way = OnGpu("float64", strategy)
        assert_all_close(way.run(way.own(way.draw(case))), way.oracle(case), case, "float64", gradient_magnitude=3.0)


# Large ---------------------------------------------------------------------------------------------------------------


@strategies
@pytest.mark.parametrize(
    "case", [Case(70_000, 2, 3, 5), Case(66_000, 3, 1, 4, lengths="ragged", directions=BOTH)], ids=str
)
def test_long_sequences(case: Case, strategy: str) -> None:
    way = OnGpu("float32", strategy)
    assert_all_close(way.run(way.own(way.draw(case))), way.oracle(case), case, "float32")


@pytest.mark.parametrize(
    ("steps", "rows", "units", "training"), [(8, 65_536, 1_100, True), (4_096, 8_192, 65, False)], ids=str
)
def test_more_than_two_to_the_31_elements(steps: int, rows: int, units: int, training: bool) -> None:
    """The gates of the first, the outputs of the second. The last rows come out as they do alone."""
    # Of one row of one step: x W_ih' in float32, x and y; in training the gates, their gradients, cells, h and dy.
    row_bytes = 4 * 4 * units + 2 * (1 + units)
    row_bytes += 2 * 2 * 4 * units + 4 * units + 2 * 2 * units if training else 0
    need = 1.1 * steps * rows * row_bytes / 2**30  # a tenth for what the allocator cannot use
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < need:
        pytest.skip(f"needs {need:.0f} GiB of free GPU memory, there are {free:.0f}")
    module = lstm_ext.LSTM(1, units, dtype=torch.bfloat16).cuda()
    x, few = torch.randn(steps, rows, 1, dtype=torch.bfloat16).cuda(), 8
    results = []
    for own in (x, x[:, -few:].clone()):
        own.requires_grad_(training)
        with torch.set_grad_enabled(training):
            y, _ = module(own)
        last = [y[:, -few:].detach().clone()]
        if training:
            last.append(torch.autograd.grad(y[:, -few:].sum(), own)[0][:, -few:].clone())
        results.append(last)
        del y
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, "bfloat16", terms=4 * units)


# Functions and modules -----------------------------------------------------------------------------------------------


def moved(a: Any) -> Any:
    """Tensors, PackedSequences and tuples of them on the GPU; all else as it is."""
    if type(a) is tuple:
        return tuple(map(moved, a))
    return a.cuda() if hasattr(a, "cuda") else a


def cast(a: Any, dtype: Any) -> Any:
    """A tensor, or a tuple of them, in a dtype."""
    return tuple(each.to(dtype) for each in a) if type(a) is tuple else a.to(dtype)


def assert_as_on_the_cpu(module: Any, *args: Any, **options: Any) -> None:
    twin = copy.deepcopy(module).cuda()
    actual = run(twin, *map(moved, args), **{name: moved(a) for name, a in options.items()})
    assert_same([None if a is None else a.cpu() for a in actual], run(module, *args, **options))


@OPTIONS
def test_module_gives_the_numbers_of_the_cpu(options: dict[str, Any]) -> None:
    module, state = lstm_ext.LSTM(I, H, **options), make_state(options)
    x = torch.randn((B, T, I) if options["batch_first"] else (T, B, I))
    assert_as_on_the_cpu(module, x)
    assert_as_on_the_cpu(module, x, state)
    assert_as_on_the_cpu(module, torch.randn(T, I), make_state(options, ()))
    lengths, resets = torch.tensor([6, 0, 4], dtype=torch.int32), torch.rand(x.shape[:2]) < 0.3
    assert_as_on_the_cpu(module, x, state, lengths=lengths, resets=resets, return_cells=True)
    for sorted_ in (True, False):
        rows = [torch.randn(n, I) for n in ((6, 4, 1) if sorted_ else (4, 6, 1))]
        assert_as_on_the_cpu(module, pack_sequence(rows, enforce_sorted=sorted_), state)
    cell = lstm_ext.LSTMCell(I, H, options["bias"])
    assert_as_on_the_cpu(cell, torch.randn(B, I), (torch.randn(B, H), torch.randn(B, H)))


@pytest.mark.parametrize("name", ["peephole", "coupled, softsign", "means of zoneout", "clips", "layer norm"])
def test_module_with_options_gives_the_numbers_of_the_cpu(name: str) -> None:
    options: dict[str, Any] = {
        "peephole": {"peephole": True, "forget_bias": 1.0},
        "coupled, softsign": {"coupled": True, "activation": "softsign", "bidirectional": True},
        "means of zoneout": {"zoneout": (0.2, 0.3), "num_layers": 2},
        "layer norm": {"layer_norm": True, "bidirectional": True, "num_layers": 2},
        "clips": {"cell_clip": 0.4, "proj_clip": 0.2, "proj_size": 3, "recurrent_activation": "hard_sigmoid"},
    }[name]
    module = lstm_ext.LSTM(I, H, dtype=torch.float64, **options).train("zoneout" not in name)
    x = torch.randn(T, B, I, dtype=torch.float64)
    lengths, resets = torch.tensor([6, 0, 4]), torch.rand(T, B) < 0.3
    assert_as_on_the_cpu(module, x, lengths=lengths, resets=resets, return_cells=True)
    for kind in (lstm_ext.BasicLSTMCell, lstm_ext.LayerNormBasicLSTMCell):
        cell = kind(H, input_size=I).cuda()
        twin, rows = copy.deepcopy(cell).cpu(), torch.randn(B, I)
        torch.testing.assert_close(cell(rows.cuda())[0].cpu(), twin(rows)[0])


def assert_near(actual: list[Any], exact: list[Any], dtype: str) -> None:
    """Of results in a dtype, and the same in float64."""
    assert {a.dtype for a in actual} == {getattr(torch, dtype)}
    assert_same([a.double() for a in actual], exact, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@OPTIONS
def test_module_equals_stock(options: dict[str, Any], dtype: str) -> None:
    """Stock runs in float64: the float32 of cuDNN is off by 5e-6 in such small layers, more than TOLERANCES allow."""
    stock, ours = (module.cuda() for module in pair(I, H, **options))
    stock.double()
    ours.to(getattr(torch, dtype))
    x = torch.randn((B, T, I) if options["batch_first"] else (T, B, I)).cuda()
    for state in ((), (moved(make_state(options)),)):
        mine, theirs = ([cast(a, each.weight_ih_l0.dtype) for a in (x, *state)] for each in (ours, stock))
        assert_near(run(ours, *mine), run(stock, *theirs), dtype)
        with torch.no_grad():
            assert_near(tensors(ours(*mine)), tensors(stock(*theirs)), dtype)


@pytest.mark.parametrize("cell", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_training_is_as_near_to_float64_as_on_the_cpu(dtype: str, cell: bool) -> None:
    module = (lstm_ext.LSTMCell if cell else lstm_ext.LSTM)(40, 96, dtype=getattr(torch, dtype)).cuda()
    exact = (nn.LSTMCell if cell else nn.LSTM)(40, 96, dtype=torch.float64).cuda()
    exact.load_state_dict(module.state_dict())
    x = torch.randn(12, 40) if cell else torch.randn(50, 12, 40)
    x = x.to(getattr(torch, dtype))
    results = run(module, x.cuda()), run(exact, x.double().cuda())
    for n, (actual, expected) in enumerate(zip(*results, strict=True)):
        assert actual.dtype == x.dtype
        assert_close(actual, expected, dtype, terms=50 * 12, name=f"result {n}")


def test_lengths_come_from_anywhere_and_are_clamped() -> None:
    """A range check would wait for the device."""
    weights = [torch.randn(20, n).cuda() for n in (3, 5)]
    x = torch.randn(4, 3, 3).cuda()
    expected = lstm_ext.lstm(x, None, *weights, lengths=torch.tensor([4, 0, 2]).cuda())
    for lengths in (torch.tensor([99, -7, 2]), torch.tensor([99, -7, 2], dtype=torch.int32).cuda()):
        for a, e in zip(tensors(lstm_ext.lstm(x, None, *weights, lengths=lengths)), tensors(expected), strict=True):
            assert torch.equal(a, e)


@pytest.mark.parametrize("name", LAYERS)
def test_first_and_second_derivative(name: str) -> None:
    arguments, (lengths, resets, sizes, *layout) = make_layer(2, 3, **LAYERS[name])
    present = [a is not None for a in arguments]
    masks = (moved(lengths), moved(resets), sizes, *layout)

    def layer(*given: Any) -> tuple[Any, ...]:
        rest = iter(given)
        x, h0, c0, *weights = (next(rest) if p else None for p in present)
        return route.run(LayerCall(x, h0, c0, weights, *masks), Save.CELLS)[:4]

    given = tuple(a.detach().cuda().requires_grad_() for a in arguments if a is not None)
    assert gradcheck(layer, given)
    assert gradgradcheck(layer, given, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_as_stock(dtype: Any) -> None:
    """The numbers of float32 as far as the half type goes, and the dtypes of stock.

    But for the LSTM in bfloat16, which torch runs in float16.
    """
    stock, ours = (module.cuda() for module in pair(I, H))
    stock_cell, cell = (module.cuda() for module in pair(I, H, cell=True))
    x, state = torch.randn(T, B, I).cuda(), (torch.randn(B, H).cuda(), torch.randn(B, H).cuda())
    for theirs, mine, args in (
        (stock, ours, (x,)),
        (stock, ours, (x, tuple(s[None] for s in state))),
        (stock_cell, cell, (x[0],)),
        (stock_cell, cell, (x[0].to(dtype), state)),
    ):
        exact = run(theirs, *(a.float() if hasattr(a, "float") else a for a in args))
        with torch.autocast("cuda", dtype):
            actual, expected = run(mine, *args), run(theirs, *args)
        asked = {torch.float16: dtype} if theirs is stock else {}
        assert [a.dtype for a in actual] == [asked.get(e.dtype, e.dtype) for e in expected]
        for a, e in zip(actual, exact, strict=True):
            assert_close(a, e, str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager(backend: str) -> None:
    if backend == "inductor" and not torch.utils._triton.has_triton():
        pytest.skip("inductor needs Triton")
    torch._dynamo.reset()
    module, x = lstm_ext.LSTM(3, 4, 2, bidirectional=True).cuda(), torch.randn(5, 2, 3).cuda()
    compiled = torch.compile(lambda x: module(x)[0].relu().sum(), fullgraph=True, backend=backend)
    parameters, gradients = list(module.parameters()), []
    for call in (compiled, lambda x: module(x)[0].relu().sum()):
        gradients.append(torch.autograd.grad(call(x), parameters))
    assert_same(*map(list, gradients))


def test_wrong_arguments_are_named() -> None:
    x, w_ih, w_hh = torch.randn(4, 3, 3).cuda(), torch.randn(20, 3).cuda(), torch.randn(20, 5).cuda()
    for error, message, call in (
        (RuntimeError, "w_hh: expected on device cuda", lambda: lstm_ext.lstm(x, None, w_ih, w_hh.cpu())),
        (RuntimeError, r"x: expected shape \[T, B, I\]", lambda: lstm_ext.lstm(x[..., :2], None, w_ih, w_hh)),
        (
            RuntimeError,
            "x: expected dtype float32 as the weights have, got float16",
            lambda: lstm_ext.lstm(x.half(), None, w_ih, w_hh),
        ),
        (
            RuntimeError,
            "x: expected at least one time step, got T = 0",
            lambda: lstm_ext.lstm(x[:0], None, w_ih, w_hh),
        ),
        (TypeError, "resets: expected dtype bool", lambda: lstm_ext.lstm(x, None, w_ih, w_hh, resets=x[..., 0])),
        (ValueError, "strategy: expected 'block'", lambda: lstm_ext.plan(4, 3, 5, strategy="tree")),
    ):
        with pytest.raises(error, match=message):
            call()


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
