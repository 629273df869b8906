"""Registers of each CUDA kernel on each architecture, as ptxas reports them: .ci/kernel_resources.txt.

    LSTM_EXT_BUILD=cuda LSTM_EXT_CUDA_ARCHS="..." CUDAFLAGS=-Xptxas=-v pip install -v . >LOG 2>&1
    python .ci/kernel_resources.py [--check] LOG

Writes the columns of the architectures that were built; with --check it compares them instead. Either way it fails if a
kernel spills or uses local memory: but for bfloat16 on sm_75, which has no instructions for it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

REPORT = Path(__file__).with_suffix(".txt")
ARCHS = ("75", "80", "86", "89", "90a", "100", "120")
ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")

Report = dict[str, dict[str, str]]  # registers by kernel and architecture


def kernel_name(mangled: str) -> str:
    """The kernel with its template arguments, from its mangled name."""
    demangled = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    match = re.search(r"(\w+<.*>)\(", demangled.replace("lstm_ext::cuda::", ""))
    return match[1] if match else mangled


def read_log(text: str) -> tuple[Report, list[str]]:
    """What ptxas said of each kernel, and complaints about those that spill or use local memory."""
    report: Report = defaultdict(dict)
    heavy, name, arch = [], "", ""
    for line in text.splitlines():
        if match := ENTRY.search(line):
            name, arch = kernel_name(match[1]), match[2]
        elif match := FRAME.search(line):  # of the kernel, or of a function that it calls
            stack, stores, loads = map(int, match.groups())
            if stack + stores + loads and not (arch == "75" and "bfloat16" in name):
                heavy.append(f"sm_{arch} {name}: {stack} bytes of stack, {stores} + {loads} bytes spilled")
        elif (match := USED.search(line)) and name:
            report[name][arch] = match[1]
            name = ""
    return report, heavy


def read_report() -> Report:
    """The report as it is checked in."""
    lines = REPORT.read_text(encoding="utf-8").splitlines()
    archs = [arch.removeprefix("sm_") for arch in lines[0].split()[1:]]
    report: Report = defaultdict(dict)
    for line in lines[1:]:
        name, *registers = re.split(r"  +", line)
        report[name] = {arch: n for arch, n in zip(archs, registers, strict=True) if n != "-"}
    return report


def write_report(report: Report) -> None:
    """A row for each kernel, a column for each architecture."""
    width = 2 + max(map(len, report))
    rows = [f"{'kernel':<{width}}" + "".join(f"{'sm_' + arch:>8}" for arch in ARCHS)]
    for name, registers in sorted(report.items()):
        rows.append(f"{name:<{width}}" + "".join(f"{registers.get(arch, '-'):>8}" for arch in ARCHS))
    REPORT.write_text("\n".join(rows) + "\n", encoding="utf-8")


def main() -> None:
    """Writes or checks the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("log", type=Path)
    arguments = parser.parse_args()
    built, heavy = read_log(arguments.log.read_text(encoding="utf-8", errors="replace"))
    if not built:
        sys.exit(f"{arguments.log}: ptxas reports no kernel in it")
    if heavy:
        sys.exit("kernels that spill or use local memory:\n" + "\n".join(heavy))
    known = read_report() if REPORT.exists() else defaultdict(dict)
    if not arguments.check:
        write_report({name: known[name] | built[name] for name in built})
        return
    archs = {arch for registers in built.values() for arch in registers}
    expected = {name: {arch: n for arch, n in registers.items() if arch in archs} for name, registers in known.items()}
    changed = [f"{name}: {built.get(name)}" for name in expected | built if expected.get(name) != built.get(name)]
    if changed:
        sys.exit(f"{REPORT.name} says otherwise; refresh it with this script:\n" + "\n".join(changed))
    print(f"{len(built)} kernels for {', '.join(sorted(archs))} as {REPORT.name} says; none spills")


if __name__ == "__main__":
    main()
