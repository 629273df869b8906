"""Times LSTMs against each other on this machine, and prints how many times as long the others take."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lstm_bench import ceilings, report, rows
from lstm_bench.arms import ARMS, SERVED, STRATEGIES, USUAL, Arm, problem_on_gpu
from lstm_bench.cases import (
    AXES,
    CELLS,
    DTYPES,
    GPU_SUITES,
    LATENCY,
    MODES,
    OPTIONS,
    PRESETS,
    SERVING,
    SUITES,
    WORKLOADS,
    Case,
    custom,
    on,
    select,
    usable_cores,
)
from lstm_bench.loops import LOOP_ARMS
from lstm_bench.oracle import SEED, check, deviations, problem
from lstm_bench.rows import OURS, Row
from lstm_bench.timing import kernels, latencies, measure, once
from tqdm import tqdm

import lstm_ext

ALL_ARMS = ARMS | LOOP_ARMS

SECONDS = {
    "quick": 0.1,
    "workloads": 0.3,
    "full": 0.3,
    "serving": 0.2,
    "options": 0.1,
    "gpu-quick": 0.1,
    "gpu": 0.2,
    "gpu-strategies": 0.1,
    "gpu-accuracy": 0.01,
    "gpu-stock": 0.1,
}

EPILOG = """
Without a preset, axes span a grid of their own, where an axis left out has
one value. With a preset they pick those of its rows. Each row is checked
against float64 before it is timed, and written as it is done. An interrupt
leaves the rows done so far, and exits with 130. Examples:

  python benchmarks/run.py                                   # quick: a minute
  python benchmarks/run.py --preset workloads                # what people run
  python benchmarks/run.py --preset serving                  # frozen
  python benchmarks/run.py --preset options                  # of a cell
  python benchmarks/run.py --preset full --json result.json  # half an hour
  python benchmarks/run.py --preset full --suite training cell --threads 1
  python benchmarks/run.py --batch 1 8 --hidden 64 65 --mode training
  python benchmarks/run.py --preset gpu --json result.json   # on a GPU
  python benchmarks/run.py --preset gpu-strategies           # each forced
"""
CEILINGS_EVERY = 60  # s
BUSY = 0.1  # of the cores, taken by others


def json_path(text: str) -> Path:
    """For argparse: where a file can be written."""
    path = Path(text)
    target = path if path.exists() else path.absolute().parent
    if path.is_dir() or not target.exists() or not os.access(target, os.W_OK):
        raise argparse.ArgumentTypeError(f"expected a file that can be written, got {text!r}")
    return path


def at_least(least: int) -> Callable[[str], int]:
    """For argparse: whole numbers from there on."""

    def parse_number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} on, got {text!r}")
        return int(text)

    return parse_number


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    cores = len(usable_cores())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, help="a list of rows (quick, unless an axis is given)")
    parser.add_argument(
        "--suite",
        nargs="+",
        choices=[*SUITES, *SERVING, *CELLS, *GPU_SUITES, *WORKLOADS],
        metavar="SUITE",
        help=f"parts of the preset: {', '.join([*SUITES, *SERVING, *CELLS, *GPU_SUITES])}; or the name of a workload",
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: cpu, but cuda for the presets whose names begin with gpu"
    )
    parser.add_argument(
        "--threads",
        nargs="+",
        type=at_least(1),
        default=sorted({1, cores}),
        metavar="N",
        help="default: 1 and all cores",
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, metavar="DTYPE", help=", ".join(DTYPES))
    parser.add_argument("--mode", nargs="+", choices=MODES, metavar="MODE", help=", ".join(MODES))
    sizes = {"batch": "B", "steps": "T", "input": "I", "hidden": "H", "proj": "P", "layers": "layers"}
    for name, axis in sizes.items():
        least = 0 if axis == "P" else 1
        parser.add_argument(f"--{name}", dest=axis, nargs="+", type=at_least(least), metavar=axis[0].upper())
    parser.add_argument("--directions", nargs="+", type=int, choices=[1, 2])
    parser.add_argument("--busy", nargs="+", type=at_least(0), metavar="N", help="cores that other processes keep busy")
    parser.add_argument("--options", nargs="+", choices=["", *OPTIONS], metavar="OPTIONS", help=", ".join(OPTIONS))
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=ALL_ARMS,
        metavar="ARM",
        help=f"default: those installed of {', '.join(USUAL)}; for --preset gpu-strategies {', '.join(STRATEGIES)}; "
        f"with --preset serving {', '.join(SERVED)} as well; with --preset options lstm_ext, {', '.join(LOOP_ARMS)}",
    )
    presets = ", ".join(f"{seconds} with {name}" for name, seconds in SECONDS.items())
    parser.add_argument("--seconds", type=float, help=f"measured for each arm of each row (default: {presets})")
    parser.add_argument(
        "--calls", type=at_least(1), default=100_000, help="of each arm where they are timed one by one (100000)"
    )
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="no further row begins after these (no limit)")
    parser.add_argument("--json", type=json_path, metavar="FILE", help="where the results are written")
    parser.add_argument("--targets", action="store_true", help="show what this project wants of its kernels, too")
    parser.add_argument("--errors", action="store_true", help="show how far from float64 the arms are, too")
    parser.add_argument(
        "--once",
        action="store_true",
        help="on a GPU: instead of timing, call each arm once between cudaProfilerStart and -Stop",
    )
    options = parser.parse_args(arguments)
    if options.suite and not options.preset:
        presets = {"gpu": GPU_SUITES, "workloads": WORKLOADS, "serving": SERVING, "options": CELLS, "full": SUITES}
        options.preset = next(name for name, suites in presets.items() if options.suite[0] in suites)
    options.device = options.device or ("cuda" if (options.preset or "").startswith("gpu") else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    if options.once and options.device != "cuda":
        parser.error("--once: expected with --device cuda")
    usual = ["lstm_ext", *STRATEGIES] if options.preset == "gpu-strategies" else list(USUAL)
    usual += SERVED if options.preset == "serving" else []
    usual = [OURS, *LOOP_ARMS] if options.preset == "options" else usual
    options.arms = options.arms or usual
    return options


def choose_cases(options: argparse.Namespace) -> list[Case]:
    axes = {name: axis for name in AXES if (axis := getattr(options, name)) is not None}
    cases = select(options.preset or "quick", axes) if options.preset or not axes else custom(axes)
    return list(on(cases, options.device, options.threads))


def describe_machine() -> dict[str, Any]:
    """The part of `meta` that does not depend on the run."""
    described = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(": ")[2] for line in described.splitlines() if line.startswith("model name")]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "cpu": models[0] if models else platform.machine(),
        "cores": len(usable_cores()),
        "load_average": os.getloadavg(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "build": lstm_ext.build_info(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


class OtherProcesses:
    """How much of the usable cores other processes have taken since this was made."""

    def __init__(self) -> None:
        self._start = self._cores(), self._own()

    @staticmethod
    def _cores() -> tuple[float, float]:
        """Seconds of the usable cores, all and those in which they ran something."""
        if not Path("/proc/stat").exists():
            return 0.0, 0.0
        names = {f"cpu{core}" for core in usable_cores()}
        lines = (line.split() for line in Path("/proc/stat").read_text().splitlines())
        ticks = [[float(each) for each in line[1:9]] for line in lines if line and line[0] in names]
        total, idle = sum(map(sum, ticks)), sum(each[3] + each[4] for each in ticks)  # idle, and waiting for a disk
        return total / os.sysconf("SC_CLK_TCK"), (total - idle) / os.sysconf("SC_CLK_TCK")

    @staticmethod
    def _own() -> float:
        return sum(os.times()[:4])  # with children that have ended

    def share(self) -> float:
        (all_before, ran_before), own_before = self._start
        (all_now, ran_now), own_now = self._cores(), self._own()
        passed = all_now - all_before
        return max(0.0, ran_now - ran_before - (own_now - own_before)) / passed if passed else 0.0


def run_case(case: Case, arms: Sequence[Arm], seconds: float, number: int, profiled: bool = False) -> Row:
    """Checks the arms' answers to the case, and times those that are right, or calls them for a profiler."""
    row = Row(case)
    on_gpu = case.device == "cuda"
    torch.set_num_threads(len(usable_cores()) if on_gpu else case.threads)
    torch.backends.cudnn.allow_tf32 = case.dtype == "tf32"  # as torch is set at its start: not for other products,
    torch.backends.cuda.matmul.allow_tf32 = case.dtype == "tf32" and case.mode == "cell"  # of which its cell is made
    torch.compiler.reset()  # or compiled modules of earlier rows would count against a limit
    inputs, expected = problem_on_gpu(case) if on_gpu and not case.options else problem(case)
    row.active = float(inputs.valid.mean())
    calls = {}
    for arm in arms:
        if reason := arm.refusal(case):
            row.skipped[arm.name] = reason
            continue
        try:
            call = arm.prepare(case, inputs)
            torch.manual_seed(SEED)
            with torch.inference_mode(not case.trains):
                named = arm.named(case, inputs, call())
            row.deviations[arm.name] = deviations(named, expected)
            if arm.deviation is None:
                check(case, named, expected, arm.slack)
            elif not max(row.deviations[arm.name].values()) <= arm.deviation:
                raise AssertionError(f"expected a deviation of at most {arm.deviation}, got {row.deviations[arm.name]}")
            calls[arm.name] = call
            if plan := arm.plan(case):
                row.plans[arm.name] = plan
        except Exception as error:  # of any arm's library; the row tells
            row.errors[arm.name] = f"{type(error).__name__}: {error}"
    with torch.inference_mode(not case.trains):
        if profiled:
            once(calls)
            return row
        for name, (median, spread) in measure(case, calls, seconds).items():
            row.us[name], row.spread[name] = median, spread
        if case.suite == LATENCY:
            row.latency = latencies(case, calls, number)
        if on_gpu:
            row.kernels = {name: kernels(call) for name, call in calls.items() if not name.endswith("-graph")}
    return row


def main() -> int:
    start, options, console = time.perf_counter(), parse(), report.make_console()
    cases = choose_cases(options)
    if not cases:
        console.print("No row of the preset has these values.")
        return 2
    torch.manual_seed(0)
    arms = []
    for arm in (ALL_ARMS[name] for name in options.arms):
        if reason := arm.missing():
            console.print(f"{arm.name}: {reason}", style="dim")
        else:
            arms.append(arm)
    meter = ceilings.Meter(sorted({1, *options.threads})) if options.device == "cpu" else None
    if meter is None:
        console.print("No floors: they are computed for CPUs alone.")
    elif meter.reason:
        console.print(f"No floors: {meter.reason}", markup=False)
    seconds = options.seconds or SECONDS[options.preset or "quick"]
    versions = {arm.name: arm.version() for arm in arms}
    versions |= {"python": platform.python_version(), "numpy": np.__version__}
    meta = {**describe_machine(), "versions": versions, "command": sys.argv[1:], "seconds": seconds}

    done: list[Row] = []
    status, others, measured = 0, OtherProcesses(), -CEILINGS_EVERY
    bar = tqdm(cases, unit="row", dynamic_ncols=True, disable=None)
    try:
        for case in bar:
            if options.limit is not None and time.perf_counter() > start + options.limit:
                console.print(f"Stopped by --limit after {len(done)} of {len(cases)} rows.")
                break
            if meter and time.perf_counter() > measured + CEILINGS_EVERY:
                meter.measure()
                measured = time.perf_counter()
            bar.set_postfix_str(str(case))
            done.append(run_case(case, arms, seconds, options.calls, options.once))
            if options.json:
                rows.save(options.json, meta, done)
        if meter:
            meter.measure()
    except KeyboardInterrupt:
        status = 130
        console.print(f"Interrupted after {len(done)} of {len(cases)} rows.")
    except RuntimeError as error:  # most of all of a GPU, which after one of its errors has no other answer
        status = 1
        console.print(f"Stopped after {len(done)} of {len(cases)} rows: {error}", style="red", markup=False)
    finally:
        bar.close()
    meta |= {"ceilings": meter.best if meter else {}, "other_processes": others.share()}
    for row in done:
        row.floor_us = ceilings.floor_us(row.case, meta["ceilings"], row.active)
    if options.json:
        rows.save(options.json, meta, done)
    if done:
        tables = [report.ceilings(meta["ceilings"])] if meta["ceilings"] else []
        tables += [report.results(done), report.peers(done), report.geomeans(done), report.kernels(done)]
        tables += [report.strategies(done), report.frozen(done), report.options(done), report.latencies(done)]
        tables += [report.deviations(done)] if options.errors else []
        tables += [report.targets(done)] if options.targets else []
        for table in tables:
            if table:
                report.show(console, table)
        report.notes(console, done)
        if meta["other_processes"] > BUSY:
            text = f"Other processes took {meta['other_processes']:.0%} of the cores: measure again when it is quiet."
            console.print(text, style="yellow")
    return status or int(any(name.startswith(OURS) for row in done for name in row.errors))


if __name__ == "__main__":
    sys.exit(main())
