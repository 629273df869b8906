"""Takes barriers, waits, stores and guards out of the CUDA kernels, one at a time, and sees whether a test fails.

    python tests/cuda_on_cpu/mutate.py [--only WORD] [--build FOLDER]

All mutants are compiled into one module: a copy of csrc in which each place asks whether it is the mutant that the
environment variable LSTM_EXT_MUTANT names. The quick
cases of tests/test_cuda_on_cpu.py run once for each mutant, and mutations.md is written anew.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TABLES = {"kernels.cuh", "norm_kernels.cuh"}
KERNELS = sorted(path for path in (ROOT / "csrc" / "cuda").glob("*.cuh") if path.name not in TABLES)
TIMEOUT = 120  # seconds for one mutant

# Of mutants that no test catches: why they change nothing, or what is not tested.
NOT_CAUGHT = {
    "team.cuh without `__syncthreads()`": "another one follows before what it protects is used",
    "sequence.cuh without `__syncthreads()`": "another one follows before what it protects is used",
    "never `if (group >= product.row_groups || step / run * run + run > kRegisterSteps)`": "it fetches weights that "
    "no step uses",
    "always `if (send)`": "nobody reads what the last step sends",
    "always `if (block_.is_empty(n))`": "the last step overwrites what is stored too early",
    "never `if (!has_row(pass.h_map, moment))`": "it stores to a row of the first step, which is walked later",
    "always `if (gates && params.xw[d])`": "a prefetch, no result",
    "always `if (params.s >= 0 && recurrent != layer.shape.projected)`": "a prefetch, no result",
    "always `if (makes_h && params.s == 0)`": "it stores what is there",
    "never `if (!projection && params.s + 1 == shape.T)`": "no sequence is active after the last step",
    "always `if (part_.k_blocks() > 1)`": "a block without a cluster is a cluster of one",
    "always `if (n < sequences_)`": "behind the rows are the stages, which are copied there later",
    "never `if (++polls_ % kPollsPerLook != 0)`": "it looks at the clock at each poll",
    "always `if (since_ == 0)`": "no wait ends then: tests/test_cuda_on_cpu.py has a partner that never sends; it "
    "is not among the quick cases",
    "norm.cuh always `if (lane == 0)`": "all lanes of a number have its sum",
    "norm.cuh `norm.in_shared ?` always false": "the row of sums serves as well",
    "norm.cuh `norm.in_shared ?` always true": "the quick cases have room; rows too long for it are tested elsewhere",
    "normed.cuh `by_rows() ?` always true": "a gamma that is one row has a stride of 0",
    "normed.cuh never `if (team_.alone())`": "a team of one block sends nothing",
    "normed.cuh always `if (part.units > 0)`": "what no units are apart counts nothing",
    "norm_forward.cuh without `wait_for_previous_launch()`": "that of h before steps follows no launch of ours",
    "norm_forward.cuh always `if (moment_.active())`": "what it computes of a sequence that is not active is not used",
    "norm_forward.cuh `moment_.active() ?` always true": "a sequence that is not active is not stored",
    "norm_forward.cuh never `if (!moment_.active())`": "what it reads of a sequence that is not active is not used",
    "norm_backward.cuh always `if (moment_.active())`": "what it reads of a sequence that is not active is not used",
    "norm_forward.cuh always `if (!layer_.shape.projected)`": "the launch of the projection stores the same",
    "always `if (of.operand)`": "a row that starts at null stands for zeros",
    "tile.cuh never `if (bytes % 16 == 0)`": "it is asked as the kernels are compiled, when there are no mutants",
    "tile.cuh `bytes < 16 ?` always true": "it is asked as the kernels are compiled, when there are no mutants",
    "tile.cuh `bytes < 16 ?` always false": "it is asked as the kernels are compiled, when there are no mutants",
    "cell.cuh never `if (!rows.packed_offset)`": "a time that is found anew is the same",
    "cell.cuh always `if (possible)`": "a key that nobody asks for",
    "cell.cuh never `if (!moment.active())`": "what it computes of a sequence that is not active is not used",
    "cell.cuh always `if (has_peephole)`": "it adds or multiplies by what changes nothing: peepholes that are not "
    "there are zeros",
    "sequence_backward.cuh `row == kCells ?` always true": "cells and d_cells of the cases have one stride",
    "sequence_backward.cuh `row == kCells ?` always false": "cells and d_cells of the cases have one stride",
    "sequence_backward.cuh always `if (moment.follows())`": "it reads c of a step that is not there, and does not "
    "use it",
    "sequence_backward.cuh always `if (i < valid)`": "units that are none are not stored",
    "sequence_backward.cuh `moment.active() ?` always true": "a sequence that is not active is not stored",
    "sequence_backward.cuh `moment.active() && i < valid ?` always true": "what it computes of a unit or a sequence "
    "that does not count is not used",
    "sequence_backward.cuh `counts ?` always true": "what does not count is zero already",
    "sequence_backward.cuh never `if (!to.d_seen)`": "it writes where nothing is wanted: the quick cases of cells that "
    "normalise want all, TestNormContract does not",
    "sequence_backward.cuh always `if (cell().drops_h())`": "a mask that drops nothing is 1",
    "sequence_forward.cuh always `if (cell().drops_h())`": "a mask that drops nothing is 1",
    "sequence_forward.cuh always `if (p >= 0 && cell().drops_h())`": "a mask that drops nothing is 1",
    "sequence.cuh `owner.may_take_turns() && count_ * most <= kThreads / 2 ?` always false": "turns are faster, and "
    "change nothing",
    "pointwise.cuh `together ?` always false": "one number after the other, which is slower",
    "sequence.cuh never `if (address % 16 == 0 && bytes >= 16)`": "copies of 4 bytes, which are slower",
    "step.cuh never `if (params.s < 0)`": "what it finds before the first step is not used",
    "step.cuh never `if (!moment.active())`": "what it computes of a sequence that is not active is not used",
    "step.cuh always `if (xw)`": "a prefetch, no result",
    "step.cuh never `if (!reads.gates)`": "a prefetch, no result",
    "step.cuh always `if (reads.cells_before)`": "a prefetch, no result",
    "step.cuh always `if (reads.dy && !shape.projected)`": "a prefetch, no result",
    "step.cuh always `if (params.s + 1 < shape.T)`": "the last step of a sequence sets what is read",
    "step.cuh `moment.active() ?` always true": "what it takes of a sequence that is not active is zero, or not used",
    "step_block.cuh `std::is_empty_v<Rows> ?` always true": "it is asked as the kernels are compiled, when there "
    "are no mutants",
    "step_block.cuh `std::is_empty_v<Rows> ?` always false": "it is asked as the kernels are compiled, when there "
    "are no mutants",
    "cell.cuh always `if (projected)`": "without a projection the clip of h is 0, which cuts nothing",
    "cell.cuh never `if (!zoneout.wanted)`": "its share is 0",
    "cell.cuh `cell_.tensorflow ?` always false": "the quick cases normalise rows in torch's layout alone; "
    "TestNormContract has TensorFlow's",
    "cell.cuh `cell_.zoneout_c.wanted || left_other ?` always true": "c made anew is what was stored",
    "norm_backward.cuh always `if (to_.d_seen)`": "it writes where nothing is wanted: the quick cases of cells that "
    "normalise want all, TestNormContract does not",
    "norm_backward.cuh never `if (params_.s > 0 || !from_.dc0)`": "it writes where nothing is wanted: the quick "
    "cases of cells that normalise want all, TestNormContract does not",
    "pointwise.cuh always `if ((begins(moment, s) || pass.layer.shape.projected) && has_row(pass.h_map, moment))`": (
        "a step that is walked later overwrites it"
    ),
    "sequence.cuh without `team_.leave()`": "a block has waited for all that is sent to it, and what it sends is "
    "waited for",
    "sequence.cuh always `if (moments_end_at(s))`": "they are found anew, and are the same",
    "always `if (block_.moments_end_at(s))`": "they are found anew, and are the same",
    "sequence.cuh always `if (s >= 0 && s < shape_.T && has_turn(s))`": "it copies the same twice, or nothing: no "
    "sequence is active before the first step and after the last",
    "sequence.cuh never `if (found.bytes <= 0)`": "it copies nothing",
    "sequence.cuh `takes_turns() ?` always true": "some pieces are copied twice",
    "sequence.cuh `takes_turns() ?` always false": "where threads take turns each has one piece",
    "sequence_forward.cuh always `if (made.item >= 0)`": "of an item that is none nothing is stored",
    "sequence_forward.cuh always `if (moment.active())`": "cells that are not active are zeros",
    "sequence_forward.cuh `moment.active() && i < valid ?` always true": "what it computes of a sequence that is "
    "not active is not used",
    "step.cuh always `if (from.dy)`": "the map of an array that is not there has no strides: null stays null",
    "step.cuh always `if (from.d_cells)`": "the map of an array that is not there has no strides: null stays null",
    "step.cuh always `if (makes_cells)`": "what it loads is not used",
    "step_block.cuh `valid() > 0 ?` always true": "a prefetch, no result",
    "step_tile.cuh `n < count_ ?` always true": "rows that are none are not copied",
    "step_tile.cuh `bytes > 0 ?` always true": "of a chunk without bytes nothing is copied",
    "team.cuh always `if (clustered())`": "a block without a cluster is a cluster of one",
    "team.cuh always `if (by_mail())`": "without a grid there are no groups of mail",
    "team.cuh `alone() ?` always false": "a team of one block has one rank",
    "team.cuh `clustered() ?` always true": "it clears what is written later",
}

HEADER = """#pragma once
#include <cstdlib>
#include <type_traits>
inline const int active_mutant = getenv("LSTM_EXT_MUTANT") ? atoi(getenv("LSTM_EXT_MUTANT")) : 0;
constexpr bool mutant(int n) { return !std::is_constant_evaluated() && active_mutant == n; }
"""

# Calls that order threads or hand something over: taken out.
CALLS = re.compile(
    r"(?<![\w.>])(?:__syncthreads|__syncwarp|cluster_sync|mbarrier_\w+|named_barrier_\w+|st_\w+(?:<[\w:]+>)?|fence\w*|clear_words"
    r"|team_\.leave|cp_async_wait<\w+>|wait_for_previous_launch)\("
)
WHILES = re.compile(r"\bwhile \(")
IFS = re.compile(r"\bif \(")


@dataclass(frozen=True)
class Mutation:
    file: str
    line: int
    what: str
    start: int  # of the text that is replaced
    end: int
    before: str  # put before the text, after it; %d stands for the mutant's number
    after: str


def closing(text: str, opening: int) -> int:
    """The place after the parenthesis that closes the one at `opening`."""
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    raise ValueError(f"unbalanced parentheses at {text[opening : opening + 60]!r}")


def condition_start(text: str, end: int) -> int:
    """The place where the condition begins that ends at `end`, before its question mark."""
    depth = 0
    for place in range(end - 1, -1, -1):
        depth += {")": 1, "]": 1, "(": -1, "[": -1}.get(text[place], 0)
        before = text[:place]
        ends_before = text[place] in "{};," or (
            text[place] == " " and re.search(r"(?:return| [-+]?=|\W:|\w:)$", before)
        )
        if depth < 0 or (depth == 0 and ends_before):
            return place + 1
    raise ValueError("a question mark at the start of a file")


def code_of(text: str) -> str:
    """The text with comments blanked out, places kept."""
    return re.sub(r"//[^\n]*|^#[^\n]*", lambda comment: " " * len(comment[0]), text, flags=re.MULTILINE)


def mutations_of(path: Path) -> Iterator[Mutation]:
    text = code_of(path.read_text(encoding="utf-8"))

    def at(start: int, end: int, what: str, before: str, after: str) -> Mutation:
        return Mutation(path.name, text.count("\n", 0, start) + 1, what, start, end, before, after)

    for match in CALLS.finditer(text):
        end = closing(text, match.end() - 1)
        if text[end] == ";" and not re.search(r"(?:void|bool|inline) $", text[: match.start()]):
            name = " ".join(text[match.start() : end].split())
            yield at(match.start(), end, f"without `{name}`", "(mutant(%d) ? void() : ", ")")
    for match in WHILES.finditer(text):
        end = closing(text, match.end() - 1)
        condition = " ".join(text[match.end() : end - 1].split())
        yield at(match.end(), end - 1, f"without waiting while `{condition}`", "!mutant(%d) && (", ")")
    for match in IFS.finditer(text):
        end = closing(text, match.end() - 1)
        condition = " ".join(text[match.end() : end - 1].split())
        leaves = re.match(r"\s*(?:break|continue|return)\b", text[end:])
        what, before = ("never", "!mutant(%d) && (") if leaves else ("always", "mutant(%d) || (")
        if "constexpr" not in text[match.start() - 12 : match.end()] and "kM" not in condition:
            yield at(match.end(), end - 1, f"{what} `if ({condition})`", before, ")")
    for match in re.finditer(r" \? ", text):
        end = match.start()
        start = condition_start(text, end)
        condition = " ".join(text[start:end].split())
        constant = all(
            re.fullmatch(r"k[A-Z]\w*|[A-Z]|\d+|[<>=!&|]+", word.split("::")[-1]) for word in condition.split()
        )
        if constant or "sizeof" in condition:
            continue  # of types
        for what, before in (("true", "mutant(%d) || ("), ("false", "!mutant(%d) && (")):
            yield at(start, end, f"`{condition} ?` always {what}", before, ")")


def write_mutants(source: Path, mutations: list[Mutation]) -> None:
    """Puts all mutations into the copy of csrc/cuda at `source`; mutant n is number n of the list, from 1."""
    (source / "mutant.h").write_text(HEADER, encoding="utf-8")
    for file in {mutation.file for mutation in mutations}:
        path = source / file
        text = path.read_text(encoding="utf-8")
        inserts: list[tuple[int, int, str]] = []
        for number, mutation in enumerate(mutations, 1):
            if mutation.file == file:
                width = mutation.end - mutation.start
                # Of several insertions at one place the wider text's opens first and closes last.
                inserts.append((mutation.start, -width * 1000 + number, mutation.before % number))
                inserts.append((mutation.end, width * 1000 - number - 10**9, mutation.after))
        for place, _, inserted in sorted(inserts, reverse=True):
            text = text[:place] + inserted + text[place:]
        path.write_text('#include "mutant.h"\n' + text, encoding="utf-8")


def build(folder: Path, source: Path) -> None:
    """Builds the module of the mutated sources, in tests/cuda_on_cpu of the folder."""
    pybind11 = subprocess.check_output([sys.executable, "-m", "pybind11", "--cmakedir"], text=True).strip()
    configure = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DLSTM_EXT_CUDA_ON_CPU=ON"]
    configure += ["-DLSTM_EXT_SANITIZE=address,undefined", f"-DCUDA_ON_CPU_SOURCES={source}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11}"]
    for command in (configure, ["cmake", "--build", folder, "--target", "lstm_ext_cuda_on_cpu", "-j", "2"]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def sanitizer_environment() -> dict[str, str]:
    compiler = os.environ.get("CXX", "g++")
    libraries = [
        subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}


def run_tests() -> None:
    """Runs the quick cases in every strategy; for a process of its own, with one mutant."""
    from tests import test_cuda_on_cpu as tests

    for case, dtype in tests.QUICK:
        for strategy in tests.STRATEGIES:
            for seed in range(2):
                tests.check(case, dtype, strategy, seed=seed, data_seed=1)
    for case, dtype in tests.QUICK_NORMED:
        for strategy in tests.STRATEGIES:
            for seed in range(2):
                tests.check(case, dtype, strategy, seed=seed, data_seed=1)
        tests.check_few_threads(case, dtype, data_seed=1)
    for strategy in tests.STRATEGIES:
        suite, way = tests.TestContract(), tests.OnFibers("float32", strategy)
        suite.test_missing_gradients_are_zeros(tests.MASKED_CASE, suite.missing_sets[-1], way)
        for save in suite.saves:
            suite.test_save_changes_no_output(tests.MASKED_CASE, save, way)
        for needs in suite.all_needs:
            suite.test_needs_change_no_gradient(tests.MASKED_CASE, needs, way)
        for case in (tests.LARGE_BATCH_CASE, tests.NORM_LARGE_BATCH):
            tests.check(case, "float32", strategy, device=0 if strategy == "grid" else 1)
        for case in (tests.Case(20, 3, 4, 5, lengths="ragged", resets=True), *tests.NORM_LONG):  # moments found anew
            tests.check(case, "float32", strategy)
    for seed in range(2):  # blocks of a cluster that divide k
        tests.check(tests.Case(2, 3, 3, 128), "float32", "step", seed=seed)
    tests.check(tests.Case(2, 3, 3, 128), "float32", "step", device=2)  # without clusters: more stages than at a time
    for case in tests.CELLS:
        tests.check_cell(case, "float32")
        tests.test_one_step_of_options_matches_the_oracle(case)
    for case in tests.OPTION_CASES:
        for strategy in tests.STRATEGIES:
            tests.check(case, "float32", strategy, data_seed=1)
    for name in tests.OPTIONS:
        tests.test_options_match_the_oracle(name)
    tests.test_rows_of_more_ranks_than_a_warp_has_lanes_match_the_oracle(tests.NORMED_SMOOTH[0])
    tests.check(tests.Case(3, 24, 5, 33), "bfloat16", "grid/4")  # more rows of mail than late readers share
    tests.check(tests.Case(2, 1, 3, 1), "float32", "cluster")
    tests.check(tests.Case(3, 31, 63, 91), "float32", "block", seed=1)


def outcome(number: int) -> str:
    """What the tests say of a mutant; "" if nothing. A fork of this process, which has the heavy imports behind it."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            os.environ["LSTM_EXT_MUTANT"] = str(number)
            signal.alarm(TIMEOUT)
            try:
                run_tests()
            except BaseException:  # whatever it is, it is what the mutant did
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        output.seek(0)
        text = output.read()
    if status == 0:
        return ""
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
        return f"no end after {TIMEOUT} s"
    for said, pattern in {
        "AddressSanitizer: {}": r"AddressSanitizer: ([\w-]+)",
        "UBSan: {}": r"runtime error: ([^\n]{0,60})",
        "harness: {}": r"RuntimeError: seed \d+, kernel [^:]+: ([^\n,]{0,60})",
        "refused: {}": r"RuntimeError: lstm_ext: ([^\n]{0,60})",
        "wrong result: {}": r"(?:AssertionError: |Arrays are not equal\n)([\w\[\]]+)",
    }.items():
        if found := re.search(pattern, text):
            return said.format(found[1])
    raise RuntimeError(f"mutant {number}: the tests failed in an unknown way:\n{text[-3000:]}")


def write_table(rows: list[tuple[Mutation, str]]) -> None:
    caught = sum(1 for _, said in rows if said)
    lines = [
        "# Mutations of the CUDA kernels",
        "",
        f"{caught} of {len(rows)} are caught. Written by `python tests/cuda_on_cpu/mutate.py`.",
        "",
        "| place | kernel with | caught by |",
        "|---|---|---|",
    ]
    for mutation, said in rows:
        what = mutation.what.replace("|", "\\|")
        why = NOT_CAUGHT.get(f"{mutation.file} {mutation.what}") or NOT_CAUGHT.get(mutation.what, "not looked into")
        said = said or f"**nothing**: {why}"
        lines.append(f"| {mutation.file}:{mutation.line} | {what} | {said} |")
    (HERE / "mutations.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def prepare(folder: Path) -> None:
    """Writes and builds the mutants; those that were caught before, in the same sources, stay so."""
    csrc, record = folder / "csrc", folder / "mutations.pickle"
    mutations = [mutation for path in KERNELS for mutation in mutations_of(path)]
    if record.exists() and pickle.loads(record.read_bytes())[0] == mutations:
        return
    shutil.rmtree(csrc, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", csrc)
    write_mutants(csrc / "cuda", mutations)
    build(folder, csrc)
    record.write_bytes(pickle.dumps((mutations, {})))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutations whose line in the table has this word; writes no table")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "mutants", help="build folder")
    arguments = parser.parse_args()
    if "LD_PRELOAD" not in os.environ:  # AddressSanitizer has to be there from the start of a process
        prepare(arguments.build)
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | sanitizer_environment())

    mutations, known = pickle.loads((arguments.build / "mutations.pickle").read_bytes())
    sys.path[:0] = [str(ROOT), str(arguments.build / "tests" / "cuda_on_cpu")]
    import pytest  # noqa: F401
    import torch  # noqa: F401

    import lstm_ext.testing  # noqa: F401

    if said := outcome(0):
        raise SystemExit(f"the tests fail without a mutation: {said}")
    rows = []
    for number, mutation in enumerate(mutations, 1):
        if arguments.only in f"{mutation.file}:{mutation.line} {mutation.what}":
            known[mutation] = known.get(mutation) or outcome(number)
            rows.append((mutation, known[mutation]))
            place = f"{mutation.file}:{mutation.line}"
            print(f"{number}/{len(mutations)} {place} {mutation.what}: {rows[-1][1] or 'NOT CAUGHT'}", flush=True)
            (arguments.build / "mutations.pickle").write_bytes(pickle.dumps((mutations, known)))
    if not arguments.only:
        write_table(rows)


if __name__ == "__main__":
    main()
