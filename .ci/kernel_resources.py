"""Registers, spills and stack of each CUDA kernel, as ptxas reports them: csrc/cuda/resources.txt.

    python .ci/kernel_resources.py [--check] [ARCH ...]     (nvcc on PATH; default: 75 80 86 89 90a 100 120)

Writes the report. With --check it compares instead, for the architectures named. Either way it fails if a kernel spills
or uses local memory; but for bfloat16 on sm_75, which has no instructions for it, so that no kernel of it is fast.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "csrc" / "cuda"
REPORT = FOLDER / "resources.txt"
ARCHS = ("75", "80", "86", "89", "90a", "100", "120")
ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
CLEAN = re.compile(r" 0 bytes spilled, +0 of stack$|^sm_75 .*__nv_bfloat16")


def kernel_name(mangled: str) -> str:
    """The kernel with its template arguments, from its mangled name."""
    demangled = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    match = re.search(r"(\w+<.*>)\(", demangled.replace("lstm_ext::cuda::", ""))
    return match[1] if match else mangled


def lines_of(source: Path, arch: str) -> list[str]:
    """A line for each kernel of a source."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-prec-div=false", "-Xptxas", "-v"]
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin", "-o", f"{folder}/out", str(source)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{source.name} for sm_{arch}: {result.stderr}")
    lines, name, frame = [], "", ("0", "0", "0")
    for line in result.stderr.splitlines():
        if match := ENTRY.search(line):
            name = kernel_name(match[1])
        elif match := FRAME.search(line):
            frame = max(frame, match.groups(), key=lambda each: sum(map(int, each)))
        elif (match := USED.search(line)) and name:
            spilled = int(frame[1]) + int(frame[2])
            lines.append(
                f"sm_{arch:<5}{name:<66}{match[1]:>4} registers,{spilled:>4} bytes spilled,{frame[0]:>4} of stack"
            )
            name, frame = "", ("0", "0", "0")
    return sorted(lines)


def main() -> None:
    """Writes or checks the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("archs", nargs="*", default=ARCHS)
    arguments = parser.parse_args()
    jobs = list(product(sorted(FOLDER.glob("kernels_*.cu")), arguments.archs))
    with ThreadPoolExecutor(2) as pool:
        lines = sorted(line for each in pool.map(lambda job: lines_of(*job), jobs) for line in each)
    heavy = [line for line in lines if not CLEAN.search(line)]
    if heavy:
        sys.exit("kernels that spill or use local memory:\n" + "\n".join(heavy))
    if not arguments.check:
        REPORT.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return
    known = REPORT.read_text(encoding="utf-8").splitlines()
    changed = [line for line in lines if line not in known]
    if changed:
        sys.exit(f"{REPORT.name} says otherwise; refresh it with this script:\n" + "\n".join(changed))


if __name__ == "__main__":
    main()
