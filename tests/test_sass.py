"""The script that reads the machine code of the CUDA kernels, on a disassembly written by hand: it needs no nvcc."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / ".ci"
if not SCRIPTS.exists():
    pytest.skip("the checks of CI are not beside the tests", allow_module_level=True)
sys.path.insert(0, str(SCRIPTS))
machine_code, step_sass = importlib.import_module("machine_code"), importlib.import_module("step_sass")

# What nvdisasm 13.5 prints of three instructions that nvcc 13.0 made for sm_90a.
PRINTED = """\t.target\tsm_90a

.text.kernel:
        /*23a0*/                   LDS.64 R36, [R185]                          ;  /* 0x00000000b9247984 */
                                                                                  /* 0x000e240000000a00 */
.L_x_7:
        /*23b0*/                   HMMA.16816.F32.BF16 R32, R156, R36.reuse, R28 ; /* 0x000000249c20723c */
                                                                                   /* 0x041fec000004181c */
        /*23c0*/              @!P0 BRA `(.L_x_7)                               ;  /* 0x0000000400fc8947 */
                                                                                  /* 0x000fea0003800000 */
"""

# A kernel as those of a sequence are: a loop over the batch, one over the steps, and within it a wait that is bounded
# by the clock, a product whose length a switch selects, and a loop over units. Before an instruction stand its stall,
# r and the scoreboard of its result, w and a mask of those that it waits for.
SEQUENCE = """
            1       S2R R0, SR_TID.X
.L_batch:   1       LDS R4, [R0]
.L_step:    2 r0    LDG.E.64.STRONG.GPU R6, desc[UR4][R2.64]
           13 w1    ISETP.NE.AND P0, PT, R7, R9, PT
            5       @!P0 BRA `(.L_there)
.L_again:   2 r0    LDG.E.64.STRONG.GPU R6, desc[UR4][R2.64]
            6       CS2R R8, SR_GLOBALTIMERLO
           13 w1    ISETP.GE.U32.AND P1, PT, R8, R9, PT
            5       @P1 BRA `(.L_late)
            5       @P0 BRA `(.L_again)
.L_there:   1       STS [R1], R6
            1       BAR.SYNC.DEFER_BLOCKING 0x0
            5       BRX R8 -0x100 (*"BRANCH_TARGETS .L_one,.L_two"*)
.L_one:     1 r1    LDS.64 R10, [R1]
           15 w2    HMMA.16816.F32.BF16 R12, R24, R10, R12
            9       NOP
            5       BRA `(.L_sums)
.L_two:     1 r1    LDS.64 R10, [R1]
            4 r2    LDS.64 R16, [R1+0x100]
           15 w2    HMMA.16816.F32.BF16 R12, R24, R10, R12
            9       NOP
           15 w4    HMMA.16816.F32.BF16 R12, R28, R16, R12
            9       NOP
.L_sums:    1       STS.64 [R2], R12
            1       BAR.SYNC.DEFER_BLOCKING 0x0
            5       @P2 BRA `(.L_next)
.L_unit:    1 r0    LDS.U8 R20, [R2]
            1 w1 r1 MUFU.EX2 R20, R20
            2 w2    STG.E desc[UR4][R18.64], R20
            5       @P3 BRA `(.L_unit)
.L_next:    5       @P4 BRA `(.L_step)
            5       @P5 BRA `(.L_batch)
            5       EXIT
.L_late:    1       BPT.TRAP 0x1
.L_end:     1       BRA `(.L_end)
"""


def printed(code: str, name: str = "sequence") -> str:
    """The code as nvdisasm prints it."""
    text = f"\t.target\tsm_90a\n.text.{name}:\n"
    for number, line in enumerate(filter(None, code.split("\n"))):
        label, _, rest = line.rpartition(": ") if line.startswith(".L_") else ("", "", line)
        words = rest.split()
        stall, result, waits = int(words.pop(0)), 7, 0
        while words[0][0] in "rw":
            kind, value = words[0][0], int(words.pop(0)[1:])
            result, waits = (value, waits) if kind == "r" else (result, value)
        control = stall | result << 5 | 7 << 8 | waits << 11
        text += f"{label}:\n" if label else ""
        text += (
            f"        /*{number * 16:04x}*/    {' '.join(words)} ;  /* 0x{0:016x} */\n   /* 0x{control << 41:016x} */\n"
        )
    return text


def graph(code: str) -> machine_code.Graph:
    return machine_code.Graph(machine_code.parse(printed(code))[0])


def opcodes(path: Iterable[machine_code.Instruction]) -> list[str]:
    return [i.opcode.split(".")[0] for i in path]


def test_a_line_is_parsed_with_its_control_word() -> None:
    (kernel,) = machine_code.parse(PRINTED)
    load, mma, branch = kernel.instructions
    assert (kernel.name, kernel.arch, kernel.labels) == ("kernel", "sm_90a", {".L_x_7": 1})
    assert load == (0x23A0, "", "LDS.64", "R36, [R185]", 2, 0, 7, 0)
    assert mma == (0x23B0, "", "HMMA.16816.F32.BF16", "R32, R156, R36.reuse, R28", 6, 7, 7, 0b000001)
    assert (branch.guard, branch.stall) == ("@!P0", 5)


def test_the_step_is_the_innermost_loop_with_a_product_and_a_barrier() -> None:
    found = graph(SEQUENCE)
    assert len(found.loops) == 4  # batch, step, wait, units; not that after the trap
    (step,) = found.step_loops()
    assert found.blocks[step.header][0].opcode == "LDG.E.64.STRONG.GPU"
    assert opcodes(i for block in step.body for i in found.blocks[block]).count("BPT") == 0


def test_the_fast_path_waits_once_and_takes_the_longest_product() -> None:
    found = graph(SEQUENCE)
    (step,) = found.step_loops()
    wait, product = ["LDG", "ISETP", "BRA", "STS", "BAR", "BRX"], ["LDS", "LDS", "HMMA", "NOP", "HMMA", "NOP"]
    sums, units = ["STS", "BAR", "BRA"], ["LDS", "MUFU", "STG", "BRA"]
    assert opcodes(found.fast_path(step, busy=True)) == [*wait, *product, *sums, *units, "BRA"]
    assert opcodes(found.fast_path(step, busy=False)) == [*wait, *product, *sums, "BRA"]
    shorter = ["LDS", "HMMA", "NOP", "BRA"]
    assert opcodes(found.fast_path(step, busy=False, most_mma=1)) == [*wait, *shorter, *sums, "BRA"]
    without = re.compile("LDS.64 R16")
    assert opcodes(found.fast_path(step, busy=False, without=without)) == [*wait, *shorter, *sums, "BRA"]
    assert found.fast_path(step, busy=True, without=re.compile("HMMA")) == []


def test_a_wait_that_nothing_precedes_is_on_the_path() -> None:
    code = SEQUENCE.replace("            5       @!P0 BRA `(.L_there)\n", "            5       @P6 BRA `(.L_there)\n")
    code = code.replace(
        ".L_step:    2 r0    LDG.E.64.STRONG.GPU R6, desc[UR4][R2.64]", ".L_step:    1       MOV R6, R7"
    )
    found = graph(code)
    assert opcodes(found.fast_path(found.step_loops()[0], busy=True)).count("LDG") == 1


TESTED_AT_ITS_TOP = """
.L_step:    1       HMMA.16816.F32.BF16 R12, R24, R10, R12
            1       BAR.SYNC.DEFER_BLOCKING 0x0
.L_top:     1       LDG.E R6, desc[UR4][R2.64]
            5       @P0 BRA `(.L_out)
            1       LDS R7, [R8]
            5       BRA `(.L_top)
.L_out:     5       @P1 BRA `(.L_step)
            5       EXIT
"""


def test_loops_tested_at_their_top_are_taken_once_and_waits_not_again() -> None:
    around = ["HMMA", "BAR", "LDG", "BRA"]
    found = graph(TESTED_AT_ITS_TOP)
    assert opcodes(found.fast_path(found.step_loops()[0], busy=True)) == [*around, "LDS", "BRA", "BRA"]
    found = graph(TESTED_AT_ITS_TOP.replace("LDG.E", "LDG.E.STRONG.GPU"))
    assert opcodes(found.fast_path(found.step_loops()[0], busy=True)) == [*around, "BRA"]


@pytest.mark.parametrize(
    ("jump", "follows"),
    [
        ("BRA `(.L_far)", [2]),
        ("@P0 BRA `(.L_far)", [2, 1]),
        ("BRA P0, `(.L_far)", [2, 1]),
        ("BRA.U !UP0, `(.L_far)", [2, 1]),
        ("BRA.CONV ~URZ, `(.L_far)", [2]),
        ("CALL.REL.NOINC `(.L_far)", [2]),
        ("@!P0 EXIT", [machine_code.END, 1]),
        ("BPT.TRAP 0x1", []),
    ],
)
def test_where_a_jump_goes(jump: str, follows: list[int]) -> None:
    found = graph(f"            1 {jump}\n            1 NOP\n            1 EXIT\n.L_far:     1 EXIT")
    far = len(found.blocks) - 1
    assert found.next[0] == [far if to == 2 else to for to in follows]


def test_what_ends_no_block() -> None:
    for text in ("BRA.DIV UR4, `(.L_far)", "CALL.REL.NOINC `($kernel$fetch)"):
        assert len(graph(f"            1 {text}\n            1 EXIT\n.L_far:     1 EXIT").blocks[0]) == 2


def test_clocks_are_the_stalls_and_what_is_waited_for() -> None:
    found = graph(SEQUENCE)
    path = found.fast_path(found.step_loops()[0], busy=True)
    word, shared, barrier, other = (
        step_sass.latency(name) for name in ("LDG.E.64.STRONG.GPU", "LDS", "BAR.SYNC", "MUFU")
    )
    there = word + 13 + 5 + 1  # the word, its test, and what lies there is stored; then the barrier
    product = 5 + shared + 15 + 9 + 15 + 9 + 1  # the second load is there before the second mma
    units = 5 + shared + other + 2 + 5 + 5
    clocks = step_sass.issue_clocks(path)
    assert clocks[4] == there
    assert clocks[13] == there + barrier + product
    assert clocks[-1] == there + barrier + product + barrier + units
    assert step_sass.product_clocks(path, clocks, found.product) == (2, product)


def test_copies_to_shared_memory_are_waited_for_by_group() -> None:
    copy = "            1       LDGSTS.E.128 [R0], desc[UR4][R2.64]\n            1       LDGDEPBAR\n"
    code = f"{copy}           99       NOP\n{copy}            1       DEPBAR.LE SB0, 0x1\n            1       EXIT"
    code = code.replace("99", "15")
    path = graph(code).blocks[0]
    memory = step_sass.latency("LDGSTS")
    assert step_sass.issue_clocks(path)[-2] == memory + 1  # the first
    path = graph(code.replace("0x1\n", "0x0\n")).blocks[0]
    assert step_sass.issue_clocks(path)[-2] == 2 + 15 + memory + 1  # and the second


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the script prints for a kernel of this code and name."""
    monkeypatch.setattr(step_sass, "kernel_name", str)

    def run_script(code: str, *arguments: object, name: str = "sequence") -> str:
        monkeypatch.setattr(step_sass, "disassemble", lambda path, _: machine_code.parse(printed(code, name)))
        monkeypatch.setattr(sys, "argv", ["step_sass.py", *map(str, arguments), "kernels.cubin"])
        step_sass.main()
        return capsys.readouterr().out

    return run_script


def test_the_row_of_a_step(run: Callable[..., str]) -> None:
    heads, row = (line.split() for line in run(SEQUENCE).splitlines())
    assert row[:4] == ["sm_90a", "sequence", "loop", "1"]
    counts = {head: n for head, n in zip(heads[2:], row[4:], strict=True) if n != "0"}
    accesses = {"lds8-16": "1", "lds64": "2", "sts": "2", "ldg!": "1", "stg": "1", "bar": "2"}
    clocks = {"clocks": "873..934", "product": "84/2"}  # those of the test above, and without the units
    assert counts == {"instr": "20", "mma": "2", **accesses, "branch": "5", **clocks}
    assert "   0  00" in run(SEQUENCE, "--path")
    assert run(SEQUENCE, "--mma", 1).split()[-1].endswith("/1")


def test_what_is_loaded_for_the_next_step_is_waited_for_there(run: Callable[..., str]) -> None:
    code = """
.L_step:    1       MOV R9, R8
           15 w1    HMMA.16816.F32.BF16 R12, R24, R10, R12
            1       BAR.SYNC.DEFER_BLOCKING 0x0
            1 r0    LDG.E.64 R10, desc[UR4][R2.64]
            5       @P0 BRA `(.L_step)
            5       EXIT
"""
    memory, barrier = step_sass.latency("LDG.E.64"), step_sass.latency("BAR.SYNC")
    assert run(code).split()[-2:] == [str(15 + barrier + memory), f"{memory + 15}/1"]


def test_the_row_of_a_kernel_that_is_launched_for_each_step(run: Callable[..., str]) -> None:
    rows = [row.split() for row in run(SEQUENCE, name="step_forward").splitlines()[1:]]
    items, launch, loop = rows
    assert loop[1:5] == ["step_forward", "loop", "1", "20"]
    assert items[1:5] == ["step_forward", "items", "1", "4"]  # the loop with an activation, and no product or barrier
    assert launch[1:5] == ["step_forward", "launch", "24", "2"]  # S2R, LDS, the 20 of the loop, and the two after it


def test_figures_are_recorded_and_checked(tmp_path: Path, run: Callable[..., str]) -> None:
    figures = tmp_path / "figures.txt"
    run(SEQUENCE, "--record", figures)
    assert figures.read_text() == run(SEQUENCE)
    assert run(SEQUENCE, "--check", figures).startswith("1 steps as")
    with pytest.raises(SystemExit, match=r"-sm_90a  sequence loop 1  .*\n\+sm_90a  sequence loop 1  "):
        run(SEQUENCE.replace("LDS.U8", "LDS.64"), "--check", figures)
    with pytest.raises(SystemExit, match="no step loop"):
        run(SEQUENCE, "--only", "another")
