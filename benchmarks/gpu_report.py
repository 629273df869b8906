#!/usr/bin/env python3
"""What the CUDA kernels do on this machine's NVIDIA GPU: builds them, tests them, and times them against others.

Needs torch for CUDA, in the environment of the Python that runs this, and nvcc. Stages run one after the other and
share a time limit; one that fails, or whose time is over, does not stop the next. Each leaves its log and results in
the folder as it ends, and stages.json tells how all went; the *.json of benchmarks are what compare.py reads.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lstm_bench import gpu_stages, stages
from lstm_bench.gpu_stages import Machine
from lstm_bench.stages import Record, Stage

LIMIT, QUICK_LIMIT = 580, 175  # s
LAST = 15  # s of them, for a stage that does not end by itself and for the tables

EPILOG = """
Exit status: 0; 1 if a stage failed; 2 without a GPU, unless --only names
stages that need none; 130 after an interrupt. Examples:

  python benchmarks/gpu_report.py                             # under 10 minutes
  python benchmarks/gpu_report.py --rest                      # what had no time
  python benchmarks/gpu_report.py --quick                     # under 3
  python benchmarks/gpu_report.py --only stock --limit 3600   # all baselines
"""

StagesOf = Callable[[argparse.Namespace, Machine, Path], list[Stage]]

# ---- What is told ----------------------------------------------------------------------------------------------------


class Bar:
    """tqdm's, once it is there; lines alone before, and where it is not."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names, self._done, self._bar = names, 0, None

    def _find(self) -> Any:
        if self._bar is None and importlib.util.find_spec("tqdm"):
            options = {"initial": self._done, "unit": "stage", "dynamic_ncols": True, "disable": None, "leave": False}
            self._bar = importlib.import_module("tqdm").tqdm(total=len(self._names), **options)
        return self._bar

    def tick(self) -> None:
        if (bar := self._find()) is not None:
            bar.set_postfix_str(self._names[self._done])

    def advance(self, record: Record) -> None:
        self._done += 1
        text = f"{record.name:18} {record.outcome:11} {record.seconds:5.0f} s  {explain(record)}"
        if (bar := self._find()) is None:
            print(text, flush=True)
            return
        bar.write(text)
        bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def explain(record: Record) -> str:
    return "; ".join(part for part in (record.why, record.said) if part)[:110]


COLOURS = {"ok": "green", "FAILED": "red", "interrupted": "red", "left out": "dim"}


def show_table(records: Sequence[Record]) -> None:
    """With rich; where there is none, the lines that stand above have to do."""
    if not importlib.util.find_spec("rich"):
        print("no table: rich is not installed")
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("stage", "outcome", "s", "what it says")
    for record in records:
        outcome = f"[{COLOURS.get(record.outcome, 'yellow')}]{record.outcome}[/]"
        table.add_row(record.name, outcome, f"{record.seconds:.0f}", escape(explain(record)))
    console = Console()
    (console if console.is_terminal else Console(width=150)).print(table)


def show_results(records: Sequence[Record], out: Path, environment: dict[str, str]) -> None:
    """Tables of what was measured, by a process that may import what was built."""
    ran = [record.name for record in records if record.commands]
    names = [name for name in ran if any((out / f"{name}.{kind}").exists() for kind in ("json", "jsonl"))]
    if not names:
        return
    command = [sys.executable, "-m", "lstm_bench.digest", *names]
    try:
        subprocess.run(command, cwd=out, env=environment, timeout=LAST)
    except subprocess.TimeoutExpired:
        print("The tables of results took too long: the files have them.")


# ---- The program -----------------------------------------------------------------------------------------------------


def seconds_of(text: str) -> float:
    """For argparse: a time."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds, more than 0, got {text!r}")
    return seconds


def folder(text: str) -> Path:
    """For argparse: a folder that exists."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, got {text!r}")
    return Path(text).resolve()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer stages, tests and rows")
    parser.add_argument(
        "--limit", type=seconds_of, metavar="SECONDS", help=f"for all (default: {LIMIT}; {QUICK_LIMIT} with --quick)"
    )
    parser.add_argument(
        "--wheels", type=folder, metavar="FOLDER", help="where tools that are missing are taken from, and nowhere else"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_report"), help="for logs and results (gpu_report)")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these alone, on the package as it was built last")
    parser.add_argument(
        "--rest", action="store_true", help="those alone for which earlier runs into the folder had no time"
    )
    parser.add_argument("--list", action="store_true", help="print the stages and end")
    parser.add_argument("--dry-run", action="store_true", help="print their commands and end")
    return parser.parse_args(arguments)


def choose(named: Sequence[Stage], options: argparse.Namespace) -> list[Stage]:
    """Those asked for, in their own order.

    Raises:
        ValueError: one is unknown.
    """
    names = [stage.name for stage in named]
    if unknown := set(options.only or ()) - set(names):
        raise ValueError(f"--only: expected names of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    before = stages.kept(options.out) if options.rest else {}
    done = {name for name, record in before.items() if stages.had_time(record)}
    return [stage for stage in named if stage.name in (options.only or names) and stage.name not in done]


def describe(stage: Stage, commands: bool) -> None:
    """A line, and the stage's commands."""
    print(f"{stage.name:18} {stage.seconds:4.0f} s  {stage.purpose}{stage.left_out and f' ({stage.left_out})'}")
    settings = [f"{name}={value}" for name, value in stage.environment.items()]
    for command in stage.commands(stage.seconds) if commands and not stage.left_out else ():
        print("   ", shlex.join([*settings, *command]))


def run(chosen: Sequence[Stage], out: Path, end: float, environment: dict[str, str], machine: Machine) -> list[Record]:
    """Runs them, tells each outcome and keeps it, as it is there."""
    meta = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "torch": machine.torch,
        "gpus": machine.gpus,
        "command": sys.argv,
    }
    records: list[Record] = []
    bar = Bar([stage.name for stage in chosen])
    for record in stages.run_stages(chosen, out, end, environment, bar.tick):
        records.append(record)
        stages.keep(out, meta, records)
        importlib.invalidate_caches()  # tools may be there now
        bar.advance(record)
    bar.close()
    return records


def main(arguments: Sequence[str] | None = None, stages_of: StagesOf = gpu_stages.all_stages) -> int:
    start, options = time.monotonic(), parse(arguments)
    limit, out = options.limit or (QUICK_LIMIT if options.quick else LIMIT), options.out.resolve()
    for number in (signal.SIGINT, signal.SIGTERM):  # of which stages that run in background would ignore the first
        signal.signal(number, signal.default_int_handler)
    environment = gpu_stages.make_environment(out)
    os.environ["PATH"], sys.path[1:1] = environment["PATH"], [str(out / "tools")]
    machine = gpu_stages.probe()
    try:
        chosen = choose(stages_of(options, machine, out), options)
    except ValueError as error:
        print(f"gpu_report.py: {error}", file=sys.stderr)
        return 2
    if options.list or options.dry_run:
        for stage in chosen:
            describe(stage, options.dry_run)
        return 0
    if not machine.gpus and any(stage.needs_gpu for stage in chosen):
        rest = ", ".join(stage.name for stage in stages_of(options, machine, out) if not stage.needs_gpu)
        print(f"gpu_report.py: no NVIDIA GPU: {machine.why_none}; without one --only takes {rest}", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    records = run(chosen, out, start + limit - LAST, environment, machine)
    show_results(records, out, environment)
    show_table(records)
    print(f"Logs and results: {out} ({time.monotonic() - start:.0f} s in all)")
    if records and records[-1].outcome == "interrupted":
        return 130
    return int(any(record.failed for record in records))


if __name__ == "__main__":
    sys.exit(main())
