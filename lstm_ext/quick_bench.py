"""What `python -m lstm_ext bench` measures: a few layers beside torch's own, in seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .engines import choose, use_backend
from .functional import lstm
from .testing import Case, assert_all_close, make_inputs, run_layer, run_oracle

SIZES = ((1, 1, 32), (50, 1, 64), (50, 1, 256), (50, 16, 128), (50, 64, 256))  # T, B, I = H
ROUNDS = 7  # of which the median counts; fewer, but three, where they take longer than MOST_SECONDS
SECONDS = 0.02  # of one way in a round
MOST_SECONDS = 1.0
UNSTEADY = 1.5  # where the slowest round takes so many times the fastest

Call = Callable[[], object]


class Row(NamedTuple):
    """One layer, in float32: whether it agrees with float64, and if so the seconds of a call."""

    case: Case
    work: str
    agrees: bool
    ours: float
    theirs: float
    steady: bool


def count(torch: Any) -> int:
    """How many rows there are."""
    return len(SIZES) * (1 if torch is None else 2)


def rows(torch: Any, device: str) -> Iterator[Row]:
    """Each row as it is measured; without torch theirs is `lstm_ext` in NumPy, and nothing is trained."""
    for T, B, H in SIZES:
        case = Case(T, B, H, H)
        agrees = _agrees(case, device if torch is not None else "")
        for work, ours, theirs in _calls(case) if torch is None else _torch_calls(case, torch, device):
            yield Row(case, work, agrees, *(_measure(ours, theirs) if agrees else (0.0, 0.0, True)))


def _agrees(case: Case, device: str) -> bool:
    """Whether all outputs and gradients are as near to float64 as they must be; device "" is that of NumPy arrays."""
    inputs = make_inputs(case, "float32")
    ours = inputs.to_torch("float32").map(lambda a: a.to(device)) if device else inputs
    try:
        actual = run_layer(choose(device or "cpu", "float32").engine, ours)
        assert_all_close(actual, run_oracle(inputs), case, "float32")
    except AssertionError:
        return False
    return True


def _calls(case: Case) -> Iterator[tuple[str, Call, Call]]:
    inputs = make_inputs(case, "float32")

    def ours() -> object:
        return lstm(inputs.x, None, *inputs.weights)

    def in_numpy() -> object:
        with use_backend("numpy"):
            return ours()

    yield "inference", ours, in_numpy


def _torch_calls(case: Case, torch: Any, device: str) -> Iterator[tuple[str, Call, Call]]:
    from .nn import LSTM

    stock = torch.nn.LSTM(case.I, case.H, device=device)
    ours = LSTM(case.I, case.H, device=device)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(case.T, case.B, case.I, device=device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def infer(module: Any) -> Call:
        def call() -> None:
            with torch.no_grad():
                module(x)
            wait()

        return call

    def train(module: Any) -> Call:
        def call() -> None:
            module(x)[0].sum().backward()
            wait()

        return call

    for work, made in (("inference", infer), ("training", train)):
        yield work, made(ours), made(stock)


def _measure(ours: Call, theirs: Call) -> tuple[float, float, bool]:
    """The median seconds of each, in turn, as what else the machine does meets both then; whether they are steady."""
    calls, end = (ours, theirs), time.perf_counter() + MOST_SECONDS
    times: list[list[float]] = []
    for call in calls:
        call()  # the first one is slower
    repeats = [1 + int(SECONDS / _timed(call, 1)) for call in calls]
    while len(times) < ROUNDS and (len(times) < 3 or time.perf_counter() < end):
        times.append([_timed(call, n) for call, n in zip(calls, repeats, strict=True)])
    of_ours, of_theirs = zip(*times, strict=True)
    steady = all(max(each) < UNSTEADY * min(each) for each in (of_ours, of_theirs))
    return statistics.median(of_ours), statistics.median(of_theirs), steady


def _timed(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats
