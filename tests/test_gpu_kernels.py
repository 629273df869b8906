"""The CUDA kernels on a GPU, against the float64 oracle: each strategy, dtype and option, and what is large."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest

from lstm_ext.call import BOTH
from lstm_ext.testing import Case, Inputs, assert_all_close, assert_close

torch = pytest.importorskip("torch")

import lstm_ext  # noqa: E402
from lstm_ext.engines import cuda  # noqa: E402

from .contract import MASKED, OUTPUTS, PACKED, PROJECTED, SEVERAL_ROWS, WIDE, Contract, Way, over  # noqa: E402
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

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("_no_hang", "_exact_products")]

STRATEGIES = ["chosen", "block", "cluster", "grid", "step"]
DTYPES = ["tf32", "float32", "float64", "bfloat16", "float16"]

# Why the planner says that no kernel of a strategy fits on this GPU.
NOT_HERE = (
    r"'\w+' cannot run this: (no clusters before|too few multiprocessors|no cooperative launch|no chip holds|"
    r"needs at least \d+ bytes|the device cannot run a team|no room for a team)"
)

strategies = pytest.mark.parametrize("strategy", STRATEGIES)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


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


NORM_PROJECTED = replace(PROJECTED, cell=NORMED["normed rows, masks"]._replace(proj_clip=0.1))
NORM_KERNEL = replace(MASKED, cell=NORMED["normed gates"]._replace(tensorflow=True))


class TestNormContract(TestCellContract):
    """Of cells that normalise."""

    run_ways = bit_ways = layout_ways = tuple(
        OnGpu(d, strategy) for strategy in STRATEGIES for d in ("float32", "bfloat16")
    )
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
            for strategy in ("grid", "step"):
                Contract.test_rows_move_with_their_results(self, case, OnGpu("float32", strategy))


ALL_OPTIONS = [(name, strategy) for name in (*CELLS, *NORMED) for strategy in STRATEGIES]


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
