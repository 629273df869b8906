"""What more threads than this machine has would do: the schedule of the CPU's plans, simulated.

    python benchmarks/scaling.py [--threads 2 4 8 16 32] [--seconds S]

Measured here, on one thread: a whole call, and what a call takes that does nothing. Of the rest, the largest share that
a member of a team has, by rows of the batch or by panels of units as the plan of so many threads says, decides how long
a step takes:

    call + T (floor of the largest share / efficiency on one thread + barrier),    1 / efficiency = measured / floor

The floor is that of ceilings.py: weights of so few units may lie in a nearer cache. A barrier of n is taken for n / 2
times that of two, which was measured: its cache line passes from member to member. Assumed, too, is that all cores
read caches and clock as fast as one does alone. Where this machine has so many cores, what was measured stands beside.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from math import ceil

import torch
from lstm_bench.cases import Case, grid, usable_cores
from lstm_bench.ceilings import GATE_FLOPS, Ceilings, Meter, product_gflops, read_us
from lstm_bench.report import make_console, new_table, show
from lstm_bench.timing import time_cpu
from tqdm import tqdm

import lstm_ext

CASES = [
    *grid("scaling", "inference", T=50, B=1, H=[128, 512, 1024]),
    *grid("scaling", "inference", T=50, B=[16, 64], H=[128, 256]),
    *grid("scaling", "inference", T=20, B=[64, 256], H=512),
]
NOTHING = Case("scaling", "inference", T=1, B=1, I=8, H=8)
LANES = {"avx2": 8, "baseline": 4}  # of a vector; 16 with AVX-512


def largest_share(case: Case, threads: int) -> tuple[int, int, int]:
    """Members of the team, and rows and units that one of them has at most."""
    plan = lstm_ext.plan(case.T, case.B, case.H, input_size=case.I, num_threads=threads, device="cpu")
    lanes, tile_rows = LANES.get(str(lstm_ext.build_info()["simd"]), 16), 16 if plan.engine == "tiles" else 6
    n = plan.threads
    if plan.by_rows:
        tiles = ceil(case.B / (tile_rows * n)) * n
        of_tile = [last - first for first, last in pairwise(tile * case.B // tiles for tile in range(tiles + 1))]
        return n, max(sum(of_tile[rank::n]) for rank in range(n)), case.H
    return n, case.B, min(case.H, ceil(ceil(case.H / lanes) / n) * lanes)


def share_us(case: Case, rows: int, units: int, ceilings: Ceilings) -> float:
    """The floor of a step of one member [µs]."""
    peak, recurrent, inputs = 1e3 * product_gflops(ceilings, case.dtype), 4 * units * case.width, 4 * units * case.I
    held = 4 * recurrent
    return (
        max(read_us(ceilings, held, held), 2 * rows * recurrent / peak)
        + max(read_us(ceilings, held, 4 * inputs / case.T), 2 * rows * inputs / peak)
        + GATE_FLOPS * rows * units / peak
    )


def measured_us(case: Case, seconds: float) -> float:
    """A call as it is."""
    lstm, x = lstm_ext.LSTM(case.I, case.H), torch.randn(case.T, case.B, case.I)

    def call() -> None:
        with torch.no_grad():
            lstm(x)

    return time_cpu({"lstm_ext": call}, case.threads, seconds)["lstm_ext"][0]


def simulation(case: Case, alone: float, nothing: float, meter: Ceilings) -> Callable[[int], tuple[int, float]]:
    """Of a number of threads: how many are used, and µs of a call."""
    ceilings = meter["1"]
    efficiency = case.T * share_us(case, case.B, case.H, ceilings) / (alone - nothing)

    def simulated(threads: int) -> tuple[int, float]:
        n, rows, units = largest_share(case, threads)
        waits = n > 1 and rows == case.B
        barrier = n / 2 * meter["2"]["barrier_us"] if waits else 0.0
        return n, nothing + case.T * (share_us(case, rows, units, ceilings) / efficiency + barrier)

    return simulated


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", nargs="+", type=int, default=[2, 4, 8, 16, 32], help="default: 2 4 8 16 32")
    parser.add_argument("--seconds", type=float, default=0.5, help="measured of each case (default: 0.5)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, simulates, prints."""
    given = parse(arguments)
    cores = len(usable_cores())
    meter = Meter([1, 2])
    if meter.reason:
        raise SystemExit(f"ceilings: {meter.reason}")
    meter.measure()
    nothing = measured_us(NOTHING, given.seconds)
    table = new_table("Times as fast as on one thread: simulated (measured), by how many threads", "T", "B", "H", "µs")
    for threads in given.threads:
        table.add_column(str(threads), justify="right")
    for case in tqdm(CASES, leave=False):
        alone = measured_us(case, given.seconds)
        simulated = simulation(case, alone, nothing, meter.best)
        cells = []
        for threads in given.threads:
            n, us = simulated(threads)
            seen = alone / measured_us(replace(case, threads=threads), given.seconds) if threads <= cores else None
            used = "" if n == threads else f" by {n}"
            cells.append(f"{alone / us:.1f}{used}" + ("" if seen is None else f" ({seen:.1f})"))
        table.add_row(*map(str, (case.T, case.B, case.H)), f"{alone:.0f}", *cells)
    show(make_console(), table)


if __name__ == "__main__":
    main()
