"""Times LSTMs against each other on this machine. `python benchmarks/run.py --help` tells how."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lstm_bench import ceilings, report, rows
from lstm_bench.arms import ARMS, Arm, problem_on_gpu
from lstm_bench.cases import AXES, DTYPES, GPU_SUITES, MODES, PRESETS, SUITES, Case, custom, on, select, usable_cores
from lstm_bench.oracle import check, problem
from lstm_bench.rows import OURS, Row
from lstm_bench.timing import kernels, measure
from tqdm import tqdm

import lstm_ext

SECONDS = {"quick": 0.1, "full": 0.3, "gpu-quick": 0.1, "gpu": 0.2}

EPILOG = """
Without a preset, axes span a grid of their own, where an axis left out has one value. With a preset they pick those of
its rows. Each row is checked against float64 before it is timed. An interrupt leaves the rows done so far. Examples:

  python benchmarks/run.py                                        # quick
  python benchmarks/run.py --preset full --json result.json
  python benchmarks/run.py --preset full --suite training cell --threads 1
  python benchmarks/run.py --batch 1 8 --hidden 64 65 --mode inference training
  python benchmarks/run.py --preset gpu --json result.json        # on a GPU
"""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    cores = len(usable_cores())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, help="a list of rows (quick, unless an axis is given)")
    parser.add_argument(
        "--suite",
        nargs="+",
        choices=[*SUITES, *GPU_SUITES],
        metavar="SUITE",
        help=f"parts of the preset: {', '.join([*SUITES, *GPU_SUITES])}",
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: cpu, but cuda for the presets whose names begin with gpu"
    )
    parser.add_argument(
        "--threads", nargs="+", type=int, default=sorted({1, cores}), metavar="N", help="default: 1 and all cores"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, metavar="DTYPE", help=", ".join(DTYPES))
    parser.add_argument("--mode", nargs="+", choices=MODES, metavar="MODE", help=", ".join(MODES))
    sizes = {"batch": "B", "steps": "T", "input": "I", "hidden": "H", "proj": "P", "layers": "layers"}
    for name, axis in sizes.items():
        parser.add_argument(f"--{name}", dest=axis, nargs="+", type=int, metavar=axis[0].upper())
    parser.add_argument("--directions", nargs="+", type=int, choices=[1, 2])
    parser.add_argument("--busy", nargs="+", type=int, metavar="N", help="cores that other processes keep busy")
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=ARMS,
        default=list(ARMS),
        metavar="ARM",
        help=f"default: those installed of {', '.join(ARMS)}",
    )
    parser.add_argument("--seconds", type=float, help="measured for each arm of each row")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="no further row begins after these")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results are written")
    options = parser.parse_args(arguments)
    if options.suite and not options.preset:
        options.preset = "gpu" if options.suite[0] in GPU_SUITES else "full"
    options.device = options.device or ("cuda" if (options.preset or "").startswith("gpu") else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
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


def run_case(case: Case, arms: Sequence[Arm], all_ceilings: dict[str, Any], seconds: float) -> Row:
    """Checks the arms' answers to the case, and times those that are right."""
    row = Row(case)
    on_gpu = case.device == "cuda"
    torch.set_num_threads(len(usable_cores()) if on_gpu else case.threads)
    torch.backends.cudnn.allow_tf32 = case.dtype == "tf32"  # as torch is set at its start: not for other products,
    torch.backends.cuda.matmul.allow_tf32 = case.dtype == "tf32" and case.mode == "cell"  # of which its cell is made
    torch.compiler.reset()  # or compiled modules of earlier rows would count against a limit
    inputs, expected = problem_on_gpu(case) if on_gpu else problem(case)
    row.floor_us = ceilings.floor_us(case, all_ceilings, float(inputs.valid.mean()))
    calls = {}
    for arm in arms:
        if reason := arm.refusal(case):
            row.skipped[arm.name] = reason
            continue
        try:
            call = arm.prepare(case, inputs)
            with torch.inference_mode(case.mode != "training"):
                check(case, arm.named(case, inputs, call()), expected, arm.slack)
            calls[arm.name] = call
        except Exception as error:  # of any arm's library; the row tells
            row.errors[arm.name] = f"{type(error).__name__}: {error}"
    with torch.inference_mode(case.mode != "training"):
        for name, (median, spread) in measure(case, calls, seconds).items():
            row.us[name], row.spread[name] = median, spread
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
    for arm in (ARMS[name] for name in options.arms):
        if reason := arm.missing():
            console.print(f"{arm.name}: {reason}", style="dim")
        else:
            arms.append(arm)
    all_ceilings: dict[str, Any] = {}
    if options.device == "cpu":
        all_ceilings, reason = ceilings.measure(sorted({1, *options.threads}))
        console.print(report.ceilings(all_ceilings) if all_ceilings else f"No floors: {reason}")
    else:
        console.print("No floors: what a GPU can do at most is not measured yet.")
    seconds = options.seconds or SECONDS[options.preset or "quick"]
    versions = {arm.name: arm.version() for arm in arms}
    versions |= {"python": platform.python_version(), "numpy": np.__version__}
    meta = {**describe_machine(), "versions": versions, "ceilings": all_ceilings, "command": sys.argv[1:]}
    meta["seconds"] = seconds

    done: list[Row] = []
    failed = False
    bar = tqdm(cases, unit="row", dynamic_ncols=True)
    try:
        for case in bar:
            if options.limit is not None and time.perf_counter() > start + options.limit:
                raise KeyboardInterrupt
            bar.set_postfix_str(str(case))
            done.append(run_case(case, arms, all_ceilings, seconds))
    except KeyboardInterrupt:
        console.print(f"Stopped after {len(done)} of {len(cases)} rows.")
    except RuntimeError as error:  # most of all of a GPU, which after one of its errors has no other answer
        failed = True
        console.print(f"Stopped after {len(done)} of {len(cases)} rows: {error}", style="red", markup=False)
    finally:
        bar.close()
    if options.json:
        rows.save(options.json, meta, done)
    if done:
        console.print(report.results(done))
        console.print(report.geomeans(done))
        for table in (report.targets(done), report.kernels(done)):
            if table:
                console.print(table)
        report.notes(console, done)
    return 1 if failed or any(OURS in row.errors for row in done) else 0


if __name__ == "__main__":
    sys.exit(main())
