"""The machine code of CUDA kernels: parsed, its loops found, and the fast path through one; step_sass.py says which."""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import operator
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

# ---- Parse: what nvdisasm -hex prints ------------------------------------------------------------------------------

LINE = re.compile(
    r"\s+/\*(?P<address>[0-9a-f]+)\*/\s+(?P<guard>@!?U?P\w+)?\s*(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>.*?)\s*;"
    r"\s*/\* 0x[0-9a-f]{16} \*/"
)
HIGH_WORD = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")
LABEL = re.compile(r"(\.L_\w+):")
SECTION = re.compile(r"\.text\.(\S+):")
TARGET = re.compile(r"\s+\.target\s+(\w+)")


class Instruction(NamedTuple):
    """A machine instruction, with what its control word says: the bits from 105 on of its 128."""

    address: int
    guard: str  # as @!P0; empty if it always runs
    opcode: str
    operands: str
    stall: int = 1  # clocks to the next instruction
    result: int = 7  # the scoreboard that is freed when the result is there; 7: none
    read: int = 7  # the one that is freed when the operands have been read
    waits: int = 0  # bits: the scoreboards that are waited for before it issues

    @property
    def jumps(self) -> bool:
        """Whether another instruction than the next may follow."""
        return bool(JUMP.match(f"{self.opcode} {self.operands}"))

    def __str__(self) -> str:
        return " ".join(filter(None, (f"{self.address:04x}", self.guard, self.opcode, self.operands)))


class Kernel(NamedTuple):
    """A kernel as it was disassembled; labels name the instruction that follows them, by its number."""

    name: str  # mangled
    arch: str
    instructions: list[Instruction]
    labels: dict[str, int]


def parse(text: str) -> list[Kernel]:
    """The kernels of a disassembly."""
    kernels: list[Kernel] = []
    arch = ""
    for line in text.splitlines():
        if match := TARGET.match(line):
            arch = match[1]
        elif match := SECTION.match(line):
            kernels.append(Kernel(match[1], arch, [], {}))
        elif kernels and (match := LABEL.match(line)):
            kernels[-1].labels[match[1]] = len(kernels[-1].instructions)
        elif kernels and (match := LINE.match(line)):
            words = match["guard"] or "", match["opcode"], match["operands"]
            kernels[-1].instructions.append(Instruction(int(match["address"], 16), *words))
        elif kernels and kernels[-1].instructions and (match := HIGH_WORD.match(line)):
            code, word = kernels[-1].instructions, int(match[1], 16)
            control = max(1, word >> 41 & 15), word >> 46 & 7, word >> 49 & 7, word >> 52 & 63
            code[-1] = Instruction(*code[-1][:4], *control)
    return kernels


def tool(name: str) -> str:
    """The path of a tool: of the package nvidia-cuda-NAME, or the one on PATH."""
    try:
        for file in importlib.metadata.files(f"nvidia-cuda-{name}") or []:
            if file.stem == name:
                return str(file.locate())
    except importlib.metadata.PackageNotFoundError:
        pass
    if path := shutil.which(name):
        return path
    sys.exit(f"{name} is not there: pip install nvidia-cuda-{name}")


NAME = re.compile(rb"\.text\.(_Z\w+)")  # of the section that has a function


def disassemble(path: Path, wanted: Callable[[str], object] = bool) -> Iterator[Kernel]:
    """The kernels of an object: of each cubin in it that has a wanted one, by its mangled name, if it is a library."""
    with tempfile.TemporaryDirectory() as folder:
        cubins = [path.resolve()]
        if path.suffix != ".cubin":
            subprocess.run([tool("cuobjdump"), "-xelf", "all", path.resolve()], cwd=folder, check=True, stdout=-3)
            cubins = sorted(Path(folder).glob("*.cubin"))
        for cubin in cubins:
            if not any(wanted(name.decode()) for name in NAME.findall(cubin.read_bytes())):
                continue  # disassembling takes seconds
            command = [tool("nvdisasm"), "-hex", "-c", str(cubin)]
            yield from parse(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


# ---- Graph: basic blocks, loops, the fast path through one ---------------------------------------------------------

END = -1  # what follows the last block
MMA = re.compile(r"\w*MMA\b")
FMA = re.compile(r"[FD]FMA")
BARRIER = re.compile(r"BAR\.")
ACTIVATION = re.compile(r"MUFU\.EX2")
POLL = re.compile(r"LDG?\..*STRONG|SYNCS\..*PHASECHK")
STORE = re.compile(r"ST[A-Z]*\b|RED|BAR\.")
WORK = re.compile(r"LD(?!C)|ST[A-Z]*\b|ATOM|RED|SYNCS|BAR\.|MEMBAR|CCTL|MUFU|UBLKCP|UTMA")
# What may go elsewhere: a CALL of a mere label too, which is a long jump. (BRA.DIV is for warps whose lanes are apart.)
JUMP = re.compile(r"BRA(?!\.DIV)|BRX|JM[PX]|EXIT|RET|BPT\.TRAP|KILL|CALL\S* `\(\.L_")


class Loop(NamedTuple):
    """The blocks of a natural loop; of all of a kernel, if the header is END."""

    header: int
    body: set[int]


def reached(start: int, following: list[list[int]]) -> list[int]:
    """All blocks that can be reached, each before those that follow it: but for edges back."""
    order, seen, open_blocks = [], {start, END}, [(start, iter(following[start]))]
    while open_blocks:
        block, rest = open_blocks[-1]
        to = next((to for to in rest if to not in seen), None)
        if to is None:
            order.append(block)
            open_blocks.pop()
        else:
            seen.add(to)
            open_blocks.append((to, iter(following[to])))
    return order[::-1]


class Graph:
    """The basic blocks of a kernel, what may follow each, and its loops."""

    def __init__(self, kernel: Kernel):
        code = kernel.instructions
        ends = {n + 1 for n, i in enumerate(code) if i.jumps}
        starts = sorted({0, len(code), *ends, *kernel.labels.values()})
        self.blocks = [code[a:b] for a, b in itertools.pairwise(starts)]
        number = {label: starts.index(n) for label, n in kernel.labels.items()}
        self.next = [self._following(block, number) for block in range(len(self.blocks))]
        self.order = reached(0, self.next)
        self.before: dict[int, list[int]] = {block: [] for block in [*self.order, END]}
        for block in self.order:
            for to in self.next[block]:
                self.before[to].append(block)
        self.dominators = self._dominators()  # bits: the blocks that every way to a block leads through
        self.loops = self._loops()
        self.product = MMA if self.has(self.order, MMA) else FMA

    def count(self, block: int, what: re.Pattern[str]) -> int:
        """How many instructions of a block are such."""
        return sum(bool(what.match(i.opcode)) for i in self.blocks[block])

    def has(self, blocks: Iterable[int], what: re.Pattern[str]) -> bool:
        """Whether an instruction of the blocks is such."""
        return any(self.count(block, what) for block in blocks)

    def step_loops(self) -> list[Loop]:
        """The innermost loops with a product and a barrier."""
        both = [loop for loop in self.loops if self.has(loop.body, self.product) and self.has(loop.body, BARRIER)]
        return [loop for loop in both if not any(other.body < loop.body for other in both)]

    def item_loops(self) -> list[Loop]:
        """The loops with activations: the outermost that hold neither a product nor a barrier."""
        without = [
            loop for loop in self.loops if not self.has(loop.body, self.product) and not self.has(loop.body, BARRIER)
        ]
        active = [loop for loop in without if self.has(loop.body, ACTIVATION)]
        return [loop for loop in active if not any(loop.body < other.body for other in active)]

    def waits(self, loop: Loop) -> bool:
        """Whether a loop does nothing but wait for another block."""
        return self.has(loop.body, POLL) and not self.has(loop.body, self.product) and not self.has(loop.body, STORE)

    def asks_again(self, step: Loop) -> set[int]:
        """The waits of a step that come after a poll for the same: the fast path leaves them out where it can."""
        waits = [loop for loop in self.loops if loop.body < step.body and self.waits(loop)]
        first = step.body.difference(*(loop.body for loop in waits))
        again: set[int] = set()
        for loop in waits:
            polls = {i.opcode for block in loop.body for i in self.blocks[block] if POLL.match(i.opcode)}
            above = [block for block in first if self.dominators[loop.header] >> block & 1]
            if any(i.opcode in polls for block in above for i in self.blocks[block]):
                again |= loop.body
        return again

    def once(self, step: Loop, barred: set[int]) -> list[list[int]]:
        """What may follow each block of a step where every loop inside it is run through once, and a wait succeeds."""
        following: list[list[int]] = [[] for _ in self.blocks]
        for block in step.body - barred:
            ways = [END if to == step.header else to for to in self.next[block] if to != END or step.header == END]
            following[block] = [to for to in ways if to == END or to in step.body - barred]
        for loop in sorted(self.loops, key=lambda loop: len(loop.body)):
            if loop.header == step.header or not loop.body <= step.body:
                continue
            exits = {to for block in loop.body for to in following[block]} - loop.body
            for block in loop.body:
                if loop.header in following[block]:
                    out = set() if self.waits(loop) else exits
                    following[block] = sorted(out.union(following[block]) - {loop.header})
        return following

    def fast_path(
        self, step: Loop, busy: bool, most_mma: int = sys.maxsize, without: re.Pattern[str] | None = None
    ) -> list[Instruction]:
        """The instructions of the fast path of a warp with most to do, or least; none if there is no way through."""
        barred = {block for block in step.body if without and any(without.search(str(i)) for i in self.blocks[block])}
        again, following = self.asks_again(step), self.once(step, barred)
        start = 0 if step.header == END else step.header
        # From each block to the end, by the number of mma: the score of the best way, and the block that it goes to.
        best: dict[int, dict[int, tuple[tuple[int, int, int], int]]] = {END: {0: ((0, 0, 0), END)}}
        for block in reversed(reached(start, following)):
            mma, size = self.count(block, self.product), len(self.blocks[block])
            own_work = self.count(block, WORK) if busy and block not in again else 0
            again_size = size if block in again else 0
            ways = best[block] = {}
            for to in following[block]:
                for rest, ((polls, work, saved), _) in best.get(to, {}).items():
                    score = polls - again_size, work + own_work, saved - size
                    if rest + mma <= most_mma:
                        ways[rest + mma] = max((score, to), ways.get(rest + mma, (score, to)))
        path: list[Instruction] = []
        block, mma = start, max(best[start], default=0)
        while block != END and best[block]:
            path += self.blocks[block]
            mma, block = mma - self.count(block, self.product), best[block][mma][1]
        return path

    def _following(self, block: int, number: dict[str, int]) -> list[int]:
        last = self.blocks[block][-1]
        falls = [block + 1] if block + 1 < len(self.blocks) else []
        if not last.jumps:
            return falls
        labels = re.findall(r"\.L_\w+", last.operands) if last.opcode[0] in "BCJ" else []
        to = [END] if last.opcode == "EXIT" else [number[label] for label in labels]
        # BRA.CONV is taken by a warp whose lanes are together.
        conditional = last.guard or re.match(r"!?U?P\d", last.operands)
        return to + falls if conditional else to

    def _dominators(self) -> dict[int, int]:
        dominators = dict.fromkeys(self.order, -1) | {0: 1}
        changed = True
        while changed:
            changed = False
            for block in self.order[1:]:
                common = functools.reduce(operator.and_, (dominators[before] for before in self.before[block]))
                changed |= dominators[block] != common | 1 << block
                dominators[block] = common | 1 << block
        return dominators

    def _loops(self) -> list[Loop]:
        bodies: dict[int, set[int]] = {}
        for latch in self.order:
            for header in self.next[latch]:
                if header == END or not self.dominators[latch] >> header & 1:
                    continue
                body, found = bodies.setdefault(header, {header}), [latch]
                while found:
                    if (block := found.pop()) not in body:
                        body.add(block)
                        found += self.before[block]
        return [Loop(header, body) for header, body in sorted(bodies.items())]
