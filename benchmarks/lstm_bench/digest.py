"""Tables of what stages of gpu_report.py left in this folder: `python -m lstm_bench.digest STAGE...`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

try:
    from rich.console import Console

    from . import pytest_log, report, rows
except ImportError as error:  # of rich, or of a package that could not be built
    sys.exit(f"No tables of results: {error}")

MOST = 12  # failed tests of a stage
WIDTH = 130
# Of rows; the baselines have hundreds, which their log has.
TABLES: dict[str, list[Callable[[Sequence[rows.Row]], Any]]] = {
    "strategies": [report.strategies],
    "benchmarks": [report.results, report.targets],
    "accuracy": [report.deviations],
    "flashrnn": [report.peers],
    "cpu": [report.results],
}


def show_tests(console: Console, name: str, path: Path) -> None:
    """Those that failed, each with its error."""
    failed = pytest_log.wrong(pytest_log.read(path)[0])
    for test in failed[:MOST]:
        lines = test.text.strip().splitlines() or [""]
        errors = [line for line in lines if line.startswith("E ")] or lines[-1:]
        text = f"{name}: {test.name.rpartition('::')[2]}: {test.fate}: {errors[0][:100]}"
        console.print(text.removesuffix(": "), markup=False, highlight=False)
    if len(failed) > MOST:
        console.print(f"{name}: and {len(failed) - MOST} more: {path.name}")


def show_ceilings(console: Console, path: Path) -> None:
    table = report.new_table("Ceilings of this GPU", "work", "figure")
    for name, value in json.loads(path.read_text(encoding="utf-8"))["ceilings"].items():
        table.add_row(name, report.number(value))
    report.show(console, table, WIDTH)


def show_rows(console: Console, name: str, path: Path) -> None:
    done = rows.load(path)[1]
    if not done:
        console.print(f"{name}: no row was measured.")
        return
    for make in TABLES[name]:
        if table := make(done):
            report.show(console, table, WIDTH)
    report.notes(console, done)


def main(names: Sequence[str]) -> int:
    console = report.make_console()
    for name in names:
        results, tests = Path(f"{name}.json"), Path(f"{name}.jsonl")
        if tests.exists():
            show_tests(console, name, tests)
        if results.exists() and name == "ceilings":
            show_ceilings(console, results)
        elif results.exists() and name in TABLES:
            show_rows(console, name, results)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
