"""Draws results: `python benchmarks/plot.py RESULT.json... -o FOLDER`.

Draws what the rows allow: speedup_*.png (heat map over B and H), width_*.png (µs a step over H, with the floor),
cliff_*.png (neighbouring H) and roofline_*.png. A row of a later file takes the
place of the same row of an earlier one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from lstm_bench.cases import Case
from lstm_bench.ceilings import ITEM_BYTES, product_gflops
from lstm_bench.rows import BASE, OURS, Row, geomean, load
from matplotlib import pyplot as plt
from matplotlib.colors import TwoSlopeNorm

Meta = dict[str, Any]


def named(rows: Sequence[Row]) -> str:
    """What `plain` rows have in common, for titles."""
    case = rows[0].case
    return f"{case.dtype}, {case.mode}, {case.threads} thread{'s' * (case.threads > 1)}"


def plain(rows: Sequence[Row], mode: str, threads: int) -> list[Row]:
    """The float32 rows of one layer and direction, without a projection or a busy neighbour."""
    usual = {"mode": mode, "threads": threads, "dtype": "float32", "layers": 1, "directions": 1, "P": 0, "busy": 0}
    return [row for row in rows if all(getattr(row.case, name) == value for name, value in usual.items())]


def grouped(rows: Sequence[Row], *axes: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by their values on these axes."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row.case, name) for name in axes), []).append(row)
    return dict(sorted(groups.items()))


def speedup(rows: Sequence[Row]) -> Any:
    """Heat map of torch's time over ours; a cell is the geometric mean over its rows, of several T or I."""
    cells = grouped([row for row in rows if row.ratio is not None and row.case.suite != "cliff"], "B", "H")
    batches, widths = (sorted({key[n] for key in cells}) for n in (0, 1))
    if len(batches) < 2 or len(widths) < 2:
        return None
    ratios = np.full((len(batches), len(widths)), np.nan)
    for (B, H), members in cells.items():
        ratios[batches.index(B), widths.index(H)] = geomean(row.ratio for row in members if row.ratio is not None)
    averaged = [name for name in "TI" if any(len({getattr(row.case, name) for row in of}) > 1 for of in cells.values())]
    figure, axis = plt.subplots(figsize=(1.5 + 0.55 * len(widths), 1.8 + 0.45 * len(batches)))
    limit = max(1.0, float(np.nanmax(np.abs(np.log2(ratios)))))
    axis.imshow(np.log2(ratios), cmap="RdYlGn", norm=TwoSlopeNorm(0, -limit, limit), aspect="auto")
    for (b, h), ratio in np.ndenumerate(ratios):
        if not np.isnan(ratio):
            dark = abs(np.log2(ratio)) > 0.7 * limit
            axis.text(h, b, f"{ratio:.1f}", ha="center", va="center", fontsize=8, color="white" if dark else "black")
    mean = f"\neach the geometric mean over {' and '.join(averaged)}" if averaged else ""
    axis.set(xlabel="H", ylabel="B", title=f"Time of {BASE} / {OURS}: {named(rows)}{mean}")
    axis.set_xticks(range(len(widths)), widths, rotation=90)
    axis.set_yticks(range(len(batches)), batches)
    return figure


def over_width(groups: dict[tuple[Any, ...], list[Row]], least: int, log: bool) -> Any:
    """µs a step over H by arm, with the floor; one panel for each (B, …) that has `least` widths or more."""
    panels = {key: members for key, members in groups.items() if len({row.case.H for row in members}) >= least}
    if not panels:
        return None
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5 * columns, 4 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, ((B, T), members) in zip(axes.flat, panels.items(), strict=False):
        members = sorted(members, key=lambda row: row.case.H)
        for arm in dict.fromkeys(arm for row in members for arm in row.us):
            times = [(row.case.H, row.us[arm] / row.case.T) for row in members if arm in row.us]
            axis.plot(*zip(*times, strict=True), marker="o", markersize=3, label=arm)
        floors = [(row.case.H, row.floor_us / row.case.T) for row in members if row.floor_us is not None]
        if floors:
            axis.plot(*zip(*floors, strict=True), "k--", label="floor")
        axis.set(xlabel="H", ylabel="µs/step", title=f"B = {B}, T = {T}", yscale="log")
        if log:
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:.0f}")
        axis.grid(which="both", alpha=0.3)
        axis.legend()
    figure.suptitle(named(next(iter(panels.values()))))
    return figure


def roofline(rows: Sequence[Row], ceilings: Meta) -> Any:
    """GFLOP/s over flops per byte of weights, under the ceilings of so many threads.

    A row has the ceiling of the fastest cache that holds its weights, and so lies above the lines of slower ones.
    """
    rows = [row for row in rows if row.us]
    if not rows or ceilings is None:
        return None
    threads = rows[0].case.threads
    figure, axis = plt.subplots(figsize=(7, 5))
    peak = product_gflops(ceilings, "float32")
    for arm in dict.fromkeys(arm for row in rows for arm in row.us):
        points = []
        for row in rows:
            if arm in row.us:
                case = row.case
                weights = ITEM_BYTES[case.dtype] * 4 * case.H * (case.I / case.T + case.H)
                points.append((case.step_flops / weights, case.step_flops * case.T / row.us[arm] / 1e3))
        axis.plot(*zip(*points, strict=True), "o", markersize=3.5, label=arm)
    intensity = np.geomspace(0.25, 256, 200)
    for level in ceilings["levels"]:
        roof = np.minimum(peak, intensity * level["read_gbs"] * threads)
        axis.plot(intensity, roof, linewidth=1, label=f"{level['name']} {level['read_gbs']:.0f} GB/s a core")
    label = "flops per byte of weights read\n(a point's ceiling is that of the fastest cache that holds its weights)"
    axis.set(xscale="log", yscale="log", xlabel=label, ylabel="GFLOP/s")
    by_vectors = ceilings["fma_gflops"]["float32"]
    tiles = f" by tile registers, {by_vectors:.0f} by vectors" if peak > by_vectors else ""
    axis.set_title(f"{named(rows)}\npeak {peak:.0f} GFLOP/s{tiles}")
    axis.grid(which="both", alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="files that run.py --json wrote")
    parser.add_argument("-o", "--out", type=Path, default=Path("plots"), help="folder (default: plots)")
    options = parser.parse_args()
    meta: Meta = {}
    by_case: dict[Case, Row] = {}
    try:
        for path in options.results:
            meta, own = load(path)
            by_case |= {replace(row.case, suite=""): row for row in own}
        options.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        return 2
    rows = list(by_case.values())
    for mode, threads in grouped(rows, "mode", "threads"):
        chosen = plain(rows, mode, threads)
        cliff = [row for row in chosen if row.case.suite == "cliff"]
        rest = [row for row in chosen if row.case.suite != "cliff"]
        figures = {
            "speedup": speedup(chosen),
            "width": over_width(grouped([row for row in rest if row.case.I == row.case.H], "B", "T"), 3, log=True),
            "cliff": over_width(grouped(cliff, "B", "T"), 2, log=False),
            "roofline": roofline(chosen, meta["ceilings"].get(str(threads))) if mode == "inference" else None,
        }
        for name, figure in figures.items():
            if figure is not None:
                path = options.out / f"{name}_{mode}_threads{threads}.png"
                figure.tight_layout()
                figure.savefig(path, dpi=150)
                plt.close(figure)
                print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
