"""What the kernels must reach, work by work, and how far the rows of a run do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from .cases import OPTIONS, WORKLOADS, Case
from .rows import FROZEN, LOOPS, OURS, Row, geomean, is_peer

Times = dict[Case, dict[str, float]]  # by case, its suite left blank


@dataclass(frozen=True)
class Target:
    """A figure that should be large, wanted of the rows' geometric mean, of each row, or of both."""

    work: str
    figure: Callable[[Row, Times], float | None]  # None: not one of this target's rows
    minimum: float | None
    mean: float | None = None
    stretch: float | None = None
    device: str = "cpu"


def suite(*names: str, **axes: object) -> Callable[[Row, Times], float | None]:
    """torch's time over ours, in these suites, where the case has these values."""

    def figure(row: Row, times: Times) -> float | None:
        chosen = row.case.suite in names and all(getattr(row.case, name) == value for name, value in axes.items())
        return row.ratio if chosen else None

    return figure


def _same(times: Times, case: Case, **changes: Any) -> float | None:
    """Our time of the case with these changes, if it was measured."""
    return times.get(replace(case, suite="", **changes), {}).get(OURS)


def _over_float32(row: Row, times: Times) -> float | None:
    case, float32 = row.case, _same(times, row.case, dtype="float32")
    if OURS not in row.us or float32 is None or (case.dtype, case.B) != ("bfloat16", 1) or case.H < 512:
        return None
    return float32 / row.us[OURS]


def _undisturbed(row: Row, times: Times) -> float | None:
    alone = _same(times, row.case, busy=0)
    return alone / row.us[OURS] if row.case.busy and OURS in row.us and alone else None


def _next_width(row: Row, times: Times) -> float | None:
    """The time at H and H + 1, the less over the more."""
    beyond = _same(times, row.case, H=row.case.H + 1)
    if row.case.suite != "cliff" or OURS not in row.us or beyond is None:
        return None
    return min(row.us[OURS] / beyond, beyond / row.us[OURS])


def _whole_grid(row: Row, times: Times) -> float | None:
    return None if row.case.busy or row.case.work or row.case.options else row.ratio


def _best_peer(row: Row, times: Times) -> float | None:
    peers = [us for arm, us in row.us.items() if is_peer(arm)]
    wanted = row.case.mode in ("cell", "inference") and not (row.case.busy or row.case.work)
    wanted = wanted and row.case.dtype == "float32" and not row.case.options
    return min(peers) / row.us[OURS] if wanted and OURS in row.us and len(peers) > 1 else None


def _over(ours: str, *others: str, suites: tuple[str, ...]) -> Callable[[Row, Times], float | None]:
    """The time of the fastest of some arms, or of all peers, over that of one of ours."""

    def figure(row: Row, times: Times) -> float | None:
        found = [us for arm, us in row.us.items() if (arm in others if others else is_peer(arm))]
        return min(found) / row.us[ours] if row.case.suite in suites and ours in row.us and found else None

    return figure


def _over_plain(*options: str) -> Callable[[Row, Times], float | None]:
    """The time of the plain layer over that of one with such options."""

    def figure(row: Row, times: Times) -> float | None:
        plain = _same(times, row.case, options="") if row.case.options in options else None
        return plain / row.us[OURS] if plain and OURS in row.us else None

    return figure


def _over_loops(*batches: int) -> Callable[[Row, Times], float | None]:
    """The time of the same cell in torch's operations, the faster of the two ways."""

    def figure(row: Row, times: Times) -> float | None:
        loops = [us for arm, us in row.us.items() if arm in LOOPS]
        wanted = row.case.options and row.case.B in batches and OURS in row.us and loops
        return min(loops) / row.us[OURS] if wanted else None

    return figure


def _three_layers(row: Row, times: Times) -> float | None:
    """The time of one layer over that of three, frozen."""
    one = times.get(replace(row.case, suite="", layers=1), {}).get(FROZEN)
    three = row.us.get(FROZEN) if row.case.suite == "serving_layers" and row.case.layers == 3 else None
    return one / three if one and three else None


def _floor(row: Row, times: Times) -> float | None:
    return row.floor_share if row.case.step_flops >= 1e6 and not row.case.busy else None


def _over_flashrnn(row: Row, times: Times) -> float | None:
    return row.us["flashrnn"] / row.us[OURS] if {"flashrnn", OURS} <= row.us.keys() else None


def _latency_floor(row: Row, times: Times) -> float | None:
    return row.floor_share if row.case.B <= 16 and row.case.H <= 1024 and row.case.mode != "cell" else None


TARGETS = [
    Target("T = 1, B ≤ 2, H ≤ 96", suite("tiny"), 8, stretch=20),
    Target("B = 1, T ≥ 28, H ≤ 200", suite("batch1"), 2.2, stretch=3.5),
    Target("B = 1, H 512…1024", suite("batch1_wide"), 1.4),
    Target("B 4…128, H 64…300", suite("batches"), 1.1, mean=1.4),
    Target("B ≥ 48, H ≥ 320", suite("batches_wide"), 1.05, mean=1.25),
    Target("training, B 1…128, H 64…512", suite("training"), 1.05, mean=1.5),
    Target("LSTMCell, B ≤ 8", suite("cell"), 3, stretch=8),
    *(
        Target(name, suite(name), 2, stretch=4)
        for name in ("packed", "projection", "float64", "bidirectional", "layers")
    ),
    Target("bfloat16 over torch's", suite("bfloat16"), 1.2, stretch=2),
    Target("bfloat16 over our float32, B = 1, H ≥ 512", _over_float32, 1.4, stretch=2),
    Target("workloads", suite(*WORKLOADS), 1.0, mean=2.6),
    Target("whole grid", _whole_grid, 1.0, mean=2, stretch=3),
    Target("over the best peer, inference", _best_peer, 0.95, mean=1.25, stretch=1.45),
    Target("frozen over the best peer, B 1 and 4", _over(FROZEN, suites=("serving",)), 1.0, mean=1.25),
    Target("frozen over our own call", _over(FROZEN, OURS, suites=("serving",)), 1.0, mean=1.15),
    Target("frozen: one layer over three, T = 1", _three_layers, 1 / 1.6),
    Target("int8 over our float32, frozen", _over(f"{FROZEN}-int8", FROZEN, suites=("serving_wide",)), 2.5),
    Target(
        "int8 over torch's and ONNX Runtime's",
        _over(f"{FROZEN}-int8", "torch-int8", "onnxruntime-int8", suites=("serving_wide",)),
        1.3,
    ),
    Target("bfloat16 over our float32, frozen", _over(f"{FROZEN}-bfloat16", FROZEN, suites=("serving_wide",)), 1.6),
    Target("options over the plain layer", _over_plain(*(OPTIONS.keys() - {"layer_norm"})), 0.85),
    Target("layer_norm over the plain layer", _over_plain("layer_norm"), 0.65),
    Target("options over a loop in torch, B ≤ 16", _over_loops(1, 16), 8),
    Target("options over a loop in torch, B = 64", _over_loops(64), 3),
    Target("speed kept with a busy neighbour", _undisturbed, 1 / 2.5, stretch=1 / 2.1),
    Target("share of the floor, ≥ 1 MFLOP a step", _floor, 0.75, stretch=0.9),
    Target("H to H + 1 without a cliff", _next_width, 1 / 1.3),
    Target("bfloat16, TF32: H ≤ 256, B ≤ 64", suite("gpu_small", mode="inference"), 4, device="cuda"),
    Target("bfloat16, TF32: H 512…1024, B ≤ 16", suite("gpu_mid", mode="inference"), 3, device="cuda"),
    Target("bfloat16, TF32: H = 1024, B = 64", suite("gpu_wide", mode="inference"), 2, device="cuda"),
    Target("bfloat16, TF32: B = 256, H ≥ 1024", suite("gpu_large"), 1.2, device="cuda"),
    Target("float16, where cuDNN is persistent", suite("gpu_persistent", mode="inference"), 1.5, device="cuda"),
    Target("the same, training", suite("gpu_persistent", mode="training"), 1.5, device="cuda"),
    Target("float16, H ≤ 128", suite("gpu_half"), 2, device="cuda"),
    Target("LSTMCell, B ≤ 64, H ≤ 1024", suite("gpu_cell"), 3, device="cuda"),
    Target("over FlashRNN, bfloat16, H = 768, B = 16", _over_flashrnn, 4, device="cuda"),
    Target("share of the floor, B ≤ 16, H ≤ 1024", _latency_floor, 0.6, device="cuda"),
]


@dataclass(frozen=True)
class Outcome:
    """What the rows of a target reached."""

    target: Target
    figures: list[tuple[Row, float]]

    @property
    def mean(self) -> float:
        return geomean(value for _, value in self.figures)

    @property
    def worst(self) -> tuple[Row, float]:
        return min(self.figures, key=lambda each: each[1])

    @property
    def met(self) -> bool:
        mean, minimum = self.target.mean, self.target.minimum
        return (mean is None or self.mean >= mean) and (minimum is None or self.worst[1] >= minimum)


def evaluate(rows: Iterable[Row]) -> list[Outcome]:
    """The targets that the rows say something about."""
    rows = list(rows)
    times = {replace(row.case, suite=""): row.us for row in rows}
    outcomes = []
    for target in TARGETS:
        own = (row for row in rows if row.case.device == target.device)
        figures = [(row, value) for row in own if (value := target.figure(row, times)) is not None]
        if figures:
            outcomes.append(Outcome(target, figures))
    return outcomes
