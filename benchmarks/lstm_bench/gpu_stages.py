"""The stages of gpu_report.py: what they need of this machine, and the commands they run.

Needs nothing but Python, as `stages.py`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from . import pytest_log
from .stages import LEFT_OUT, Command, Stage

ROOT = Path(__file__).resolve().parent.parent.parent
RUN = str(ROOT / "benchmarks" / "run.py")
PYTHON = sys.executable
STARTUP = 25  # s of a benchmark's: imports, its last row and its tables

# What building, testing and timing need beside torch, and whether a program on PATH does as well as the package.
REQUIRED = {
    "setuptools": (77, 0),
    "pybind11": (3, 0),
    "cmake": (3, 26),
    "ninja": (1, 11),
    "numpy": (1, 23),
    "pytest": (8, 2),
    "tqdm": (4, 0),
    "rich": (13, 0),
}
PROGRAMS = ("cmake", "ninja")


# ---- The machine -----------------------------------------------------------------------------------------------------

PROBE = """
import json, torch
gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
print(json.dumps({"torch": torch.__version__, "gpus": [torch.cuda.get_device_name(n) for n in gpus],
                  "capabilities": [torch.cuda.get_device_capability(n) for n in gpus]}))
"""


@dataclass(frozen=True)
class Machine:
    torch: str
    gpus: tuple[str, ...] = ()
    archs: tuple[str, ...] = ()  # as nvcc names them
    why_none: str = ""


def arch_of(major: int, minor: int) -> str:
    """Hopper's own instructions need the "a"; later GPUs run the kernels of their plain architecture."""
    return "90a" if (major, minor) == (9, 0) else f"{major}{minor}"


def probe() -> Machine:
    """The GPUs as torch finds them, in a process of its own, which keeps no memory of theirs."""
    if importlib.util.find_spec("torch") is None:
        return Machine("", why_none=f"torch is not installed for {PYTHON}")
    answer = subprocess.run([PYTHON, "-c", PROBE], capture_output=True, text=True)
    if answer.returncode:
        return Machine("", why_none=f"torch fails: {(answer.stderr.strip().splitlines() or ['no output'])[-1]}")
    found = json.loads(answer.stdout.splitlines()[-1])
    archs = dict.fromkeys(arch_of(*capability) for capability in found["capabilities"])
    why = "" if found["gpus"] else f"torch {found['torch']} finds no CUDA device"
    return Machine(found["torch"], tuple(found["gpus"]), tuple(archs), why)


def missing() -> list[str]:
    """NAME>=VERSION of what is not there or too old."""
    lacking = []
    for name, least in REQUIRED.items():
        try:
            found = tuple(map(int, re.findall(r"\d+", version(name))[:2]))
        except PackageNotFoundError:
            found = ()
        program = name in PROGRAMS and shutil.which(name)
        if found < least and not (program and not found):
            lacking.append(f"{name}>={'.'.join(map(str, least))}")
    return lacking


def make_environment(out: Path) -> dict[str, str]:
    """So that tools and the package are found in the folder, before those of the environment, and keep files there."""
    cuda = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    path = [str(out / "tools" / "bin"), sysconfig.get_path("scripts"), os.environ.get("PATH", ""), f"{cuda}/bin"]
    modules = [str(out / "package"), str(out / "tools"), str(ROOT / "benchmarks")]
    found = {"PATH": os.pathsep.join(path), "PYTHONPATH": os.pathsep.join(modules), "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **found, "LSTM_EXT_CACHE": str(out / "cache")}


# ---- The stages ------------------------------------------------------------------------------------------------------

TESTS = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider", "-q", "-m", "gpu"]
TESTS += ["--durations=20", *map(str, sorted((ROOT / "tests").glob("test_gpu_*.py")))]
SLOW = ("long_sequences", "two_to_the_31", "ten_thousand", "several_processes", "derivative", "compiled")
QUICK_TESTS = " and ".join(f"not {name}" for name in (*SLOW, "float64", "float32", "-float16", "[float16"))
# Each way through a layer and each strategy.
SMALL = "matches_the_oracle and (float32 or bfloat16) and not chosen and (T9-B7-I5-H33 or T6-B9-I17-H33-P7)"
NCU_CASES = {"block": (16, 128), "cluster": (16, 256), "grid": (16, 1024)}  # B and H
CPU_THREADS = (1, 2, 4, 8, 16)

AVAILABLE = """
import sys, lstm_ext, torch
cuda = lstm_ext.backends()["cuda"]
print(lstm_ext.build_info())
sys.exit("" if cuda.available else f"not available: {cuda.reason}")
"""

SHAPES = [(512, batch, width) for batch in (1, 16, 64) for width in (128, 256, 512, 768, 1024)]
# One at a time, as the file has what was measured before the time was over.
TUNE = f"""
import sys, lstm_ext
if not hasattr(lstm_ext, "tune"):
    print("this lstm_ext has no tune")
    sys.exit({LEFT_OUT})
for dtype in ("bfloat16", "float16", "float32"):
    for shape in {SHAPES}:
        print(*lstm_ext.tune([shape], [dtype], path="tune.json")[:2], sep="\\n", flush=True)
"""


def always(*commands: Command) -> Callable[[float], Sequence[Command]]:
    return lambda seconds: commands


def tools(options: argparse.Namespace, out: Path) -> Stage:
    """Without --wheels it says at once what is missing: there may be no network to wait for."""
    lacking = missing()
    command = [PYTHON, "-m", "pip", "install", "--upgrade", "--target", str(out / "tools"), "--no-index"]
    command += ["--find-links", str(options.wheels), *lacking]
    if not options.wheels:
        complaint = f"missing: {', '.join(lacking)}: install them, or give a folder with their wheels by --wheels"
        command = [PYTHON, "-c", "import sys; sys.exit(sys.argv[1])", complaint]
    left_out = "" if lacking else "nothing is missing"
    purpose = "what is missing of the tools for what follows, from --wheels"
    return Stage("tools", purpose, 60, always(command), needs_gpu=False, left_out=left_out)


def build(machine: Machine, out: Path, seconds: float) -> Stage:
    install = [PYTHON, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "--no-index", "--upgrade"]
    install += ["--target", str(out / "package"), str(ROOT)]
    archs = os.environ.get("LSTM_EXT_CUDA_ARCHS") or ";".join(machine.archs)
    environment = {"LSTM_EXT_BUILD": "cuda" if archs else "cpu", "LSTM_EXT_CUDA_ARCHS": archs}

    def commands(_: float) -> Sequence[Command]:
        shutil.rmtree(out / "package", ignore_errors=True)
        return [install]

    def why_not() -> str:
        """In the words of setup.py; pip's last line has none."""
        found = re.findall(r"lstm_ext: LSTM_EXT_BUILD=\w+: (.*)", (out / "build.log").read_text(errors="replace"))
        return str(found[-1]) if found else ""

    purpose = f"the package, for {archs or 'the CPU alone'}"
    return Stage("build", purpose, seconds, commands, environment, needs_gpu=False, said=why_not)


def tests(out: Path, seconds: float, chosen: str) -> Stage:
    log = out / "tests.jsonl"
    command = [PYTHON, "-m", "lstm_bench.pytest_log", str(log), *TESTS, *(["-k", chosen] if chosen else [])]
    return Stage("tests", "pytest -m gpu", seconds, always(command), said=partial(pytest_log.summary, log))


def sanitizer(out: Path, name: str, seconds: float, chosen: str = SMALL, counts: bool = True) -> Stage:
    """With each tensor in an allocation of its own, so that its end is known."""
    program, log, finds = shutil.which("compute-sanitizer"), out / f"{name}.jsonl", out / f"{name}.finds.log"
    tool = name.partition("-")[0]
    command = [str(program), "--tool", tool, "--report-api-errors", "no"]
    if tool == "initcheck":  # it must see all kernels, or what they wrote would count as never written
        command += ["--log-file", str(finds)]
    else:
        command += ["--error-exitcode", "86", "--kernel-regex", "kns=lstm_ext"]
    command += [PYTHON, "-m", "pytest", "-p", "lstm_bench.pytest_log", f"--log-tests={log}", *TESTS, "-k", chosen]

    def ours() -> str:
        """Of initcheck's finds."""
        text = finds.read_text(errors="replace") if finds.exists() else ""
        found = [part for part in text.split("Uninitialized")[1:] if "lstm_ext" in "".join(part.splitlines()[:4])]
        return f"uninitialized reads: {finds.name}" if found else ""

    def said() -> str:
        text = (out / f"{name}.log").read_text(errors="replace")
        return "; ".join([pytest_log.summary(log), *re.findall(r"= (\w+ SUMMARY: .*)", text)[-1:]])

    return Stage(
        *(name, f"compute-sanitizer's {tool} on few tests", seconds, always(command)),
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        counts=counts,
        left_out="" if program else "no compute-sanitizer",
        said=said,
        finds=ours,
    )


def rows_done(path: Path) -> str:
    """How many rows there are, and how many times as long as ours torch takes in those that have both."""
    try:
        done = json.loads(path.read_text())["rows"]
    except (OSError, ValueError):
        return ""
    ratios = [row["ratio"] for row in done if row["ratio"]]
    wrong = sum(bool(row["errors"]) for row in done)
    mean = f", torch takes {geometric_mean(ratios):.2f} times as long" if ratios else ""
    return f"{len(done)} rows{mean}{f', {wrong} with errors' if wrong else ''}"


def rows(out: Path, name: str, purpose: str, seconds: float, *options: str, **more: Any) -> Stage:
    """Rows of benchmarks/run.py, as many as there is time for."""

    def commands(seconds: float) -> Sequence[Command]:
        limit = max(1.0, seconds - STARTUP, seconds / 3)
        return [[PYTHON, RUN, "--limit", f"{limit:.0f}", "--json", f"{name}.json", *options]]

    return Stage(name, purpose, seconds, commands, said=partial(rows_done, out / f"{name}.json"), **more)


def ncu(machine: Machine, strategy: str, seconds: float) -> Stage:
    """Of the second call: the first loads, plans, and is held against float64."""
    program, name, (batch, width) = shutil.which("ncu"), f"ncu-{strategy}", NCU_CASES[strategy]
    old = strategy == "cluster" and any(int(arch.rstrip("a")) < 90 for arch in machine.archs)
    one = ["--mode", "steps", "--steps", "64", "--batch", str(batch), "--hidden", str(width), "--dtype", "bfloat16"]
    call = [PYTHON, RUN, "--once", "--device", "cuda", *one, "--arms", f"lstm_ext-{strategy}"]
    collect = [str(program), "--clock-control", "none", "--set", "full", "-k", "regex:sequence_", "-c", "1"]
    collect += ["--profile-from-start", "off", "--force-overwrite", "--export", name, *call]
    show = [str(program), "--import", f"{name}.ncu-rep", "--page", "details"]
    left_out = "no clusters before compute capability 9.0" if old else "" if program else "no ncu"
    purpose = f"Nsight Compute, B {batch}, H {width} in bfloat16"
    return Stage(name, purpose, seconds, always(collect, show), left_out=left_out)


def all_stages(options: argparse.Namespace, machine: Machine, out: Path) -> list[Stage]:
    """In order of what is worth most, as the time may not last for all."""
    ours = ["--arms", "lstm_ext", "torch"]
    both = [*ours, "lstm_ext-graph", "torch-graph"]
    available = always([PYTHON, "-c", AVAILABLE], [PYTHON, "-m", "lstm_ext"])
    if options.quick and not options.only:
        return [
            *(tools(options, out), build(machine, out, 75)),
            Stage("available", "whether the package finds the GPU, and its checks of itself", 8, available),
            tests(out, 45, QUICK_TESTS),
            rows(out, "benchmarks", "against nn.LSTM", 32, "--preset", "gpu-quick", *both),
            sanitizer(out, "memcheck", 22),
        ]
    threads = [str(n) for n in CPU_THREADS if n <= len(os.sched_getaffinity(0))]
    flashrnn = "" if importlib.util.find_spec("flashrnn") else "not installed"
    ceilings = always([PYTHON, "-m", "lstm_bench.gpu_ceilings", "--json", "ceilings.json"])
    return [
        *(tools(options, out), build(machine, out, 180)),
        Stage("available", "whether the package finds the GPU, and its checks of itself", 20, available),
        tests(out, 180, ""),
        rows(out, "strategies", "each strategy, predicted and measured", 45, "--preset", "gpu-strategies"),
        rows(out, "benchmarks", "against nn.LSTM, eagerly and in a graph", 60, "--preset", "gpu", *both),
        sanitizer(out, "memcheck", 40),
        sanitizer(out, "racecheck", 30, f"{SMALL} and not cluster"),
        sanitizer(out, "synccheck", 30),
        sanitizer(out, "initcheck", 30),
        # It is not known to understand stores into other blocks' shared memory: it informs.
        sanitizer(out, "racecheck-cluster", 25, f"{SMALL} and cluster", counts=False),
        rows(out, "accuracy", "errors of ours and torch's in each dtype", 30, "--preset", "gpu-accuracy", *ours),
        Stage("ceilings", "what the GPU does at most", 30, ceilings),
        *(ncu(machine, strategy, 20) for strategy in NCU_CASES),
        Stage("tune", "lstm_ext.tune: measured plans", 40, always([PYTHON, "-c", TUNE])),
        rows(out, "stock", "nn.LSTM alone, with cuDNN's kernels", 60, "--preset", "gpu-stock", "--arms", "torch"),
        rows(out, "flashrnn", "against FlashRNN", 60, "--suite", "gpu_flashrnn", *ours, "flashrnn", left_out=flashrnn),
        rows(out, "cpu", "the CPU's threads", 60, "--preset", "quick", "--threads", *threads, *ours, needs_gpu=False),
    ]
