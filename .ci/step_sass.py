"""What a time step costs by the machine code of the kernels; .ci/step_sass.txt has it for bfloat16 on sm_90a.

    python .ci/step_sass.py [--only REGEX] [--mma N] [--without REGEX] [--path] [--record FILE | --check FILE] OBJECT...

OBJECT is a .cubin, or a library with kernels in it (lstm_ext/_C*.so of a CUDA build). A kernel that walks over time has
a row for each step loop: the innermost loops that hold both a product and a barrier. In one that is launched for each
step these loops go over the columns of the weights; it has a row for the launch, too, and one for each loop over the
items of its pointwise part. One of normalised rows has the row for the launch alone. A row says what one warp does on
the fast path:

    mma        tensor core instructions; where a kernel has none, FFMA and DFMA
    lds, sts   loads from shared memory, by bits, and stores to it
    ldg, stg   loads from global memory, or what may be it, and stores; with ! those that blocks exchange (.STRONG)
    remote     stores to the shared memory of other blocks
    mbar, bar  operations on barriers in shared memory, waits included; barriers of the block
    fence      MEMBAR, ERRBAR, CCTL: what orders memory or empties caches
    clocks     of the step, if this warp were alone: instructions issue in order, each as many clocks after the one
               before as its control word says, and not before the results are there that it waits for
    product    clocks from the barrier before the most mma to the one after them / so many mma

The fast path takes each inner loop once and waits for nothing twice. Of branches it takes those with the most mma
(--mma N: the most up to N, where a switch selects), then those with the most memory accesses, then the fewest
instructions. Where clocks are a range, its other end leaves out the accesses that it can: a warp with nothing to load
or store. --without bars blocks with an instruction that has REGEX in it, as --path prints it, which prints the path.

Loads and what else has no fixed time take LATENCIES, which are assumed, from published measurements of an H100. The
time of arithmetic and tensor cores is in the control words. Not counted: functions that are called, waiting for other
warps, for instructions to be fetched, and for places on the bus.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from kernel_resources import kernel_name
from machine_code import END, Graph, Instruction, Kernel, Loop, disassemble

# ---- Clocks: one warp on its path -----------------------------------------------------------------------------------

LATENCIES = [  # of what is waited for, by the first that matches; 24 for all else
    (r"LDG?\..*STRONG|ATOMG?\b", 700),  # what another block sends through L2, its way there included
    (r"LDG|LD\.|UBLKCP|UTMA", 280),  # from L2
    (r"SYNCS\..*PHASECHK", 200),  # what another block of the cluster sends, its way included
    (r"LDSM|LDS|ATOMS|LDL|LDC|ULDC|S2U?R|BAR|SYNCS", 30),
    (r"MEMBAR\..*(GPU|SYS)", 600),  # until the stores before it are in L2
]
READ = 12  # until a load or store has read its registers
BLOCKING = re.compile(r"BAR\.(?!ARV)|MEMBAR")  # nothing issues before they are done


def latency(opcode: str) -> int:
    """Clocks until the result of an instruction is there."""
    return next((clocks for what, clocks in LATENCIES if re.match(what, opcode)), 24)


def issue_clocks(path: list[Instruction]) -> list[int]:
    """When each instruction issues; one more for the end."""
    now, copies = 0, 0
    groups: list[int] = []  # of copies to shared memory: when each is complete
    free, clocks = [0] * 6, []
    for i in path:
        now = max([now, *(free[board] for board in range(6) if i.waits >> board & 1)])
        if match := re.match(r"DEPBAR.*\.LE SB\d, 0x(\w+)", f"{i.opcode} {i.operands}"):
            now = max([now, *groups[: max(0, len(groups) - int(match[1], 16))]])
        clocks.append(now)
        done = now + latency(i.opcode)
        if i.opcode.startswith("LDGSTS"):
            copies = done
        elif i.opcode.startswith("LDGDEPBAR"):
            groups.append(copies)
        if i.result < 6:
            free[i.result] = max(free[i.result], done)
        if i.read < 6:
            free[i.read] = max(free[i.read], now + READ)
        now = max(now + i.stall, done if BLOCKING.match(i.opcode) else 0)
    return [*clocks, now]


# ---- Report ---------------------------------------------------------------------------------------------------------

COLUMNS = {
    "lds8-16": r"LDS\.[US](8|16)",
    "lds32": r"LDS(?!\.(64|128|[US]\d))\b",
    "lds64": r"LDS\.64",
    "lds128": r"LDS\.128|LDSM",
    "sts": r"STS\b|ATOMS",
    "ldg": r"(LDG|LD|LDGSTS|UBLKCP\w*|UTMA\w*)\b(?!.*STRONG)",
    "ldg!": r"(LDG|LD|ATOMG?)\b(?=.*STRONG)",
    "stg": r"(STG|RED)\b(?!.*STRONG)",
    "stg!": r"(STG|RED)\b(?=.*STRONG)",
    "remote": r"(ST|STAS|REDAS)\b",
    "mbar": r"SYNCS",
    "bar": r"BAR\.",
    "fence": r"MEMBAR|\w*ERRBAR|CCTL|FENCE",
    "local": r"(LD|ST)L\b",
    "call": r"CALL(?!\S* `\(\.L_)",
    "branch": r"BR[AX]|JM[PX]|CALL\S* `\(\.L_",
}
SECTION_END = re.compile(r"BAR\.|SYNCS\..*PHASECHK")


def product_clocks(path: list[Instruction], at: list[int], product: re.Pattern[str]) -> tuple[int, int]:
    """How many mma stand between the two barriers or waits that have the most between them, and the clocks."""
    ends = [n for n, i in enumerate(path) if SECTION_END.match(i.opcode)]
    begins = [(0, at[0]), *((n, at[n] + latency(path[n].opcode)) for n in ends)]
    return max(
        (sum(bool(product.match(i.opcode)) for i in path[a:b]), at[b] - begin)
        for (a, begin), b in zip(begins, [*ends, len(path)], strict=True)
    )


def rows(kernel: Kernel, arguments: argparse.Namespace) -> Iterator[list[str]]:
    """The table's rows of a kernel."""
    graph, name = Graph(kernel), kernel_name(kernel.name)
    parts = [(f"{name} loop {number}", loop) for number, loop in enumerate(graph.step_loops(), 1)]
    if name.startswith(("step_", "norm_")) and not name.startswith("norm_sequence"):
        parts.append((f"{name} launch", Loop(END, set(graph.order))))
        parts += [(f"{name} items {number}", loop) for number, loop in enumerate(graph.item_loops(), 1)]
    for where, step in parts:
        launch = step.header == END
        clocks, sections = [], []
        for busy in (False, True):
            path = graph.fast_path(step, busy, arguments.mma, arguments.without)
            # Of three steps the second is like all that follow: its loads may be waited for in the next one.
            issued = issue_clocks(path) if launch else issue_clocks(path * 3)[len(path) :]
            at = [clock - issued[0] for clock in issued]
            clocks.append(at[len(path)])
            sections.append(product_clocks(path if launch else path * 2, at, graph.product))
        if not path:
            print(f"{kernel.arch} {where}: no way through", file=sys.stderr)
            continue
        if arguments.path:
            print(f"{kernel.arch} {where}", *(f"{clock:8}  {i}" for clock, i in zip(at, path, strict=False)), sep="\n")
        counts = [
            sum(bool(re.match(what, i.opcode)) for i in path) for what in (graph.product.pattern, *COLUMNS.values())
        ]
        product = span(section[1] for section in sections)
        yield [kernel.arch, where, *map(str, [len(path), *counts]), span(clocks), f"{product}/{sections[1][0]}"]


def span(numbers: Iterable[int]) -> str:
    """Numbers as a range, or as one if they are equal."""
    return "..".join(map(str, sorted(set(numbers))))


def table(lines: list[list[str]]) -> str:
    """The rows below their heads, in columns."""
    lines = [["arch", "kernel", "instr", "mma", *COLUMNS, "clocks", "product"], *sorted(lines)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ""
    for line in lines:
        names = [f"{cell:<{width}}" for cell, width in zip(line[:2], widths, strict=False)]
        text += "  ".join(names + [f"{cell:>{width}}" for cell, width in zip(line[2:], widths[2:], strict=True)]) + "\n"
    return text


def main() -> None:
    """Prints the table; records or checks it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=re.compile, default=re.compile(""), metavar="REGEX", help="in a kernel's name")
    parser.add_argument("--mma", type=int, default=sys.maxsize, metavar="N")
    parser.add_argument("--without", type=re.compile, metavar="REGEX")
    parser.add_argument("--path", action="store_true")
    file = parser.add_mutually_exclusive_group()
    file.add_argument("--record", type=Path, metavar="FILE")
    file.add_argument("--check", type=Path, metavar="FILE")
    parser.add_argument("objects", nargs="+", type=Path, metavar="OBJECT")
    arguments = parser.parse_args()

    def wanted(name: str) -> object:
        return arguments.only.search(kernel_name(name))

    kernels = (kernel for path in arguments.objects for kernel in disassemble(path, wanted))
    found = [row for kernel in kernels if wanted(kernel.name) for row in rows(kernel, arguments)]
    if not found:
        sys.exit("no step loop and no step kernel in " + ", ".join(map(str, arguments.objects)))
    text = table(found)
    if arguments.check:
        recorded = arguments.check.read_text(encoding="utf-8")
        changed = difflib.unified_diff(recorded.splitlines(), text.splitlines(), "recorded", "built", n=0, lineterm="")
        if recorded != text:
            sys.exit(f"{arguments.check} says otherwise; refresh it with --record:\n" + "\n".join(changed))
        print(f"{len(found)} steps as {arguments.check} says")
    elif arguments.record:
        arguments.record.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
