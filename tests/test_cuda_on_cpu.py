"""The CUDA kernels against the float64 oracle, run on the CPU by tests/cuda_on_cpu."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lstm_ext.call import BOTH, FORWARD, REVERSE, Grads, LayerCall, Needs, OutputGrads, Outputs, Save, Saved
from lstm_ext.cell import Cell
from lstm_ext.testing import CASES, Case, Inputs, assert_all_close, make_inputs, run_layer, run_oracle, to_float64

from .contract import MASKED, OUTPUTS, PACKED, PROJECTED, Contract, Way, gradient_magnitude, over
from .test_kernels import CELLS as OPTIONS
from .test_kernels import KERNEL, NORMED, SMOOTH, with_cell
from .test_process import succeed

harness: Any = pytest.importorskip(
    "lstm_ext_cuda_on_cpu",
    reason="the harness is not built: see tests/cuda_on_cpu/README.md",
    exc_type=ModuleNotFoundError,
)
torch: Any = pytest.importorskip("torch")

from lstm_ext import around_steps, route  # noqa: E402
from lstm_ext.engines import cuda  # noqa: E402
from lstm_ext.engines.composed import compute_dtype  # noqa: E402

harness.take_tensors(torch.Tensor)

STRATEGIES = ["block", "cluster", "grid", "step"]
DTYPES = ["float32", "float64", "float16", "bfloat16", "tf32"]


@dataclass
class Core:
    """`lstm_ext._C` as engines/cuda.py calls it: csrc/ops/cuda_layer.cpp with the kernels behind it, run here."""

    device: int = 0  # a number of `devices` in tests/cuda_on_cpu/runtime.h
    seed: int = 0  # of the schedule
    tf32: bool = False  # whatever torch is set to
    asked: list[tuple[Needs, str]] = field(default_factory=list)  # (needs, strategy) of each backward pass

    def run(self, function: Any, *args: Any) -> Any:
        harness.use_device(self.device)
        outputs = function(*args)
        harness.run_launched(self.seed)
        return outputs

    def cuda_layer_forward(self, steps: LayerCall, save: Save, _: bool, strategy: str) -> Any:
        return self.run(harness.cuda_layer_forward, steps, save, self.tf32, strategy)

    def cuda_layer_backward(
        self, steps: LayerCall, saved: Saved, grads: OutputGrads, needs: Needs, _: bool, strategy: str, *normed: Any
    ) -> Any:
        self.asked.append((needs, strategy))
        return self.run(harness.cuda_layer_backward, steps, saved, grads, needs, self.tf32, strategy, *normed)

    def cuda_h_before(self, steps: LayerCall, saved: Saved) -> Any:
        return self.run(harness.cuda_h_before, steps, saved)

    def cuda_step_forward(self, call: LayerCall, _: bool) -> Any:
        return self.run(harness.cuda_step_forward, call, self.tf32)

    def cuda_timed_out(self) -> str:
        return str(harness.cuda_timed_out())


@dataclass
class OnGpu:
    """An engine: a layer as a GPU runs it, the products over all time in float64 here, the rest by our kernels."""

    core: Core
    strategy: str

    def forward(self, call: LayerCall, save: Save) -> Any:
        if call.is_step and not save and call.resets is None:
            return self.core.cuda_step_forward(call, False)
        if call.is_step:
            return Outputs(*self.forward(call.with_time(), save)).without_time(call)
        steps = cuda.steps_of(call)._replace(x=input_products(call))
        return self.core.cuda_layer_forward(steps, save, False, self.strategy)

    def backward(self, call: LayerCall, saved: Saved, grads: OutputGrads, needs: Needs) -> Any:
        if call.is_step:
            timed = self.backward(call.with_time(), saved.with_time(call), grads.with_time(call), needs)
            return Grads(*timed).without_time(call)
        steps = cuda.steps_of(call)._replace(x=saved.gates)
        x, products, normed = time_major(call), None, ()  # [rows, I]
        if around_steps.norm_of(call):
            h = self.core.cuda_h_before(steps, saved)
            again = around_steps.normed_again(call, x.reshape(*h.shape[1:-1], x.shape[-1]), h)
            products, scales = (torch.from_numpy(a).to(compute_dtype(call.x.dtype)) for a in again)
            normed = (products, scales)
        results = self.core.cuda_layer_backward(steps, saved, grads, needs, False, self.strategy, *normed)
        d_gates, dh0, dc0 = results[0], results[5], results[6]
        dx, dweights = around_steps.from_steps(call, x, results, products)
        dx = dx.reshape(*d_gates.shape[1:-1], x.shape[-1])
        dx = dx.swapaxes(0, 1) if call.batch_first else dx
        return dx if needs & Needs.X else None, dh0, dc0, dweights if needs & Needs.WEIGHTS else None


def time_major(call: LayerCall) -> np.ndarray:
    """The rows of x in time order [T * B or N, I], zero past a length."""
    x = to_float64(call.x)
    if call.batch_sizes is not None:
        return x
    x = np.array(x.swapaxes(0, 1) if call.batch_first else x)
    if call.lengths is not None:
        x[np.arange(len(x))[:, None] >= to_float64(call.lengths)] = 0
    return rows_of(x)


def input_products(call: LayerCall) -> Any:
    """x W_ih' of each direction [D, T, B, 4H] (packed: [D, N, 4H]), float32 for half types, NaN past a length."""
    products = around_steps.input_products(call, to_float64(call.x.transpose(0, 1) if call.batch_first else call.x))
    return torch.from_numpy(products).to(compute_dtype(call.x.dtype))


def rows_of(sequence: Any) -> np.ndarray:
    """A sequence [.., width] as float64 rows."""
    a = to_float64(sequence)
    return a.reshape(int(np.prod(a.shape[:-1])), a.shape[-1])


@contextmanager
def skipping(strategy: str) -> Iterator[None]:
    """Skips, with the planner's reason, what cannot run: a strategy whose block would have to hold too many weights."""
    try:
        yield
    except RuntimeError as error:
        needs = re.search(rf"'{strategy}' cannot run this: needs at least (\d+) bytes .* of (\d+)", str(error))
        if not (needs and int(needs[1]) > int(needs[2])) and "with so much shared memory at a time" not in str(error):
            raise
        pytest.skip(str(error))


@dataclass(frozen=True)
class OnFibers(Way):
    """The CUDA kernels, by one strategy; each case in a schedule of its own."""

    strategy: str = ""

    def __str__(self) -> str:
        return f"{self.dtype}-{self.strategy}"

    @property
    def layouts(self) -> dict[str, Callable[[Any], Any]]:
        # No column stands alone: what the core copies is gone before the kernels run here.
        return {"rows apart": lambda a: a if a.dim() < 2 else a.repeat_interleave(2, dim=-2)[..., ::2, :]}

    @contextmanager
    def engine(self, case: Case, turn: int = 0) -> Iterator[OnGpu]:
        seed = (CASES.index(case) if case in CASES else case.H) + STRATEGIES.index(self.strategy) + turn
        with skipping(self.strategy):
            yield OnGpu(Core(tf32=self.dtype == "tf32", seed=seed), self.strategy)

    def own(self, inputs: Inputs) -> Inputs:
        return inputs.to_torch(self.stored)

    def check_array(self, name: str, a: Any) -> None:
        if name != "dx" and not name.startswith("dweights"):  # those that are computed here
            super().check_array(name, a)


class TestContract(Contract):
    ways = tuple(OnFibers(dtype, strategy) for dtype in DTYPES for strategy in STRATEGIES)
    bit_ways = run_ways = layout_ways = tuple(OnFibers("float32", strategy) for strategy in STRATEGIES)
    run_cases = (Case(1, 1, 1, 1), MASKED)
    # Of the latter two the last rank has fewer units than the others, in both products.
    row_cases = (MASKED, PROJECTED, Case(3, 4, 3, 65, P=31), Case(2, 5, 3, 33, P=17))
    save_cases = needs_cases = (PROJECTED, PACKED)
    step_sizes = ((1, 1, 1), (3, 32, 33), (16, 64, 64), (0, 3, 5))
    all_needs = (Needs.H0 | Needs.C0, Needs.H0, Needs.C0, Needs.X, Needs.WEIGHTS, Needs(0))
    exact_rows = (*OUTPUTS, "dh0", "dc0")  # the rest comes from products that are made here
    exact_layouts = False


def check(case: Case, dtype: str, strategy: str, *, data_seed: int = 0, **core: Any) -> None:
    way = OnFibers(dtype, strategy)
    with skipping(strategy):
        actual = run_layer(OnGpu(Core(tf32=dtype == "tf32", **core), strategy), way.own(way.draw(case, data_seed)))
    magnitude = gradient_magnitude(case, way) if case.cell is None else 3.0  # as on the CPU
    assert_all_close(actual, way.oracle(case, data_seed), case, way.judged, gradient_magnitude=magnitude)


def check_cell(case: Case, dtype: str, **core: Any) -> None:
    way = OnFibers(dtype)
    inputs = way.draw(case).without_time()
    y, _, c_n, *_ = Core(tf32=dtype == "tf32", **core).cuda_step_forward(way.own(inputs).call, False)
    assert_all_close(({"y": y, "c_n": c_n}, {}), run_oracle(inputs), case, way.judged)


# Cases that go through everything that a kernel does, and are quick: for several schedules, and for mutate.py.
MASKED_CASE = Case(5, 9, 5, 17, lengths="with_zero", resets=True, directions=BOTH, batch_first=True)
PROJECTED_CASE = Case(4, 5, 9, 33, P=11, lengths="ragged", resets=True, directions=REVERSE)
PACKED_CASE = Case(5, 9, 3, 13, P=7, packed=True, bias=False, state=False)
LARGE_BATCH_CASE = replace(MASKED_CASE, B=107)  # several tiles of the batch for a team, on a small device
QUICK = [(MASKED_CASE, "float32"), (PROJECTED_CASE, "float16"), (PACKED_CASE, "float64"), (MASKED_CASE, "tf32")]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("case", "dtype"), QUICK, ids=str)
def test_any_schedule_matches_the_oracle(case: Case, dtype: str, strategy: str, seed: int) -> None:
    check(case, dtype, strategy, seed=seed, data_seed=1)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("device", [1, 2], ids=["3 multiprocessors", "sm_75"])
def test_other_devices_match_the_oracle(device: int, strategy: str) -> None:
    refusals = {("grid", 1): "too few multiprocessors", ("cluster", 2): "no clusters before compute capability 9"}
    if refusal := refusals.get((strategy, device)):
        with pytest.raises(RuntimeError, match=refusal):
            check(LARGE_BATCH_CASE, "float16", strategy, device=device)
        return
    for case in (LARGE_BATCH_CASE, PROJECTED_CASE):
        check(case, "float16", strategy, device=device)


@pytest.mark.parametrize("strategy", ["block", "cluster"])
def test_a_plan_says_how_the_large_batch_is_spread(strategy: str) -> None:
    """It has more sequences than all teams take at a time, as its name says."""
    case, directions, most_in_a_tile = LARGE_BATCH_CASE, 2, 32
    plan = harness.cuda_plan(case.T, case.B, case.H, 0, False, "float32", False, directions, False, strategy, 1)
    assert plan["strategy"] == strategy
    assert 0 < plan["blocks"] // (directions * plan["team"]) * most_in_a_tile < case.B


@pytest.mark.parametrize("backward", [False, True])
def test_sizes_that_a_launch_cannot_count_are_refused(backward: bool) -> None:
    """Places in a layout, and blocks of a launch, are ints."""

    def plan(B: int, H: int, P: int) -> Any:
        return harness.cuda_plan(1, B, H, P, P > 0, "float32", False, 1, backward, "", 0)

    with pytest.raises(RuntimeError, match=r"expected at most 2\*\*52 numbers"):
        plan(2**31, 2**31, 0)
    with pytest.raises(RuntimeError, match=r"weights: expected at most 2\*\*28 units on a GPU, got H = 536870912"):
        plan(4, 2**29, 1)
    with pytest.raises(RuntimeError, match="x: expected a smaller batch for a launch"):
        plan(2**45, 1, 0)
    assert "no chip holds the weights" in plan(4, 2**15 + 1, 0)["refused"]["block"]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("strategy", ["", *STRATEGIES])
def test_no_steps_are_an_error(strategy: str, backward: bool) -> None:
    """As in torch; nothing was launched for them, and what was allocated came back as it was."""
    call = LayerCall(torch.zeros(1, 0, 2, 20), None, None, [torch.zeros(20, 5)], None, None, None, FORWARD, False)
    saved, grads = Saved(torch.zeros(1, 0, 2, 5), call.x), OutputGrads(torch.zeros(0, 2, 5), None, None, None)

    def launch() -> Any:
        if backward:
            return Core().cuda_layer_backward(call, saved, grads, Needs.ALL, False, strategy)
        return Core().cuda_layer_forward(call, Save.NOTHING, False, strategy)

    with pytest.raises(RuntimeError, match="x: expected at least one time step, got T = 0: shape"):
        launch()


@pytest.fixture
def sm_margin() -> Iterator[Callable[[int], None]]:
    former = harness.sm_margin()
    yield harness.set_sm_margin
    harness.set_sm_margin(former)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("margin", [1, 3, 6])
def test_a_margin_of_multiprocessors_stays_free(margin: int, backward: bool, sm_margin: Callable[[int], None]) -> None:
    """The device has 8; the batch is large enough for all of them, by each strategy."""
    for strategy in ("block", "cluster", "grid"):
        for spared, least, most in ((0, 8, 16), (margin, 2 if strategy != "block" else 8 - margin, 8 - margin)):
            sm_margin(spared)
            plan = harness.cuda_plan(4, 200, 40, 0, False, "float32", False, 1, backward, strategy, 0)
            assert plan["sm_margin"] == spared
            assert least <= plan["blocks"] <= most, plan
    sm_margin(100)
    assert harness.cuda_plan(4, 200, 40, 0, False, "float32", False, 1, backward, "", 0)["blocks"] > 0
    with pytest.raises(RuntimeError, match="'grid' cannot run this: too few multiprocessors"):
        harness.cuda_plan(4, 200, 40, 0, False, "float32", False, 1, backward, "grid", 0)


@pytest.mark.parametrize("strategy", ["block", "cluster", "grid"])
def test_a_layer_runs_beside_a_margin(strategy: str, sm_margin: Callable[[int], None]) -> None:
    sm_margin(3)
    check(LARGE_BATCH_CASE, "float16", strategy)


@pytest.mark.parametrize("strategy", ["", *STRATEGIES])
def test_a_device_that_does_not_tell_its_clock_has_plans(strategy: str) -> None:
    plan = harness.cuda_plan(50, 4, 40, 0, False, "float32", False, 1, False, strategy, 3)
    assert 0 < plan["microseconds_per_step"] < 100


def test_the_runtime_is_asked_once_for_an_occupancy() -> None:
    def queries(steps: int, rows: int) -> int:
        before = harness.occupancy_queries()
        harness.cuda_plan(steps, rows, 71, 0, False, "float64", False, 1, False, "", 0)
        return int(harness.occupancy_queries() - before)

    assert queries(100, 3) > 0
    assert queries(100, 4) == 0  # another batch, the same kernels with the same shared memory


def test_looking_for_devices_makes_no_context() -> None:
    """A context takes hundreds of megabytes of a GPU."""
    program = f"import {harness.__name__} as h; print(repr(h.refusal()), h.contexts())"
    assert succeed(program, PYTHONPATH=str(Path(harness.__file__).parent)) == "'' set()\n"


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        (75, "75-real 80-real", True),
        (89, "75-real 80-real", True),
        (90, "75-real 80-real", False),
        (90, "75-real 80", True),
        (90, "90a-real", True),
        (100, "90a-real", False),
        (103, "100f-real", True),
        (120, "100-real 90a-real", False),
        (61, "75", False),
    ],
)
def test_which_devices_run_what_was_compiled(capability: int, archs: str, runs: bool) -> None:
    assert harness.runs_on(capability, archs) == runs


def test_threads_that_plan_and_launch_at_once_do_not_disturb_each_other() -> None:
    """How much shared memory a kernel may have is the same for all threads of a process: none may set it for itself."""
    widths, lengths = (8, 48, 96, 104), range(1, 6)  # a length that is new is planned
    rng = np.random.default_rng(0)

    def draw_array(*shape: int) -> Any:
        return torch.from_numpy(rng.uniform(-1, 1, shape).astype(np.float32))

    inputs = [(draw_array(4 * H, H), [draw_array(1, T, 2, 4 * H) for T in lengths]) for H in widths]

    def launch(given: tuple[Any, list[Any]]) -> list[Any]:
        w_hh, xws = given
        steps = [LayerCall(xw, None, None, [w_hh], None, None, None, FORWARD, False) for xw in xws]
        return [harness.cuda_layer_forward(call, Save.NOTHING, False, "block")[0] for call in steps]

    def shared_bytes(H: int) -> int:
        plan = harness.cuda_plan(lengths[0], 2, H, 0, False, "float32", False, 1, False, "block", 0)
        return int(plan["shared_bytes"])

    harness.use_device(0)
    with ThreadPoolExecutor(len(widths)) as threads:
        together = list(threads.map(launch, inputs))
    harness.run_launched(0)
    alone = [launch(given) for given in inputs]
    harness.run_launched(0)
    assert len({shared_bytes(H) for H in widths}) == len(widths)
    for ours, theirs in zip(together, alone, strict=True):
        assert all(torch.isfinite(y).all() for y in ours)
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("strategy", ["cluster", "grid"])
def test_a_partner_that_never_sends_ends_in_an_error_that_says_so(
    strategy: str, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not in a process that hangs: with a GPU that it cannot use any more, which the next call tells."""
    way, name = OnFibers("float32", strategy), f"sequence_{'back' if backward else 'for'}ward<float32, 8 sequences"
    inputs, engine = way.own(way.draw(MASKED_CASE)), OnGpu(Core(), strategy)
    saved = Saved(*engine.forward(inputs.call, Save.ALL)[3:])
    forward = partial(engine.forward, inputs.call, Save.ALL)
    harness.mute_block(1)
    try:
        with pytest.raises(RuntimeError, match="trap"):
            (partial(engine.backward, inputs.call, saved, inputs.grads, Needs.ALL) if backward else forward)()
        message = (
            rf"unspecified launch failure; {name}, {strategy}> gave up: block \d+, rank \d+ of its team, "
            r"waited for exchange \d+ of another block for more than 10 s"
        )
        with pytest.raises(RuntimeError, match=message):
            forward()
        # On a GPU an operation of torch's comes first, and says less.
        monkeypatch.setattr(cuda, "C", engine.core)
        monkeypatch.setattr(cuda, "input_products", lambda call: call.x.view(-1, 0))
        with pytest.raises(RuntimeError, match=r"(?s)invalid.*\nlstm_ext: " + message.partition("; ")[2]):
            cuda.forward(inputs.call, Save.ALL)
    finally:
        harness.revive_device()
    check(MASKED_CASE, "float32", strategy)


CELLS = [Case(1, 1, 1, 1), Case(1, 3, 32, 33, state=False), Case(1, 16, 64, 64), Case(1, 9, 45, 17, bias=False)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CELLS, ids=str)
def test_a_cell_matches_the_oracle(case: Case, dtype: str) -> None:
    check_cell(case, dtype, seed=CELLS.index(case))


# Cells with options --------------------------------------------------------------------------------------------------

MASKS = SMOOTH["all masks"]
PACKED_BOTH_CASE = replace(PACKED_CASE, directions=BOTH)
OPTION_CASES = [case for shape in (MASKED_CASE, PROJECTED_CASE, PACKED_BOTH_CASE) for case in with_cell(shape, MASKS)]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", OPTION_CASES, ids=str)
def test_masks_match_the_oracle(case: Case, dtype: str, strategy: str) -> None:
    check(case, dtype, strategy, seed=OPTION_CASES.index(case))


@pytest.mark.parametrize("name", OPTIONS)
def test_options_match_the_oracle(name: str) -> None:
    cases = [case for shape in (MASKED_CASE, PROJECTED_CASE) for case in with_cell(shape, OPTIONS[name])]
    for n, case in enumerate(cases):
        strategy = STRATEGIES[(list(OPTIONS).index(name) + n) % len(STRATEGIES)]
        check(case, "float64" if n == 1 else "float32", strategy, data_seed=2)


# Cells that normalise: H beyond the threads of a block that has a row of a step, items beyond the lanes of a warp that
# has one in all steps, ranks without units, and no rows at all.
NORMED_SMOOTH = [cell for name, cell in NORMED.items() if "masks" not in name]
NORM_SHAPES = (
    MASKED_CASE,
    PROJECTED_CASE,
    PACKED_CASE,
    Case(1, 9, 33, 40),
    Case(3, 3, 4, 75),
    Case(2, 2, 3, 530),
    Case(3, 0, 5, 7),
)
NORM_MASKED = replace(MASKED_CASE, cell=NORMED["normed rows, masks"])
NORM_KERNEL = replace(MASKED_CASE, cell=NORMED["normed gates"]._replace(tensorflow=True))
NORM_PROJECTED = replace(PROJECTED_CASE, cell=NORMED["normed rows, masks"]._replace(proj_clip=0.1))
NORM_PACKED = replace(PACKED_CASE, state=True, cell=NORMED["normed gates"])
NORM_LARGE_BATCH = replace(LARGE_BATCH_CASE, cell=NORMED["normed rows"])
NORM_LONG = [
    Case(20, 3, 4, 17, lengths="ragged", resets=True, cell=NORMED["normed rows, masks"]),
    Case(20, 3, 4, 17, P=7, directions=REVERSE, resets=True, cell=NORMED["normed gates"]),
]
QUICK_NORMED = [(NORM_MASKED, "float32"), (NORM_KERNEL, "tf32"), (NORM_PROJECTED, "float64"), (NORM_PACKED, "float16")]


class TestNormContract(Contract):
    """Of cells that normalise: what blocks exchange is the same in all launches for all T, but for its way."""

    ways = tuple(
        OnFibers(dtype, strategy)
        for strategy, dtypes in {
            "block": ["float32", "bfloat16"],
            "cluster": ["float32", "float64", "tf32"],
            "grid": ["float32", "float16"],
            "step": DTYPES,
        }.items()
        for dtype in dtypes
    )
    bit_ways = run_ways = layout_ways = tuple(OnFibers("float32", strategy) for strategy in ("grid", "step"))
    cases = tuple(case for n, shape in enumerate(NORM_SHAPES) for case in with_cell(shape, NORMED_SMOOTH[n % 2]))
    run_cases = save_cases = (NORM_PROJECTED, NORM_KERNEL)
    row_cases = needs_cases = missing_cases = (NORM_MASKED, NORM_KERNEL, NORM_PROJECTED)
    layout_cases = (NORM_MASKED, NORM_KERNEL)
    step_sizes = ()  # of the plain cell
    all_needs = TestContract.all_needs
    exact_rows = TestContract.exact_rows
    exact_layouts = False

    @over(way="ways", case="cases")
    def test_matches_the_oracle(self, case: Case, way: Way) -> None:
        check(case, way.dtype, way.strategy, seed=case.H + STRATEGIES.index(way.strategy))

    def test_rows_move_with_their_results(self, *_: Any) -> None:
        for cell, way in product(NORMED_SMOOTH, self.bit_ways):
            super().test_rows_move_with_their_results(replace(MASKED_CASE, cell=cell), way)


@pytest.mark.parametrize(
    ("strategy", "seed"),
    [(strategy, seed) for strategy in STRATEGIES for seed in range(4 if strategy == "step" else 2)],
)
@pytest.mark.parametrize(("case", "dtype"), QUICK_NORMED, ids=str)
def test_any_schedule_of_rows_matches_the_oracle(case: Case, dtype: str, strategy: str, seed: int) -> None:
    check(case, dtype, strategy, seed=seed, data_seed=1)
    if strategy == "step" or (strategy == "grid" and dtype != "tf32"):  # on sm_75, whose launches do not overlap
        check(case, dtype, strategy, seed=seed, device=2 if dtype != "tf32" else 1)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", NORM_LONG, ids=str)
def test_rows_of_long_sequences_match_the_oracle(case: Case, strategy: str) -> None:
    """Of more steps than moments are found of at a time."""
    check(case, "float32", strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_of_a_large_batch_match_the_oracle(strategy: str) -> None:
    check(NORM_LARGE_BATCH, "float16", strategy, device=0 if strategy == "grid" else 1)


@pytest.mark.parametrize("cell", NORMED_SMOOTH, ids=str)
def test_rows_of_more_ranks_than_a_warp_has_lanes_match_the_oracle(cell: Cell) -> None:
    """Backward 35 of them, and forward 33."""
    for case in (*with_cell(Case(2, 1, 3, 140), cell), *with_cell(Case(2, 1, 3, 260), cell)):
        check(case, "float32", "grid", device=5, seed=case.H)


def check_few_threads(case: Case, dtype: str, **kwargs: Any) -> None:
    """With rows whose threads have several units."""
    check(replace(case, H=37), dtype, f"step/{1 if dtype == 'float64' else 2}/32", **kwargs)


@pytest.mark.parametrize(("case", "dtype"), QUICK_NORMED, ids=str)
def test_rows_of_few_threads_match_the_oracle(case: Case, dtype: str) -> None:
    check_few_threads(case, dtype, data_seed=1)


@pytest.mark.parametrize("cell", NORMED_SMOOTH, ids=str)
def test_rows_too_long_for_shared_memory_match_the_oracle(cell: Cell) -> None:
    for case in with_cell(Case(2, 2, 3, 900), cell):
        check(case, "float64", "step", device=4)


@pytest.mark.parametrize("name", NORMED)
def test_norms_match_the_oracle(name: str) -> None:
    cases = [case for shape in (MASKED_CASE, PROJECTED_CASE) for case in with_cell(shape, NORMED[name])]
    for (n, case), strategy in product(enumerate(cases), STRATEGIES):
        check(case, ("float32", "float64")[n % 2], strategy, seed=n, data_seed=2)


def test_what_was_normalised_is_asked_for() -> None:
    inputs = OnFibers("float32").own(make_inputs(NORM_KERNEL, "float32"))
    engine = OnGpu(Core(), "step")
    saved = Saved.of(Outputs(*engine.forward(inputs.call, Save.ALL)), inputs.case.cell)
    steps = cuda.steps_of(inputs.call)._replace(x=saved.gates)
    with pytest.raises(TypeError, match="normed: expected an array for a cell that normalises, got None"):
        engine.core.cuda_layer_backward(steps, saved, inputs.grads, Needs.ALL, False, "step")
    normed = torch.zeros_like(saved.gates), torch.zeros(*saved.gates.shape[:-1], 1)
    with pytest.raises(RuntimeError, match=r"scales: expected shape \[2, 5, 9, 4\], got \[2, 5, 9, 1\]"):
        engine.core.cuda_layer_backward(steps, saved, inputs.grads, Needs.ALL, False, "step", *normed)


@pytest.mark.parametrize("case", CELLS, ids=str)
def test_one_step_of_options_matches_the_oracle(case: Case) -> None:
    for n, option in enumerate((KERNEL, OPTIONS["coupled, softsign"], OPTIONS["elu, hard sigmoid"])):
        dtype = DTYPES[(CELLS.index(case) + n) % 2]
        check_cell(replace(case, cell=option, bias=case.bias or option.tensorflow), dtype)


NORM_CASES = [case for case, _ in QUICK_NORMED] + with_cell(PACKED_CASE, NORMED["normed rows"])
NORM_CASES += [Case(3, 0, 5, 7, cell=cell) for cell in NORMED_SMOOTH]
ONE_STEP = [Case(1, 3, 5, 9, cell=cell) for cell in (MASKS, KERNEL, *NORMED_SMOOTH)]


@pytest.mark.parametrize("case", [*OPTION_CASES, *NORM_CASES, *ONE_STEP], ids=str)
def test_options_through_torch(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "C", Core())
    inputs = make_inputs(case, "float32")
    actual = run_layer(cuda, inputs.to_torch("float32"))
    assert_all_close(actual, run_oracle(inputs), case, "float32", gradient_magnitude=3.0)
    if case.T > 1:
        return
    step = inputs.without_time()
    assert_all_close(run_layer(cuda, step.to_torch("float32")), run_oracle(step), case, "float32")


@pytest.mark.parametrize("batch", [(), (3,)])
def test_states_of_a_cell_can_be_changed_in_place(batch: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """They are no views, of which autograd forbids some changes."""
    monkeypatch.setattr(cuda, "C", Core())
    weights = [torch.randn(20, 4, requires_grad=True), torch.randn(20, 5)]
    call = LayerCall(torch.randn(*batch, 4), None, None, weights, None, None, None, FORWARD, False)
    y, _, c_n, _, _ = route.differentiable(cuda, call, Save.NOTHING)
    assert (y.shape, c_n.shape) == ((*batch, 5), (*batch, 5))
    c_n.mul_(2)
    assert y.detach_().grad_fn is None


@pytest.mark.parametrize("strategy", ["", "step"])
@pytest.mark.parametrize("case", [case for case in CASES if case.H < 100], ids=str)
def test_a_layer_through_torch(case: Case, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core()
    monkeypatch.setattr(cuda, "C", core)
    inputs = make_inputs(case, "float32")
    with cuda.use_strategy(strategy):
        actual = run_layer(cuda, inputs.to_torch("float32"))
    assert_all_close(actual, run_oracle(inputs), case, "float32")
    # One step needs no product with w_hh but that for h0, which is torch's: one launch, as a cell's backward pass.
    alone = case.T == 1 and not (case.lengths or case.resets or case.packed)
    assert core.asked == [(Needs.ALL & ~Needs.H0, "step") if alone else (Needs.ALL, strategy)]
