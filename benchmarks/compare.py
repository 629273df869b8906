"""Compares the results of two runs: `python benchmarks/compare.py BEFORE.json AFTER.json`.

A change stands out where it is more than both the noise, twice the two interquartile ranges taken together, and a
threshold. Exit status: 0; 1 if anything became slower by that much, or was right before and is wrong now; 2 if there is
nothing to compare.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from math import hypot
from pathlib import Path

from lstm_bench.cases import Case
from lstm_bench.report import case_cells, case_columns, make_console, new_table, number, show
from lstm_bench.rows import OURS, Row, geomean, load

NOISE = 2


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a file that run.py --json wrote")
    parser.add_argument("after", type=Path, help="another one, of the same machine")
    parser.add_argument("--arm", default=OURS, help=f"default: {OURS}")
    parser.add_argument("--threshold", type=float, default=0.05, help="the least change that counts (default: 0.05)")
    parser.add_argument("--all", action="store_true", help="show the rows that did not change, too")
    return parser.parse_args(arguments)


def by_case(rows: Sequence[Row]) -> dict[Case, Row]:
    return {replace(row.case, suite=""): row for row in rows}


def verdict(before: Row, after: Row, arm: str, threshold: float) -> str:
    """What became of the arm's time in a row: wrong, gone, slower, faster; or empty where nothing did."""
    if arm not in after.us:
        return "wrong" if arm in after.errors else "gone"
    change = after.us[arm] - before.us[arm]
    noise = NOISE * hypot(before.spread[arm], after.spread[arm])
    if abs(change) <= max(noise, threshold * before.us[arm]):
        return ""
    return "slower" if change > 0 else "faster"


def main() -> int:
    options, console = parse(), make_console()
    try:
        (meta_before, rows_before), (meta_after, rows_after) = load(options.before), load(options.after)
    except ValueError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    for key in ("cpu", "gpu", "cores"):
        if meta_before[key] != meta_after[key]:
            console.print(f"Not the same machine: {key} {meta_before[key]} and {meta_after[key]}", style="yellow")
    before, after = by_case(rows_before), by_case(rows_after)
    common = [case for case in before if case in after and options.arm in before[case].us]
    if not common:
        console.print(f"No row has a time of {options.arm} in both.")
        return 2
    verdicts = {case: verdict(before[case], after[case], options.arm, options.threshold) for case in common}
    shown = [before[case] for case in common if options.all or verdicts[case]]
    title, axes = case_columns(shown) if shown else ("", [])
    table = new_table(f"{options.arm}, {title}", *axes, "before µs", "after µs", "change", "verdict")
    colours = {"wrong": "bold red", "gone": "yellow", "slower": "red", "faster": "green", "": "dim"}
    for row in shown:
        case = replace(row.case, suite="")
        old, new = row.us[options.arm], after[case].us.get(options.arm)
        change = "–" if new is None else f"{new / old - 1:+.1%}"
        cells = [*case_cells(row, axes), number(old), number(new), change, verdicts[case]]
        table.add_row(*cells, style=colours[verdicts[case]])
    if shown:
        show(console, table)
    changes = [
        after[case].us[options.arm] / before[case].us[options.arm]
        for case in common
        if verdicts[case] != "gone" and options.arm in after[case].us
    ]
    counts = {name: sum(each == name for each in verdicts.values()) for name in ("slower", "wrong", "gone", "faster")}
    console.print(", ".join(f"{count} {name}" for name, count in counts.items()) + f" of {len(common)} rows")
    if changes:
        console.print(f"time after / before, geometric mean: {geomean(changes):.3f}")
    return 1 if counts["slower"] or counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
