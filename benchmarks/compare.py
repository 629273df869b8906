"""Compares two results, or two commits: `python benchmarks/compare.py BEFORE AFTER`.

BEFORE and AFTER are files that run.py --json wrote on one machine; or commits, "." for the working tree. Commits are
built (kept under --builds for the next time) and timed in turn in two processes, at each SIMD level that this machine
has. Examples:

  python benchmarks/compare.py before.json after.json
  python benchmarks/compare.py HEAD~1 .                       # the rows of the preset quick
  python benchmarks/compare.py v0.1 HEAD --preset full --suite batches training --levels avx2 --threads 1

A change stands out where it is more than both the noise, twice the two interquartile ranges taken together, and a
threshold. Exit status: 0; 1 if anything became slower by that much, or was right before and is wrong now; 2 if there is
nothing to compare.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import hypot
from pathlib import Path

from lstm_bench import turns
from lstm_bench.cases import MODES, PRESETS, SUITES, Case, on, select, usable_cores
from lstm_bench.report import case_cells, case_columns, make_console, new_table, number, show
from lstm_bench.rows import OURS, Row, geomean, load, save
from rich.console import Console
from tqdm import tqdm

import lstm_ext

NOISE = 2
SIDES = ("before", "after")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="a file, or a commit")
    parser.add_argument("after", help="another one")
    parser.add_argument("--threshold", type=float, default=0.05, help="the least change that counts (default: 0.05)")
    parser.add_argument("--all", action="store_true", help="show the rows that did not change, too")
    parser.add_argument("--arm", default=OURS, help=f"of files; default: {OURS}")
    commits = parser.add_argument_group("of commits")
    levels = lstm_ext.build_info().get("simd_available", [])
    commits.add_argument("--levels", nargs="+", choices=levels, default=levels, help=f"default: {' '.join(levels)}")
    cpu_presets = [name for name in PRESETS if not name.startswith("gpu")]
    commits.add_argument("--preset", choices=cpu_presets, default="quick", help="the rows (default: quick)")
    commits.add_argument("--suite", nargs="+", choices=SUITES, metavar="SUITE", help="parts of the preset")
    commits.add_argument("--mode", nargs="+", choices=MODES, metavar="MODE", help=", ".join(MODES))
    threads = sorted({1, len(usable_cores())})
    commits.add_argument("--threads", nargs="+", type=int, default=threads, help="default: 1 and all cores")
    commits.add_argument("--seconds", type=float, default=0.3, help="measured of each row and commit (default: 0.3)")
    commits.add_argument("--builds", type=Path, default=turns.ROOT / "build" / "commits", help="where they are kept")
    commits.add_argument("--json", type=Path, metavar="FOLDER", help="where a file for each level is written")
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


def show_changes(
    console: Console, what: str, rows_before: Sequence[Row], rows_after: Sequence[Row], options: argparse.Namespace
) -> int:
    """The table of what changed, and a summary; the exit status."""
    arm, before, after = options.arm, by_case(rows_before), by_case(rows_after)
    common = [case for case in before if case in after and arm in before[case].us]
    if not common:
        console.print(f"No row has a time of {what} in both.")
        return 2
    verdicts = {case: verdict(before[case], after[case], arm, options.threshold) for case in common}
    shown = [before[case] for case in common if options.all or verdicts[case]]
    title, axes = case_columns(shown) if shown else ("", [])
    table = new_table(f"{what}, {title}", *axes, "before µs", "after µs", "change", "verdict")
    colours = {"wrong": "bold red", "gone": "yellow", "slower": "red", "faster": "green", "": "dim"}
    for row in shown:
        case = replace(row.case, suite="")
        old, new = row.us[arm], after[case].us.get(arm)
        change = "–" if new is None else f"{new / old - 1:+.1%}"
        cells = [*case_cells(row, axes), number(old), number(new), change, verdicts[case]]
        table.add_row(*cells, style=colours[verdicts[case]])
    if shown:
        show(console, table)
    both = [case for case in common if verdicts[case] != "gone" and arm in after[case].us]
    counts = Counter(verdicts.values())
    said = ", ".join(f"{counts[name]} {name}" for name in ("slower", "wrong", "gone", "faster"))
    console.print(f"{what}: {said} of {len(common)} rows")
    if both:
        mean = geomean(after[case].us[arm] / before[case].us[arm] for case in both)
        console.print(f"time after / before, geometric mean: {mean:.3f}")
    for case in common:
        if verdicts[case] == "wrong":
            console.print(f"{case}: {after[case].errors[arm]}", style="red", markup=False)
    return 1 if counts["slower"] or counts["wrong"] else 0


def compare_files(console: Console, options: argparse.Namespace) -> int:
    (meta_before, rows_before), (meta_after, rows_after) = load(Path(options.before)), load(Path(options.after))
    for key in ("cpu", "gpu", "cores"):
        if meta_before[key] != meta_after[key]:
            console.print(f"Not the same machine: {key} {meta_before[key]} and {meta_after[key]}", style="yellow")
    return show_changes(console, options.arm, rows_before, rows_after, options)


def one_side(row: Row, side: str) -> Row:
    """The times of one of the two, as those of ours."""
    us, spread, errors = ({OURS: each[side]} if side in each else {} for each in (row.us, row.spread, row.errors))
    return replace(row, us=us, spread=spread, errors=errors)


def compare_commits(console: Console, options: argparse.Namespace) -> int:
    commits = [turns.commit_of(name) for name in (options.before, options.after)]
    options.arm, packages = OURS, []
    for commit in commits:
        console.print(f"building {commit}", style="dim")
        packages.append(turns.build(commit, options.builds))
    axes = {name: axis for name in ("suite", "mode") if (axis := getattr(options, name)) is not None}
    cases = [case for case in on(select(options.preset, axes), "cpu", options.threads) if not case.busy]
    status = 0
    for level in options.levels:
        with turns.workers(packages, level) as workers:
            by_name = dict(zip(SIDES, workers, strict=True))
            bar = tqdm(cases, unit="row", desc=level, dynamic_ncols=True, disable=None)
            rows = [turns.measure(case, by_name, options.seconds) for case in bar]
        if options.json:
            options.json.mkdir(parents=True, exist_ok=True)
            meta = {"simd": level, "commits": commits, "platform": platform.platform(), "command": sys.argv[1:]}
            save(options.json / f"{level}.json", meta, rows)
        sides = [[one_side(row, side) for row in rows] for side in SIDES]
        for row in rows:
            if "before" in row.errors:
                console.print(f"{row.case}: before: {row.errors['before']}", style="dim", markup=False)
        status = max(status, show_changes(console, level, *sides, options))
    return status


def main() -> int:
    options, console = parse(), make_console()
    files = [Path(name).suffix == ".json" for name in (options.before, options.after)]
    try:
        if all(files):
            return compare_files(console, options)
        if any(files):
            raise ValueError("expected two files or two commits, got one of each")
        return compare_commits(console, options)
    except ValueError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
